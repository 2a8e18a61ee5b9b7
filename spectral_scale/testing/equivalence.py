"""How far a run on several ranks is from the same run in one process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Distance:
    """What differs between two results of `train_tiny`."""

    loss: float
    """Largest difference of a step's loss."""
    weights: float
    """Largest difference of a weight, those of converted layers as the matrix they stand for."""
    factors: float
    """Largest difference of any trained tensor. A re-SVD may turn a rounding error into another
    sign or basis of the same matrix: small in double precision only, and so are the moments."""
    moments: float
    """Largest difference of Adam's moments, relative to the largest entry of each tensor."""
    steps_equal: bool
    """Whether Adam's step counts agree."""
    indices_equal: bool
    """Whether the same triplets train, in every matrix."""


def distance(ranks: Sequence[Mapping[str, Any]], alone: Mapping[str, Any]) -> Distance:
    """Compare the results of all ranks, put together, with those of one process.

    Raises ValueError if they hold different steps or tensors, or if shards are missing.
    """
    losses, expected = ranks[0]["losses"], alone["losses"]
    found, reference = assemble(ranks), assemble([alone])
    if losses.keys() != expected.keys() or found.keys() != reference.keys():
        different = sorted(found.keys() ^ reference.keys())
        raise ValueError(f"different steps or tensors: {different[:5]}")
    trained = {k for k in found if k.startswith("model/")}
    moments = {k for k in found if k.endswith(("/exp_avg", "/exp_avg_sq", "/momentum_buffer"))}
    gaps = {k: _gap(found[k], reference[k]) for k in found}
    weights, expected_weights = dense_weights(found), dense_weights(reference)
    scale = {k: max(float(np.abs(reference[k]).max()), 1e-30) for k in moments}
    return Distance(
        loss=max(abs(losses[s] - expected[s]) for s in losses),
        weights=max(_gap(weights[k], expected_weights[k]) for k in weights if not _is_flat(k)),
        factors=max(gaps[k] for k in trained if not _is_flat(k)),
        moments=max((gaps[k] / scale[k] for k in moments if not _is_flat(k)), default=0.0),
        steps_equal=not any(g for k, g in gaps.items() if k.endswith("/step")),
        indices_equal=not any(g for k, g in gaps.items() if k.endswith("/active")),
    )


def dense_weights(tensors: Tensors) -> Tensors:
    """Weights by checkpoint name, those of converted layers as the matrix that they stand for."""
    result = {k: v for k, v in tensors.items() if k.startswith("model/")}
    for key in [k for k in tensors if k.startswith("bank/") and k.endswith("/u")]:
        entry = key.removesuffix("/u")
        layer = "model/" + entry.removeprefix("bank/")
        u, sigma, v = (tensors[f"{entry}/{leaf}"].copy() for leaf in ("u", "sigma", "v"))
        active = tensors[f"{entry}/active"]
        u[:, active], v[:, active] = result.pop(f"{layer}.u"), result.pop(f"{layer}.v")
        trained = result.pop(f"{layer}.sigma")
        idle = np.setdiff1d(np.arange(sigma.size), active)
        order = np.concatenate([active, idle])[: trained.size]
        sigma[order] = trained
        result[f"{layer}.weight"] = (u * sigma) @ v.T
    return result


def assemble(ranks: Sequence[Mapping[str, Any]]) -> Tensors:
    """Logical tensors from the shards (`name@offset`) that ranks hold; frozen ones left out.

    Raises ValueError if an element is held by no rank, or by two.
    """
    shards: dict[str, dict[tuple[int, ...], NDArray[Any]]] = {}
    for rank in ranks:
        for key, value in rank["tensors"].items():
            name, at, offset = key.partition("@")
            start = tuple(map(int, offset.split(","))) if at else (0,) * value.ndim
            if not name.startswith("frozen/") and value.size:
                if start in shards.setdefault(name, {}):
                    raise ValueError(f"{key} is held by two ranks")
                shards[name][start] = value
    return {name: _join(name, found) for name, found in shards.items()}


def _join(name: str, shards: Mapping[tuple[int, ...], NDArray[Any]]) -> NDArray[Any]:
    ends = [
        tuple(o + n for o, n in zip(start, p.shape, strict=True)) for start, p in shards.items()
    ]
    result = np.zeros(tuple(map(max, *ends, ends[0])), next(iter(shards.values())).dtype)
    for start, shard in shards.items():
        result[tuple(slice(o, o + n) for o, n in zip(start, shard.shape, strict=True))] = shard
    if sum(shard.size for shard in shards.values()) != result.size:
        raise ValueError(f"the shards of {name} do not cover it")
    return result


def _gap(found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"shapes {found.shape} and {expected.shape} differ")
    return float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())


def _is_flat(name: str) -> bool:
    """A shift of all keys leaves attention unchanged: their bias has no gradient but rounding,
    which Adam blows up to full steps."""
    return "k_proj.bias" in name
