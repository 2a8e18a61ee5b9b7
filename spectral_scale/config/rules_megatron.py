"""Rules of runs on megatron-core, checked before any process group is made. No torch here."""

from collections.abc import Iterator

from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import RunConfig


def megatron_run_problems(config: RunConfig, architecture: Architecture) -> Iterator[str]:
    """Settings that megatron-core cannot run, and what to change; nothing on other backends."""
    if config.parallel.backend != "megatron":
        return
    yield from megatron_problems(architecture)
    parts, length = config.parallel.tensor_parallel, config.model.sequence_length
    if config.parallel.sequence_parallel and parts > 0 and length % parts:
        yield (
            f"model.sequence_length={length} cannot be split over parallel.tensor_parallel={parts} "
            f"ranks; set it to a multiple of {parts}, or parallel.sequence_parallel=false"
        )
    if config.spectral.direction_lr_scaling != "none":
        yield (
            f"spectral.direction_lr_scaling={config.spectral.direction_lr_scaling} does not run on "
            "megatron: each rank sees its part of the rows; leave it out"
        )
    if config.spectral.targets:
        yield (
            f"spectral.targets={config.spectral.targets} does not run on megatron: its layer spec "
            "converts all linears of a block; leave it out"
        )


def megatron_problems(architecture: Architecture) -> Iterator[str]:
    """What megatron-core's GPTModel has no place for."""
    if architecture.embedding_size != architecture.hidden_size:
        yield (
            f"embeddings of {architecture.embedding_size} features are projected to "
            f"{architecture.hidden_size} (opt-350m): megatron-core has no such projection; "
            "choose another model, or set parallel.backend=fsdp2"
        )
    if not architecture.pre_norm:
        yield (
            "norms follow their sub-layers (opt-350m): megatron-core normalises before them; "
            "choose another model, or set parallel.backend=fsdp2"
        )
