"""mpi4py, for what MPI's variables cannot say: on which host and port the ranks are to meet."""

from spectral_scale.errors import ConfigError


def agree_on_address(address: str, port: int) -> tuple[str, int]:
    """Rank 0's address and port, on every rank. Collective over all MPI ranks.

    Raises ConfigError without mpi4py, or an MPI library that fits it.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            "under mpirun on several hosts the ranks must learn where rank 0 is: set MASTER_ADDR "
            "and MASTER_PORT (mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ...), or install "
            f"mpi4py (pip install 'spectral-scale[mpi]'), which says: {error}"
        ) from None
    found: tuple[str, int] = _broadcast(MPI.COMM_WORLD, address, port)
    return found


def _broadcast(world: object, address: str, port: int) -> tuple[str, int]:
    """As bytes, not as a pickled object."""
    data = bytearray(f"{address} {port}".encode().ljust(300))
    world.Bcast(data, root=0)  # type: ignore[attr-defined]
    text, number = bytes(data).decode().split()
    return text, int(number)
