"""Rank and world size, from torch's variables, which `cluster.adopt` sets for every launcher."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from spectral_scale.errors import ConfigError

RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """Where this process stands."""

    rank: int = 0
    """0 .. world_size - 1."""
    world_size: int = 1
    """Processes of the run."""
    local_rank: int = 0
    """Position on this host, which picks the GPU."""
    local_world_size: int | None = None
    """Processes of the run on this host; None where the launcher does not say."""
    source: str = "single process"
    """Which environment these values came from."""


def detect_rank_info(environment: Mapping[str, str] = os.environ) -> RankInfo:
    """Read torchrun's variables; without them, one process. Raises ConfigError if they clash."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return RankInfo()
    try:
        rank_info = RankInfo(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            local_world_size=_local_world_size(environment),
            source="torch environment (RANK, WORLD_SIZE, LOCAL_RANK)",
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"incomplete launcher environment: {error}; RANK and WORLD_SIZE must both be integers; "
            "start through torchrun, or unset them for a single process"
        ) from None
    if not 0 <= rank_info.rank < rank_info.world_size:
        raise ConfigError(
            f"RANK={rank_info.rank} is not below WORLD_SIZE={rank_info.world_size}; "
            "check the launcher's environment"
        )
    return rank_info


def _local_world_size(environment: Mapping[str, str]) -> int | None:
    """Ranks on this machine, as torchrun or, failing that, DeepSpeed's launcher says it."""
    text = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE"))
    return None if text is None else int(text)


def require_rendezvous(rank_info: RankInfo, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError if there are several ranks and nothing says where they meet."""
    missing = [name for name in RENDEZVOUS if name not in environment]
    if rank_info.world_size > 1 and missing:
        raise ConfigError(
            f"incomplete launcher environment: WORLD_SIZE={rank_info.world_size}, but "
            f"{' and '.join(missing)} must be set for the ranks to meet; start through torchrun, "
            "or unset RANK and WORLD_SIZE for a single process"
        )
