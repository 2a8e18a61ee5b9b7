"""LoRA, whose base never changes, and ReLoRA*, which merges its factors into the base."""

from spectral_scale.config.methods.rules import TARGET_KEYS, rank_problems, ring_bytes
from spectral_scale.config.methods.spec import (
    MethodMemory,
    MethodSpec,
    MethodTraffic,
    MethodWork,
    PlannedModel,
)
from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import SpectralConfig

_FACTORS = "factors of two layers lie in bases of their own; use block_gains"
_REFUSED = {"layers": _FACTORS, "rows": _FACTORS, "heads": _FACTORS}
_KEYS = TARGET_KEYS | {"spectral.spectral_rank", "spectral.lora_alpha", "optimizer.spectral_lr"}
_LAYOUT = ("spectral_rank", "lora_alpha")


def _kept_per_token(spectral: SpectralConfig, _: Architecture) -> int:
    """Elements of x a, the input times the first factor, that are kept of each token."""
    return spectral.spectral_rank


def _saved(model: PlannedModel) -> int:
    """Bytes of the base weights, which a checkpoint holds in full precision."""
    return model.itemsize * sum(m * n for m, n in model.matrices.values())


def _lora_memory(_: SpectralConfig, model: PlannedModel) -> MethodMemory:
    return MethodMemory(saved=_saved(model))


def _relora_memory(_: SpectralConfig, model: PlannedModel) -> MethodMemory:
    """Owners keep the exact base weights where the layers' own are rounded."""
    rounded = model.frozen_itemsize < model.itemsize
    owned = model.largest_load(lambda s: model.itemsize * s[0] * s[1]) if rounded else 0
    return MethodMemory(owned=owned, saved=_saved(model))


def _relora_traffic(_: SpectralConfig, model: PlannedModel) -> MethodTraffic:
    """ReLoRA adds nothing to what a step sends; at a merge owners send the frozen weights."""
    return MethodTraffic(swap=ring_bytes(model.frozen_bytes, model.world_size))


def _relora_work(spectral: SpectralConfig, model: PlannedModel) -> MethodWork:
    """A merge adds the product of the factors, 2 m n r FLOPs, to each base weight."""
    r = spectral.spectral_rank
    return MethodWork(swap_flops=model.largest_load(lambda shape: 2 * r * shape[0] * shape[1]))


LORA = MethodSpec(
    name="lora",
    title="LoRA",
    converts=True,
    keys=_KEYS,
    problems=rank_problems,
    filter_refusals=_REFUSED,
    tensor_parallel=False,
    layout_keys=_LAYOUT,
    kept_per_token=_kept_per_token,
    memory=_lora_memory,
    counted={"lora": {}},
    counted_by="spectral_rank",
)
RELORA = MethodSpec(
    name="relora",
    title="ReLoRA*",
    converts=True,
    keys=_KEYS
    | {
        "spectral.steps_per_iteration",
        "spectral.iteration_warmup_steps",
        "spectral.bank_device",
    },
    problems=rank_problems,
    filter_refusals=_REFUSED,
    tensor_parallel=False,
    layout_keys=_LAYOUT,
    swaps=True,
    kept_per_token=_kept_per_token,
    memory=_relora_memory,
    traffic=_relora_traffic,
    work=_relora_work,
)
