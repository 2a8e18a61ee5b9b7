"""mpi4py, for what MPI's variables cannot say: host and port of the rendezvous."""

from typing import Any

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.rank_info import RankInfo

REMEDY = (
    "set MASTER_ADDR to rank 0's host and MASTER_PORT to a free port for all ranks (Open MPI: "
    "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500; MPICH: -genv MASTER_ADDR HOST ...)"
)
MESSAGE_BYTES = 300


def agree_on_address(rank_info: RankInfo, address: str, port: int) -> tuple[str, int]:
    """Rank 0's address and port, on every rank. Collective over all MPI ranks.

    Raises ConfigError without mpi4py, or where its MPI library is not the launcher's.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"{rank_info.source} does not say where the ranks meet, and mpi4py cannot ask: "
            f"{error}; {REMEDY}, or install it: pip install 'spectral-scale[mpi]'"
        ) from None
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (rank_info.rank, rank_info.world_size):
        library = MPI.Get_library_version().split("\n")[0].strip("\0 ")
        raise ConfigError(
            f"{rank_info.source} says rank {rank_info.rank} of {rank_info.world_size}, mpi4py's "
            f"MPI library ({library}) says {world.Get_rank()} of {world.Get_size()}: it is not the "
            f"launcher's; use that library's mpirun, have mpi4py load the launcher's library "
            f"(MPI4PY_MPIABI=mpich or openmpi), or {REMEDY}"
        )
    return _broadcast(world, address, port)


def _broadcast(world: Any, address: str, port: int) -> tuple[str, int]:
    """Broadcast a text as bytes, not as a pickled object."""
    data = bytearray(f"{address} {port}".encode().ljust(MESSAGE_BYTES))
    world.Bcast(data, root=0)
    text, number = bytes(data).decode().split()
    return text, int(number)
