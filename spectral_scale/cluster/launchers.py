"""The variables by which each launcher tells a process where it stands."""

from collections.abc import Mapping
from dataclasses import dataclass

from spectral_scale.cluster.slurm import tasks_on_node
from spectral_scale.errors import ConfigError
from spectral_scale.parallel.rank_info import RankInfo

Environment = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """One launcher's variables; of several names the first that is set counts."""

    name: str
    """Name of the launcher in the log."""
    rank: str
    """Variable of 0 .. world size - 1."""
    world_size: str
    """Variable of the number of processes."""
    local_rank: tuple[str, ...]
    """Variables of the position on this host."""
    local_world_size: tuple[str, ...] = ()
    """Variables of the number of processes on this host."""

    @property
    def source(self) -> str:
        """Name of the launcher in log lines and errors."""
        return f"{self.name} ({self.rank}, {self.world_size})"


OPEN_MPI = Launcher(
    name="Open MPI",
    rank="OMPI_COMM_WORLD_RANK",
    world_size="OMPI_COMM_WORLD_SIZE",
    local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
    local_world_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
PMI = Launcher(
    name="MPICH or another PMI launcher",
    rank="PMI_RANK",
    world_size="PMI_SIZE",
    local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "SLURM_LOCALID"),
    local_world_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
)
SLURM = Launcher(
    name="a SLURM step",
    rank="SLURM_PROCID",
    world_size="SLURM_STEP_NUM_TASKS",
    local_rank=("SLURM_LOCALID",),
)


def read_rank_info(launcher: Launcher, environment: Environment) -> RankInfo | None:
    """Rank information from `launcher`, if it started this process. Raises ConfigError if invalid.

    A batch script has SLURM_PROCID too, but no step: only srun's tasks are ranks.
    """
    if launcher.rank not in environment or launcher.world_size not in environment:
        return None
    rank = _number(launcher.rank, environment)
    world_size = _number(launcher.world_size, environment)
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"{launcher.rank}={rank} is not below {launcher.world_size}={world_size}; "
            f"check the environment that {launcher.name} gives"
        )
    local_rank = _first(launcher.local_rank, environment)
    local_size = _first(launcher.local_world_size, environment)
    if launcher is SLURM:
        local_size = tasks_on_node(environment)
    if local_rank is None and world_size > 1:
        raise ConfigError(
            f"{launcher.source} does not say which GPU is this process's: one of "
            f"{', '.join(launcher.local_rank)} must be set; set it, or give --local-rank"
        )
    return RankInfo(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank or 0,
        local_world_size=local_size,
        source=launcher.source,
    )


def _first(names: tuple[str, ...], environment: Environment) -> int | None:
    name = next((n for n in names if n in environment), None)
    return None if name is None else _number(name, environment)


def _number(name: str, environment: Environment) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ConfigError(
            f"{name}={environment[name]!r} must be an integer; check the launcher's environment"
        ) from None
