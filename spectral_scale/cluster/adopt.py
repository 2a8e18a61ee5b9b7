"""One start for all launchers: what they say of a rank becomes torch's variables."""

import os
from collections.abc import MutableMapping
from dataclasses import dataclass

from spectral_scale.cluster.detect import LauncherFlags, detect, outside_a_step
from spectral_scale.cluster.interface import VARIABLES, interface_settings
from spectral_scale.cluster.rendezvous import Rendezvous, find_rendezvous
from spectral_scale.parallel.rank_info import RankInfo

NO_FLAGS = LauncherFlags()


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Rank of this process, and what to log about it once there is a log."""

    rank_info: RankInfo
    """Rank, world size, local rank, and which source said so."""
    note: str
    """One line: the source, the rendezvous address and the interfaces."""
    warning: str | None = None
    """A warning about a setting that the user probably did not intend, or None."""


def adopt_launcher(
    flags: LauncherFlags = NO_FLAGS, environment: MutableMapping[str, str] = os.environ
) -> Placement:
    """Find out where this process stands, and say it in the environment, in place.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and the
    interfaces of gloo and NCCL where a run has several ranks; touches nothing otherwise. Every rank
    calls it, before torch.distributed and DeepSpeed look. Raises ConfigError.
    """
    rank_info = detect(flags, environment)
    if rank_info.world_size == 1:
        return Placement(
            rank_info=rank_info,
            note=f"1 process ({rank_info.source})",
            warning=_alone(rank_info, environment),
        )
    meeting = find_rendezvous(rank_info, flags, environment)
    environment.update(_torch_variables(rank_info, meeting))
    environment.update(
        interface_settings(meeting.address, meeting.port, flags.network_interface, environment)
    )
    interfaces = ", ".join(f"{name}={environment.get(name, 'unset')}" for name in VARIABLES)
    return Placement(
        rank_info=rank_info,
        note=f"rank {rank_info.rank} of {rank_info.world_size}, local rank "
        f"{rank_info.local_rank}, from {rank_info.source}; "
        f"meeting at {meeting.address} port {meeting.port} ({meeting.source}); "
        f"{interfaces}",
    )


def _torch_variables(rank_info: RankInfo, meeting: Rendezvous) -> dict[str, str]:
    values = {
        "RANK": str(rank_info.rank),
        "WORLD_SIZE": str(rank_info.world_size),
        "LOCAL_RANK": str(rank_info.local_rank),
        "MASTER_ADDR": meeting.address,
        "MASTER_PORT": str(meeting.port),
    }
    if rank_info.local_world_size is not None:
        values["LOCAL_WORLD_SIZE"] = str(rank_info.local_world_size)
    return values


def _alone(rank_info: RankInfo, environment: MutableMapping[str, str]) -> str | None:
    tasks = outside_a_step(rank_info, environment)
    if tasks is None:
        return None
    return (
        f"this SLURM job has {tasks} tasks, but srun did not start this process: it runs alone; "
        "put srun before the command to use them all"
    )
