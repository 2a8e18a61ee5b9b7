"""A real SLURM of two nodes on this machine: slurmctld, two slurmd and munge, started as root."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spectral_scale.cluster.rendezvous import free_ports

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "setpriv")
NODES = ("n1", "n2")
REVOKED_SECONDS = 2.0
"""After a requeue, slurmd refuses a job that starts in the second in which it was ended before."""

# Debian's slurmd may run more than once on a machine. Accounting, cgroups and systemd are left
# out; CPUs and GPUs are as on nodes of 8 GPUs, though the machine has none of them. A credential
# that expires soon lets a requeued job start again after seconds, not minutes.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=2
GresTypes=gpu
MpiDefault=none
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=60
InactiveLimit=0
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
"""
NODE = (
    "NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs=128 RealMemory=1000 "
    "Gres=gpu:8 State=UNKNOWN"
)


class CannotStartError(Exception):
    """Why SLURM does not run here."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What scontrol says of a job."""

    state: str
    exit_code: int
    restarts: int
    fields: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A running SLURM."""

    folder: Path

    def call(self, *words: str, **options: str) -> str:
        """Standard output of a SLURM command; fails with both outputs if the command does."""
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=60, check=False,
            cwd=options.get("cwd"), env=self.environment(),
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def environment(self) -> dict[str, str]:
        """Of the tests, without what an outer scheduler may have set."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def submit(self, *words: str, cwd: Path) -> str:
        """The id of a batch job."""
        return self.call("sbatch", "--parsable", *words, cwd=str(cwd)).strip()

    def job(self, job_id: str) -> Job:
        """State, exit code and restarts of a job that SLURM still remembers."""
        text = self.call("scontrol", "--oneliner", "show", "job", job_id)
        fields = dict(word.partition("=")[::2] for word in text.split() if "=" in word)
        return Job(
            state=fields["JobState"],
            exit_code=int(fields["ExitCode"].split(":")[0]),
            restarts=int(fields["Restarts"]),
            fields=fields,
        )

    def wait(self, job_id: str, *, seconds: float = 120, output: Path | None = None) -> Job:
        """The job once it has ended, requeues included: a requeued one is started soon."""
        deadline = time.monotonic() + seconds
        pending_since: float | None = None
        while True:
            job = self.job(job_id)
            if job.state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"):
                return job
            if job.state != "PENDING" or not job.restarts:
                pending_since = None
            elif pending_since is None:
                pending_since = time.monotonic()
            elif time.monotonic() > pending_since + REVOKED_SECONDS:
                self._start_now(job_id)
            if time.monotonic() > deadline:
                said = output.read_text() if output and output.exists() else ""
                raise AssertionError(f"job {job_id} after {seconds} s: {job}\n{said}")
            time.sleep(0.2)

    def _start_now(self, job_id: str) -> None:
        """SLURM holds a requeued job back until its old credential has expired."""
        subprocess.run(
            ["scontrol", "update", f"jobid={job_id}", "StartTime=now"],
            capture_output=True, timeout=60, check=False, env=self.environment(),
        )  # fmt: skip


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Start SLURM in `folder`, and end exactly what was started. Raises CannotStartError."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]
    if missing:
        raise CannotStartError(
            f"not installed: {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)"
        )
    if os.geteuid() != 0:
        raise CannotStartError("slurmctld, slurmd and munged are started as root here")
    cluster = Cluster(folder=folder)
    _write(folder)
    try:
        _start(cluster)
        yield cluster
    finally:
        _stop(cluster)


def _search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _write(folder: Path) -> None:
    host = socket.gethostname().split(".")[0]
    for name in ("state", "munge", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # munged runs as a user of its own
    closed = [parent for parent in folder.parents if not parent.stat().st_mode & 0o001]
    if closed:
        raise CannotStartError(f"user munge cannot reach {folder}: {closed[0]} is closed to others")
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    # Asked for together: one asked for after another may be the same.
    controller, *node_ports = free_ports(1 + len(NODES))
    nodes = [
        NODE.format(name=name, host=host, port=port)
        for name, port in zip(NODES, node_ports, strict=True)
    ]
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            host=host, folder=folder, controller=controller, nodes="\n".join(nodes)
        )
    )
    gpus = [f"NodeName={name} Name=gpu File=/dev/tty[0-7]\n" for name in NODES]
    (folder / "gres.conf").write_text("".join(gpus))


def _start(cluster: Cluster) -> None:
    munge = cluster.folder / "munge"
    subprocess.run(["chown", "-R", "munge:munge", str(munge)], check=True)
    as_munge = ("setpriv", "--reuid", "munge", "--regid", "munge", "--clear-groups")
    files = (f"--{what}-file={munge / what}" for what in ("key", "pid", "log", "seed"))
    _daemon(cluster, *as_munge, "munged", "--socket", str(munge / "socket"), *files, "--force")
    _daemon(cluster, "slurmctld")
    for node in NODES:
        _daemon(cluster, "slurmd", "-N", node)
    deadline = time.monotonic() + 30
    while cluster.call("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip() != "2":
        if time.monotonic() > deadline:
            raise CannotStartError(f"the nodes did not come up: {_logs(cluster.folder)}")
        time.sleep(0.1)


def _daemon(cluster: Cluster, *words: str) -> None:
    environment = cluster.environment() | {"PATH": _search_path()}
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=30, check=False, env=environment
    )
    if done.returncode != 0:
        raise CannotStartError(f"{words}: {done.stdout}{done.stderr}{_logs(cluster.folder)}")


def _logs(folder: Path) -> str:
    return "\n".join(f"{p.name}: {p.read_text()[-600:]}" for p in sorted(folder.glob("*.log")))


def _stop(cluster: Cluster) -> None:
    """Cancel what is left, then end the daemons by their pid files."""
    with contextlib.suppress(Exception):
        for job_id in set(cluster.call("squeue", "-h", "-o", "%A").split()):
            cluster.call("scancel", job_id)
        deadline = time.monotonic() + 30
        while cluster.call("squeue", "-h").strip() and time.monotonic() < deadline:
            time.sleep(0.2)
    files = ("slurmctld.pid", *(f"slurmd.{node}.pid" for node in NODES), "munge/pid")
    ending = []
    for file in (cluster.folder / name for name in files):
        with contextlib.suppress(OSError, ValueError):
            ending.append(int(file.read_text()))
            os.kill(ending[-1], 15)
    for pid in ending:
        with contextlib.suppress(OSError):
            _wait_for_end(pid)


def _wait_for_end(pid: int) -> None:
    for _ in range(100):
        os.kill(pid, 0)  # raises once it is gone
        time.sleep(0.1)
    os.kill(pid, 9)
