"""The device of a rank."""

import torch

from spectral_scale.errors import ConfigError


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means for this rank. Raises ConfigError."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError("train.device=cuda, but torch sees no GPU; set train.device=auto or cpu")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} on this host; "
            "start fewer ranks a host, or set train.device=cpu"
        )
    return torch.device("cuda", local_rank)
