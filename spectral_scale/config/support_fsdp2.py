"""What FSDP2 and HSDP (fully_shard over all ranks, or inside groups of them) can do."""

from spectral_scale.config.support import Support

FSDP2: dict[str, Support] = {}
HSDP: dict[str, Support] = {}
