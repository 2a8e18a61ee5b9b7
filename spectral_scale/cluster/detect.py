"""Rank of this process from the first source that knows: flags, variables of torch, MPI, SLURM."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from spectral_scale.cluster.launchers import OPEN_MPI, PMI, SLURM, read_rank_info
from spectral_scale.errors import ConfigError
from spectral_scale.parallel.rank_info import RankInfo, detect_rank_info

AGENTS = ("GROUP_WORLD_SIZE", "CROSS_SIZE")
"""Variables of torchrun and DeepSpeed's launcher that give the number of launcher agents."""


@dataclass(frozen=True, kw_only=True)
class LauncherFlags:
    """Values given on the command line, all of them optional."""

    rank: int | None = None
    world_size: int | None = None
    local_rank: int | None = None
    """Local rank: a fact beside `rank`. Old launchers give it alone; then it must agree with the
    environment."""
    master_addr: str | None = None
    """Host that rank 0 runs on."""
    master_port: int | None = None
    network_interface: str | None = None
    """Name of the interface that the ranks talk over."""


def detect(flags: LauncherFlags, environment: Mapping[str, str]) -> RankInfo:
    """Rank and world size from the first source that knows them. Raises ConfigError if sources
    contradict each other."""
    found = list(_sources(flags, environment))
    if not found:
        rank_info = RankInfo()
        _check_local_flag(flags, rank_info, said="LOCAL_RANK" in environment)
        return rank_info
    rank_info, *others = found
    for other in others:
        _check_agreement(rank_info, other, environment)
    _check_partial(rank_info, environment)
    _check_local_flag(flags, rank_info, said=True)
    return rank_info


def outside_a_step(rank_info: RankInfo, environment: Mapping[str, str]) -> int | None:
    """Tasks that a SLURM job has though this process, alone, was not started by srun; else None."""
    tasks = environment.get("SLURM_NTASKS", "")
    alone = rank_info.world_size == 1 and "SLURM_STEP_NUM_TASKS" not in environment
    return int(tasks) if alone and tasks.isdigit() and int(tasks) > 1 else None


def _sources(flags: LauncherFlags, environment: Mapping[str, str]) -> Iterator[RankInfo]:
    if flags.rank is not None or flags.world_size is not None:
        yield _from_flags(flags)
    slurm, pmi = read_rank_info(SLURM, environment), read_rank_info(PMI, environment)
    if slurm and pmi and (slurm.rank, slurm.world_size) == (pmi.rank, pmi.world_size):
        pmi = None  # srun --mpi=pmi2: SLURM's own variables say more
    launched = [f for f in (read_rank_info(OPEN_MPI, environment), pmi, slurm) if f is not None]
    if "RANK" in environment or (not launched and "WORLD_SIZE" in environment):
        yield detect_rank_info(environment)
    yield from launched


def _from_flags(flags: LauncherFlags) -> RankInfo:
    if flags.rank is None or flags.world_size is None or not 0 <= flags.rank < flags.world_size:
        raise ConfigError(
            f"--rank {flags.rank} and --world-size {flags.world_size} do not say where this "
            "process stands; give both, the rank from 0 to below the world size"
        )
    local = flags.local_rank
    if local is None and flags.world_size > 1:
        raise ConfigError("--rank and --world-size need --local-rank, the position on this host")
    return RankInfo(
        rank=flags.rank,
        world_size=flags.world_size,
        local_rank=local or 0,
        source="the command line (--rank, --world-size)",
    )


def _check_agreement(rank_info: RankInfo, outer: RankInfo, environment: Mapping[str, str]) -> None:
    """`outer` started `rank_info`'s launcher, one or more of its processes each, or is the same."""
    agents = next((int(environment[n]) for n in AGENTS if environment.get(n, "").isdigit()), None)
    from_torch = rank_info.source.startswith("torch")
    if from_torch and agents is not None:
        fault = outer.world_size not in (1, agents)  # 1: an interactive shell
        said = f"{agents} launchers (torchrun or deepspeed) make up {rank_info.world_size} ranks"
    else:
        fault = outer.world_size > rank_info.world_size
        fault |= outer.world_size == rank_info.world_size and outer.rank != rank_info.rank
        said = f"rank {rank_info.rank} of {rank_info.world_size}"
    if fault:
        raise ConfigError(
            f"the launchers contradict each other: {rank_info.source} says {said}, {outer.source} "
            f"says rank {outer.rank} of {outer.world_size}; start the run through one of them "
            "(under srun: one torchrun a node, with --nnodes), and unset what is left of another"
        )


def _check_partial(rank_info: RankInfo, environment: Mapping[str, str]) -> None:
    """WORLD_SIZE without RANK, as `deepspeed --launcher mpich` sets it, must be the same number."""
    said = environment.get("WORLD_SIZE")
    if said is not None and "RANK" not in environment and said != str(rank_info.world_size):
        raise ConfigError(
            f"WORLD_SIZE={said}, but {rank_info.source} says {rank_info.world_size}; "
            "unset WORLD_SIZE"
        )


def _check_local_flag(flags: LauncherFlags, rank_info: RankInfo, *, said: bool) -> None:
    given = flags.local_rank
    if given is None or given == -1 or given == rank_info.local_rank:  # -1: "none", by old custom
        return
    if not said and rank_info.world_size == 1:
        remedy = "RANK, WORLD_SIZE and LOCAL_RANK are not set; start through a launcher"
    else:
        remedy = f"{rank_info.source} says {rank_info.local_rank}; leave the flag out"
    raise ConfigError(f"--local-rank {given} contradicts the environment: {remedy}")
