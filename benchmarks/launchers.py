"""What every launcher does with signals, lost ranks and errors, and the outcome for the run.

    python benchmarks/launchers.py [--only NAME …] [--events EVENT …] [--output FOLDER]
        [--render FILE]

Starts two ranks (one under `plain`) of a tiny run with each installed launcher and applies each
event to it; for srun, the cluster of tests/slurm is started where no SLURM answers. An observation
records status.json, the newest checkpoint (every byte verified), the processes left after launcher
and ranks had time to exit, the launcher's exit code, and the time from the event to the end of the
last process. `prepare` is started as one process, and its command is given again after the event.
The script exits with 0 only if every outcome is the documented one.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from spectral_scale.checkpoint.verify import inspect_checkpoints
from spectral_scale.errors import CheckpointError
from spectral_scale.metrics.history import load_history
from spectral_scale.supervision.heartbeat import read_beats
from spectral_scale.supervision.status import read_status

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "slurm"))

import launcher_prepare  # noqa: E402
from slurm_cluster import CannotStartError, running_cluster  # noqa: E402

SCRIPT = str(ROOT / "launch" / "pretrain.py")
MARK = "SPECTRAL_SCALE_LAUNCHER_MARK"
PATIENCE_SECONDS = 100.0
HANG_SECONDS = 10


@dataclass(frozen=True)
class Launcher:
    """The command by which a launcher starts ranks."""

    program: str
    """The program that must be installed."""
    words: tuple[str, ...]
    """Words of the command line before the script."""
    kills_its_ranks_on: tuple[str, ...] = ()
    """Events after which the launcher kills its ranks at once."""
    other_script: tuple[str, ...] = ()
    """Further words before a script that takes no `--local_rank`."""


def _beside_python(name: str) -> str:
    """A console script of this interpreter's environment."""
    return str(Path(sys.executable).with_name(name))


LAUNCHERS = {
    "plain": Launcher(sys.executable, (sys.executable,)),
    "torchrun": Launcher(
        _beside_python("torchrun"),
        (_beside_python("torchrun"), "--standalone", "--nproc-per-node={ranks}"),
    ),
    "deepspeed": Launcher(
        _beside_python("deepspeed"),
        (_beside_python("deepspeed"), "--num_gpus={ranks}", "--master_port={port}"),
        other_script=("--no_local_rank",),
    ),
    "mpirun": Launcher(
        "mpirun",
        ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "{ranks}", sys.executable),
    ),
    "mpich": Launcher("mpirun.mpich", ("mpirun.mpich", "-n", "{ranks}", sys.executable)),
    "srun": Launcher(
        "srun",
        ("srun", "--nodes=1", "--ntasks={ranks}", "--disable-status", "--job-name={run}")
        + (sys.executable,),
        kills_its_ranks_on=("SIGTERM to the launcher",),
    ),
}

SAVED, INTACT, NOTHING = "saved and resumable", "last checkpoint intact", "nothing begun"
WHOLE = "whole after the same command"
GRACEFUL = ("SIGTERM", "SIGUSR1", "SIGINT")
WAITING = "SIGTERM while waiting for data"
PREPARING = "SIGTERM while preparing"


@dataclass(frozen=True)
class Observation:
    """The outcome of one event under one launcher."""

    launcher: str
    """Name of the launcher, a key of LAUNCHERS."""
    event: str
    """The event applied to the run."""
    state: str
    """`state` of status.json."""
    reason: str
    """`reason` of status.json."""
    exit_code: int | None
    """Exit code of the launcher; None if it had to be killed."""
    checkpoint: int | None
    """Step of the newest checkpoint, if all its bytes verify."""
    saved_at_end: bool
    """Whether that checkpoint holds the step at which the run ended."""
    orphans: int
    """Number of processes left after PATIENCE_SECONDS."""
    seconds: float
    """Seconds from the event to the end of the last process."""

    def outcome(self) -> str:
        """The outcome in the words of the page."""
        if self.orphans:
            return f"{self.orphans} processes left behind"
        if self.event == PREPARING:
            return WHOLE if self.reason == WHOLE else "a folder that cannot be used"
        if self.state == "stopped" and self.saved_at_end:
            return SAVED
        if self.checkpoint is not None:
            return INTACT
        return NOTHING


def events(launcher: str) -> dict[str, str]:
    """Event -> documented outcome."""
    found = {}
    for name in GRACEFUL:
        found[f"{name} to the launcher"] = SAVED
        if launcher != "plain":
            found[f"{name} to one rank"] = SAVED
    found["STOP file"] = SAVED
    if launcher == "srun":
        found["scancel"] = SAVED
    if launcher != "plain":
        found["one rank SIGKILLed"] = INTACT
        found["one rank SIGSTOPped"] = INTACT
    # Several ranks can only save together, and wait in different steps.
    found[WAITING] = SAVED if launcher == "plain" else INTACT
    found[PREPARING] = WHOLE
    found["configuration error"] = NOTHING
    return found | dict.fromkeys(LAUNCHERS[launcher].kills_its_ranks_on, INTACT)


def missing() -> list[str]:
    """Launchers that are not installed."""
    return [name for name, each in LAUNCHERS.items() if shutil.which(each.program) is None]


@contextlib.contextmanager
def slurm() -> Iterator[None]:
    """A controller that answers: the site's, or that of tests/slurm, until the end."""
    if subprocess.run(["scontrol", "ping"], capture_output=True).returncode == 0:
        yield
        return
    with (
        tempfile.TemporaryDirectory(prefix="slurm") as folder,
        running_cluster(Path(folder).resolve()) as cluster,
    ):
        os.environ["SLURM_CONF"] = cluster.environment()["SLURM_CONF"]
        yield


def marked(mark: str) -> list[psutil.Process]:
    """Live processes of one start, found by the mark in their inherited environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    """The processes of all ranks, found by their heartbeats."""
    return [psutil.Process(beat.pid) for beat in read_beats(run_dir)]


def training_words(run_dir: Path, event: str) -> list[str]:
    """Arguments for a run that does not end by itself."""
    values = {
        "model.hidden_size": 32,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "model.sequence_length": 32,
        "spectral.spectral_rank": 8,
        "train.run_dir": run_dir,
        "train.steps": 1_000_000,
        "train.eval_interval": 1_000_000,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 3 if event == "configuration error" else 2,
        "train.device": "cpu",
        "data.num_workers": 1 if event == WAITING else 0,
        "checkpoint.interval": 5,
        # Long enough for the stop to come first where data is waited for.
        "health.hang_timeout_seconds": 60 if event == WAITING else HANG_SECONDS,
        "metrics.log_interval": 1,
        "metrics.tensorboard": "false",
        "metrics.progress": "false",
    }
    return [f"--{key}={value}" for key, value in values.items()]


def observe(launcher: str, event: str, folder: Path) -> Observation:
    """Start a run, apply the event, wait for the end, and inspect what is left."""
    mark, run_dir = uuid.uuid4().hex, folder / f"{launcher}-{event.replace(' ', '_')}"
    shutil.rmtree(run_dir, ignore_errors=True)
    given = {"port": 20_000 + os.getpid() % 20_000, "run": run_dir.name}
    given["ranks"] = 1 if event == PREPARING else 2
    words = [word.format(**given) for word in LAUNCHERS[launcher].words]
    if event == PREPARING:
        launcher_prepare.make_input(folder)
        words += LAUNCHERS[launcher].other_script
        words += [launcher_prepare.COMMAND, *launcher_prepare.words(folder, run_dir)]
    else:
        words += [SCRIPT, *training_words(run_dir, event)]
    log = folder / f"{run_dir.name}.log"
    environment = os.environ | {
        MARK: mark,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "SPECTRAL_SCALE_MEETING_SECONDS": "300",
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(
            words, stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
    try:
        wait_for_moment(event, process, run_dir, log)
        began = time.monotonic()
        act(event, process, run_dir)
        wait_for_end(process, mark)
        seconds = time.monotonic() - began
        left = marked(mark)
    finally:
        for each in marked(mark):
            each.kill()
        code = process.poll()
        if code is None:
            process.kill()
            process.wait()
    return look(launcher, event, run_dir, code, len(left), seconds)


def wait_for_moment(
    event: str, process: "subprocess.Popen[bytes]", run_dir: Path, log: Path
) -> None:
    """Wait until the run has come to where the event is to meet it."""
    if event == PREPARING:
        launcher_prepare.wait_until_it_tokenises(process, run_dir, log)
    elif event != "configuration error":
        wait_for_step(process, run_dir, 7, log)
    if event == WAITING:
        stop_data(run_dir)


def stop_data(run_dir: Path) -> None:
    """Suspend the loader processes of all ranks, and wait until their last batch is used up."""
    for rank in ranks_of(run_dir):
        for child in rank.children():
            if child.cmdline() == rank.cmdline():  # a fork of the rank
                child.suspend()
    steps = [-1]
    while len(set(steps[-3:])) > 1 or len(steps) < 3:
        time.sleep(2)
        steps.append(max(x["step"] for x in load_history(run_dir).current()))


def wait_for_step(process: "subprocess.Popen[bytes]", run_dir: Path, step: int, log: Path) -> None:
    """Wait until the run has logged `step`."""
    deadline = time.monotonic() + 240
    while max((x["step"] for x in load_history(run_dir).current()), default=0) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the run did not come to step {step}; see {log}")
        time.sleep(0.05)


def act(event: str, process: "subprocess.Popen[bytes]", run_dir: Path) -> None:
    """Apply the event to the run."""
    name, _, to = event.partition(" to ")
    if event in (WAITING, PREPARING):
        process.send_signal(signal.SIGTERM)
    elif name in GRACEFUL and to == "the launcher":
        process.send_signal(getattr(signal, name))
    elif name in GRACEFUL:
        ranks_of(run_dir)[1].send_signal(getattr(signal, name))
    elif event == "STOP file":
        (run_dir / "STOP").touch()
    elif event == "scancel":
        subprocess.run(["scancel", f"--name={run_dir.name}"], check=True)
    elif event == "one rank SIGKILLed":
        ranks_of(run_dir)[1].kill()
    elif event == "one rank SIGSTOPped":
        ranks_of(run_dir)[1].suspend()


def wait_for_end(process: "subprocess.Popen[bytes]", mark: str) -> None:
    """Wait until the launcher and all it started have ended, or for PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None and not marked(mark):
            return
        time.sleep(0.2)


def look(
    launcher: str, event: str, run_dir: Path, code: int | None, orphans: int, seconds: float
) -> Observation:
    """Inspect the run folder and record the observation."""
    status = read_status(run_dir)
    if event == PREPARING:
        whole = launcher_prepare.is_whole_after_the_same_command(run_dir.parent, run_dir)
        status = {"reason": WHOLE if whole else ""}
    try:
        newest = inspect_checkpoints(run_dir)[0]
        step = newest.step if newest.good else None
    except CheckpointError:
        step = None
    return Observation(
        launcher=launcher,
        event=event,
        state=status.get("state", "none"),
        reason=str(status.get("reason", "")),
        exit_code=code,
        checkpoint=step,
        saved_at_end=step is not None and step == status.get("step"),
        orphans=orphans,
        seconds=round(seconds, 1),
    )


def render(found: list[Observation]) -> str:
    """The table of docs/launchers.md."""
    head = ["launcher", "event", "outcome", "status.json", "launcher's exit code", "seconds"]
    lines = [head, ["---"] * len(head)]
    for each in found:
        outcome = each.outcome()
        if outcome != events(each.launcher)[each.event]:
            outcome = f"**{outcome}** (documented: {events(each.launcher)[each.event]})"
        state = each.reason if each.state == "stopped" else each.state
        lines.append(
            [each.launcher, each.event, outcome, state, str(each.exit_code), f"{each.seconds:.0f}"]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


PAGE = """# Launchers

Runs behave the same under every launcher: a run that is asked to stop finishes its step, saves and
exits; a run that loses a rank exits with its last checkpoint intact; no process is left behind.

This page is written by `python benchmarks/launchers.py --render docs/launchers.md`. Each row is one
run with two ranks on one machine (one rank under `plain`) and `health.hang_timeout_seconds` {hang};
all bytes of the checkpoint were verified after each event. Data is waited for where the loader
processes of all ranks are suspended (with a timeout of 60 seconds): one process then saves, several
end with their last checkpoint after ten seconds. `prepare` is one process with two workers, and its
command is given again after the event; the folder must then equal that of an undisturbed one.
{missing}
## Exit codes

The ranks exit with the codes of `spectral-scale train` (0, 75, 78, 93, otherwise failure). The
launcher's own code is less reliable: torchrun exits with 1 for any failing rank, and launchers
that a signal kills exit with that signal. Read `status.json` (`state`, `exit_code`, `requeue`)
instead.

## Notes on each launcher

- **torchrun** is killed by SIGUSR1, and `deepspeed` by any signal, without forwarding it. The ranks
  notice that their launcher is gone, save and exit. `torchrun --signals-to-handle
  SIGTERM,SIGINT,SIGUSR1` forwards SIGUSR1 as well. torchrun hands SIGHUP to its ranks even under
  `nohup`; they save.
- **mpirun** is Open MPI's, `mpich` is MPICH's `mpirun`. On one host, MPICH's ranks find each other
  through their common parent process. On several hosts, either mpi4py must load the launcher's own
  library (`MPI4PY_MPIABI=mpich`), or `-genv MASTER_ADDR HOST -genv MASTER_PORT 29500` must give the
  rendezvous address.
- **deepspeed --launcher openmpi, mpich and slurm** train through `mpirun` and `srun` (one test
  each); signals were not tried with these. DeepSpeed's helper for MPICH exits with 0 whatever the
  exit code of its rank: read `status.json`. It calls the `mpirun` found on the PATH, which must be
  MPICH's.
- **srun** kills its ranks with SIGKILL when it receives SIGTERM itself. End a job with `scancel`,
  which sends the ranks SIGTERM and grants them SLURM's `KillWait` seconds, or with
  `spectral-scale stop`. On the first Ctrl-C, srun only prints the state of its tasks; with
  `--disable-status`, as used here, it forwards the signal. `tests/slurm` tests the scripts of
  `slurm/` on a real SLURM of two nodes.

## Observations

Seconds are counted from the event to the end of the last process, on two cores shared with many
other processes. For a stopped rank they include the timeout of {hang} seconds (45 by default).

{table}
"""


def main() -> int:
    """Run the missing observations, then print or render all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--events", nargs="*", help="observe these alone")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--render", type=Path, default=None)
    arguments = parser.parse_args()
    folder = arguments.output or Path(tempfile.mkdtemp(prefix="launchers"))
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "observations.json"
    found = [Observation(**x) for x in json.loads(results.read_text())] if results.exists() else []
    known = {(x.launcher, x.event) for x in found}
    absent = missing()
    with contextlib.ExitStack() as stack:
        if "srun" in set(arguments.only).difference(absent):
            try:
                stack.enter_context(slurm())
            except CannotStartError as error:
                print(f"srun is left out: {error}", file=sys.stderr)
                absent.append("srun")
        for launcher in arguments.only:
            for event in events(launcher) if launcher not in absent else ():
                if (launcher, event) in known or event not in (arguments.events or [event]):
                    continue
                found.append(observe(launcher, event, folder))
                print(json.dumps(asdict(found[-1])), flush=True)
                results.write_text(json.dumps([asdict(x) for x in found], indent=1))
    order = {(n, e): i for i, (n, e) in enumerate((n, e) for n in LAUNCHERS for e in events(n))}
    found.sort(key=lambda x: order[x.launcher, x.event])
    if arguments.render is not None:
        shown = {x.launcher for x in found}
        names = ", ".join(name for name in LAUNCHERS if name not in shown)
        note = f"Launchers not available on this machine: {names}.\n" if names else ""
        page = PAGE.format(hang=HANG_SECONDS, missing=note, table=render(found))
        arguments.render.write_text(page, encoding="utf-8")
    wrong = [x for x in found if x.outcome() != events(x.launcher)[x.event]]
    for each in wrong:
        print(f"not as documented: {each}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
