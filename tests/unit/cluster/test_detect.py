"""Which source says where a process stands, and which contradictions are refused."""

import pytest

from spectral_scale.cluster.detect import LauncherFlags, detect, outside_a_step
from spectral_scale.errors import ConfigError
from spectral_scale.parallel.rank_info import RankInfo

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2",
    "CROSS_RANK": "1", "CROSS_SIZE": "2",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NTASKS": "4",
}  # fmt: skip
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
NONE = LauncherFlags()


def place(rank_info: RankInfo) -> tuple[int, int, int, int | None]:
    return rank_info.rank, rank_info.world_size, rank_info.local_rank, rank_info.local_world_size


@pytest.mark.parametrize(
    ("environment", "expected", "source"),
    [
        ({}, (0, 1, 0, None), "single process"),
        (TORCHRUN, (5, 8, 1, 4), "torch environment"),
        (DEEPSPEED, (3, 4, 1, 2), "torch environment"),
        (OPEN_MPI, (2, 4, 0, 2), "Open MPI"),
        (MPICH, (2, 4, 0, 2), "MPICH"),
        (SRUN, (2, 4, 0, 2), "SLURM step"),
        (BATCH_SCRIPT, (0, 1, 0, None), "single process"),
        # inside one another: the inner launcher's ranks count
        (OPEN_MPI | SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (2, 4, 0, 2), "MPI"),
        (
            TORCHRUN | SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            (5, 8, 1, 4),
            "torch",
        ),
        (DEEPSPEED | SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (3, 4, 1, 2), ""),
        # srun --mpi=pmi2: both say the same, SLURM knows the rest
        (SRUN | {"PMI_RANK": "2", "PMI_SIZE": "4"}, (2, 4, 0, 2), "SLURM step"),
        # deepspeed --launcher mpich without its helper: a world size and no rank
        (MPICH | {"WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, (2, 4, 0, 2), "MPICH"),
        # each task sees its own GPU only
        (
            SRUN | {"SLURM_LOCALID": "1", "SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "1"},
            (2, 4, 1, 2),
            "SLURM",
        ),
        (SRUN | {"SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "1"}, (2, 4, 1, 2), "SLURM"),
    ],
)
def test_sources(
    environment: dict[str, str], expected: tuple[int, int, int, int | None], source: str
) -> None:
    rank_info = detect(NONE, environment)
    assert place(rank_info) == expected
    assert source in rank_info.source


def test_flags_come_first() -> None:
    flags = LauncherFlags(rank=1, world_size=8, local_rank=1)
    rank_info = detect(flags, {})
    assert (rank_info.rank, rank_info.world_size, rank_info.local_rank) == (1, 8, 1)
    assert "--rank" in rank_info.source
    same = detect(LauncherFlags(rank=5, world_size=8, local_rank=1), TORCHRUN)
    assert same.rank == 5 and "--rank" in same.source


def test_the_local_rank_that_old_launchers_add() -> None:
    assert detect(LauncherFlags(local_rank=1), TORCHRUN).local_rank == 1
    assert detect(LauncherFlags(local_rank=-1), {}) == RankInfo()
    assert detect(LauncherFlags(local_rank=0), {}) == RankInfo()


@pytest.mark.parametrize(
    ("flags", "environment", "parts"),
    [
        (NONE, {"RANK": "0", "WORLD_SIZE": "1"} | SRUN, ["contradict", "0 of 1", "2 of 4"]),
        (NONE, TORCHRUN | {"GROUP_WORLD_SIZE": "1"} | SRUN, ["1 launchers", "8 ranks", "--nnodes"]),
        (NONE, {"RANK": "1", "WORLD_SIZE": "4"} | SRUN, ["rank 1 of 4", "rank 2 of 4", "unset"]),
        (NONE, {"RANK": "0", "WORLD_SIZE": "2"} | OPEN_MPI, ["Open MPI", "rank 2 of 4"]),
        (NONE, MPICH | {"WORLD_SIZE": "8"}, ["WORLD_SIZE=8", "says 4"]),
        (LauncherFlags(rank=1, world_size=4, local_rank=1), SRUN, ["command line", "2 of 4"]),
        (LauncherFlags(local_rank=2), TORCHRUN, ["--local-rank 2", "says 1"]),
        (LauncherFlags(local_rank=1), {}, ["--local-rank 1", "not set", "launcher"]),
        (LauncherFlags(rank=1), {}, ["--world-size None", "give both"]),
        (LauncherFlags(rank=4, world_size=4, local_rank=0), {}, ["below the world size"]),
        (LauncherFlags(rank=1, world_size=4), {}, ["need --local-rank"]),
        (NONE, OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "4"}, ["=4 is not below", "Open MPI"]),
        (NONE, SRUN | {"SLURM_PROCID": "x"}, ["SLURM_PROCID='x'", "integer"]),
        (NONE, {"PMI_RANK": "1", "PMI_SIZE": "4"}, ["MPI_LOCALRANKID", "--local-rank"]),
        (NONE, {"WORLD_SIZE": "2"}, ["RANK", "torchrun"]),
    ],
)
def test_contradictions(
    flags: LauncherFlags, environment: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        detect(flags, environment)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_batch_script_without_srun_is_noticed() -> None:
    assert outside_a_step(detect(NONE, BATCH_SCRIPT), BATCH_SCRIPT) == 4
    assert outside_a_step(detect(NONE, SRUN), SRUN) is None
    assert outside_a_step(RankInfo(), {}) is None
    one = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert outside_a_step(detect(NONE, one), one) is None
