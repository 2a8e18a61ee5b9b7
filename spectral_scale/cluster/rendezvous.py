"""Rendezvous of a run: an address and a port that all ranks derive without communication."""

import contextlib
import hashlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from spectral_scale.cluster import interface, mpi, slurm
from spectral_scale.cluster.detect import LauncherFlags
from spectral_scale.errors import ConfigError
from spectral_scale.parallel.rank_info import RankInfo

LOOPBACK = "127.0.0.1"
PORTS = range(15000, 30000)
"""Ports given by job ids: above the well-known ones, below those that systems hand out."""
_MPI_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
_HYDRA = "hydra_pmi_proxy"
"""Starts the ranks of one host under MPICH's and Intel's mpirun, which give no job id."""


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Rank 0's listening place."""

    address: str
    """Host name or IP address."""
    port: int
    """TCP port."""
    source: str
    """Source of the address and the port, for the log."""


def find_rendezvous(
    rank_info: RankInfo, flags: LauncherFlags, environment: Mapping[str, str]
) -> Rendezvous:
    """Use given values and derive the rest from the job. Raises ConfigError if neither suffices.

    Collective over the ranks of an MPI job on several hosts (see `mpi.agree_on_address`).
    """
    address = flags.master_addr or environment.get("MASTER_ADDR")
    port = _given_port(flags, environment)
    given = [n for n, v in (("address", address), ("port", port)) if v is not None]
    if address is not None and port is not None:
        return Rendezvous(address=address, port=port, source=f"given {' and '.join(given)}")
    found = _from_job(rank_info, flags, environment)
    return Rendezvous(
        address=address or found.address,
        port=found.port if port is None else port,
        source=" and ".join([found.source, *(f"given {what}" for what in given)]),
    )


def _given_port(flags: LauncherFlags, environment: Mapping[str, str]) -> int | None:
    text = environment.get("MASTER_PORT") if flags.master_port is None else str(flags.master_port)
    if text is None:
        return None
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise ConfigError(f"MASTER_PORT={text} is no port; give a number from 1 to 65535")
    return int(text)


def _from_job(
    rank_info: RankInfo, flags: LauncherFlags, environment: Mapping[str, str]
) -> Rendezvous:
    if "MPI" in rank_info.source:
        return _from_mpi(rank_info, flags, environment)
    if "SLURM_JOB_ID" in environment and "SLURM" in rank_info.source:
        address, port = job_rendezvous(environment)
        return Rendezvous(
            address=address, port=port, source=f"SLURM job {environment['SLURM_JOB_ID']}"
        )
    raise ConfigError(
        f"{rank_info.world_size} ranks ({rank_info.source}), but nothing says where they meet: "
        "MASTER_ADDR and MASTER_PORT must be set, or --master-addr and --master-port given; or "
        "start through torchrun"
    )


def job_rendezvous(environment: Mapping[str, str]) -> tuple[str, int]:
    """The first node of a SLURM job or step, and a port of its own. Raises ConfigError."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    identity = [environment.get(name, "") for name in names]
    return _first_host(environment), job_port(*identity)


def job_port(*identity: str) -> int:
    """A port that follows from a job's identity and differs between most jobs."""
    digest = hashlib.sha256("/".join(identity).encode()).digest()
    return PORTS[int.from_bytes(digest[:8]) % len(PORTS)]


def free_port() -> int:
    """A port nobody listens on at this moment."""
    return free_ports(1)[0]


def free_ports(number: int) -> list[int]:
    """Different ports, none of which anybody listens on at this moment."""
    with contextlib.ExitStack() as open_sockets:
        probes = [open_sockets.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _from_mpi(
    rank_info: RankInfo, flags: LauncherFlags, environment: Mapping[str, str]
) -> Rendezvous:
    one_host = rank_info.local_world_size == rank_info.world_size
    if one_host:
        job = next((environment[n] for n in _MPI_JOB if n in environment), None) or _hydra_job()
        if job is not None:
            return Rendezvous(address=LOOPBACK, port=job_port(job), source=f"MPI job {job}")
    address = LOOPBACK if one_host else _own_address(flags)
    address, port = mpi.agree_on_address(rank_info, address, free_port())
    return Rendezvous(address=address, port=port, source="rank 0, through mpi4py")


def _hydra_job() -> str | None:
    """Identifier of the ranks that Hydra started on this host; None under other launchers."""
    parents = psutil.Process().parents()
    proxy = next((parent for parent in parents if parent.name() == _HYDRA), None)
    return None if proxy is None else f"{_HYDRA} {proxy.pid}"


def _own_address(flags: LauncherFlags) -> str:
    """What other hosts reach this one at: of the interface given, or of its name or default way."""
    if flags.network_interface is not None:
        return interface.address_of(flags.network_interface)
    try:
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
        return interface.local_address_towards(interface.OUTSIDE, 9)
    except OSError:
        return LOOPBACK


def _first_host(environment: Mapping[str, str]) -> str:
    """Rank 0's host: the first of the step's nodes."""
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodelist = next((environment[name] for name in names if name in environment), None)
    if nodelist is None:
        raise ConfigError("SLURM gives no node list; set MASTER_ADDR to the first node's name")
    hosts = slurm.expand_hosts(nodelist)
    if len(hosts) == 1:
        return LOOPBACK
    try:
        socket.getaddrinfo(hosts[0], None)
    except OSError:
        address = slurm.node_address(hosts[0])
        if address is None:
            raise ConfigError(
                f"{hosts[0]}, the first node of {nodelist}, resolves to no address on "
                f"{socket.gethostname()}; set MASTER_ADDR to an address of it"
            ) from None
        return address
    return hosts[0]
