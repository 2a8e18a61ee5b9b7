"""A FRoD adapter as a folder: coefficients, bases and positions in safetensors, facts in JSON.

It is small, since frozen weights are left out; it belongs to the weights it was trained on, and
that is checked against their spectra before it is used.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spectral_scale.config.methods.frod import category_of
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import CheckpointError, ConfigError
from spectral_scale.files.json_text import parse_json
from spectral_scale.methods.frod.joint_decomposition import column_lengths
from spectral_scale.methods.frod.layer import FRoDLinear, convert_frod, frod_layers
from spectral_scale.methods.frod.product import CategoryBasis
from spectral_scale.methods.frod.sparsity import Pattern
from spectral_scale.parallel.dtensor_collectives import is_sharded

FACTS_NAME, TENSORS_NAME = "frod_adapter.json", "frod_adapter.safetensors"
FORMAT, FORMAT_VERSION = "spectral_scale.frod_adapter", 1
BASE_TOLERANCE = 0.02
"""Relative difference of 1 / lambda that bf16 rounding of a base may cause, and another base will
exceed."""


def save_adapter(model: nn.Module, folder: Path) -> int:
    """Write the FRoD layers' coefficients and bases into a folder; returns how many train.

    Raises ConfigError if the model holds no FRoD layer, and CheckpointError if weights are sharded
    or the folder cannot be written.
    """
    layers = frod_layers(model)
    if not layers:
        raise ConfigError("the model holds no FRoD layer, so there is no adapter to save")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        basis, inverse_lengths = layer.shared()
        if is_sharded(layer.mixing) or layer.mixing.numel() != layer.num_mixing:
            raise CheckpointError(
                f"{name} is sharded; save a checkpoint, load it into a whole model, and "
                "save the adapter of that"
            )
        tensors[f"{name}.mixing"] = layer.mixing
        tensors[f"{name}.value_delta"] = layer.value_delta
        tensors[f"{name}.inverse_lengths"] = inverse_lengths
        tensors[f"{basis.category}/v"] = basis.v
        tensors[f"{basis.category}/v_inverse_t"] = basis.v_inverse_t
        tensors[f"{basis.category}/positions"] = basis.pattern.positions
    facts = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "layers": {n: [m.out_features, m.in_features, m.num_mixing] for n, m in layers.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, folder / TENSORS_NAME
        )
        text = json.dumps(facts, indent=1) + "\n"
        (folder / FACTS_NAME).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the adapter cannot be written to {folder}: {error}") from error
    return sum(m.num_mixing + m.in_features for m in layers.values())


def load_adapter(model: nn.Module, folder: Path) -> dict[str, FRoDLinear]:
    """Put an adapter's FRoD layers in the place of a dense model's linears, in place.

    The linears' own weights become the frozen ones, in their own precision; the layers by name are
    returned. `merge(model)` makes them dense.

    Raises ConfigError for a folder that is no adapter, for one of another model (a name or shape is
    missing) or of other weights.
    """
    shapes = _read_facts(folder)
    tensors = _read_tensors(folder, shapes)
    linears = {name: _linear(model, name, shape, folder) for name, shape in shapes.items()}
    bases = _bases({category_of(name) for name in shapes}, tensors, linears)
    for name, linear in linears.items():
        _require_base(name, linear.weight, bases[category_of(name)], tensors, folder)
    convert_frod(model, SpectralConfig(method="frod"), targets=list(shapes))
    layers = frod_layers(model)
    for name in shapes:
        _fill(layers[name], name, bases[category_of(name)], tensors)
    return {name: layers[name] for name in shapes}


def _fill(
    layer: FRoDLinear, name: str, basis: CategoryBasis, tensors: Mapping[str, Tensor]
) -> None:
    device = layer.base.device
    mixing, value_delta, inverse_lengths = (
        tensors[f"{name}.{leaf}"].to(device)
        for leaf in ("mixing", "value_delta", "inverse_lengths")
    )
    if layer.initial_weight is not None:
        layer.base.data = layer.initial_weight
    layer.initial_weight = None
    layer.mixing, layer.value_delta = nn.Parameter(mixing), nn.Parameter(value_delta)
    layer.num_mixing = mixing.numel()
    layer.basis, layer.inverse_lengths, layer.ready = basis, inverse_lengths, True


def _bases(
    categories: set[str], tensors: dict[str, Tensor], linears: dict[str, nn.Linear]
) -> dict[str, CategoryBasis]:
    device = next(iter(linears.values())).weight.device
    return {
        category: CategoryBasis(
            category=category,
            v=tensors[f"{category}/v"].to(device),
            v_inverse_t=tensors[f"{category}/v_inverse_t"].to(device),
            pattern=Pattern(
                tensors[f"{category}/positions"].to(device), tensors[f"{category}/v"].shape[0]
            ),
        )
        for category in categories
    }


def _linear(model: nn.Module, name: str, shape: list[int], folder: Path) -> nn.Linear:
    found = dict(model.named_modules()).get(name)
    if type(found) is not nn.Linear or list(found.weight.shape) != shape[:2]:
        what = "nothing" if found is None else f"{found}"
        raise ConfigError(
            f"{folder} adapts {name}, a linear layer of {shape[0]} x {shape[1]}; the model has "
            f"{what} there; load it into the dense model it was trained on"
        )
    return found


def _require_base(
    name: str, weight: Tensor, basis: CategoryBasis, tensors: dict[str, Tensor], folder: Path
) -> None:
    """Raise ConfigError unless U of these weights has the unit columns that it had in training."""
    inverse = tensors[f"{name}.inverse_lengths"].to(weight.device).double()
    alive = inverse > 0
    units = (column_lengths(weight, basis.v_inverse_t) * inverse)[alive]
    gap = float((units - 1).abs().max()) if bool(alive.any()) else 0.0
    if not gap < BASE_TOLERANCE:
        raise ConfigError(
            f"{folder} was trained on other weights: the spectrum of {name} differs by "
            f"{gap:.2g} of its size; load it into the model it was trained on"
        )


def _read_facts(folder: Path) -> dict[str, list[int]]:
    try:
        facts: Any = parse_json((folder / FACTS_NAME).read_text(encoding="utf-8"))
        if (facts["format"], facts["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"it is not of format {FORMAT} {FORMAT_VERSION}")
        layers = {str(n): [int(size) for size in shape] for n, shape in facts["layers"].items()}
        if not layers or any(len(shape) != 3 for shape in layers.values()):
            raise ValueError("it names no layers, or not three sizes for each")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder} holds no FRoD adapter ({FACTS_NAME}: {error}); give a folder that "
            "save_adapter or `export --adapter` wrote"
        ) from None
    return layers


def _read_tensors(folder: Path, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """All tensors, checked: shapes as the facts say, finite values, positions inside S."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, (_, width, count) in shapes.items():
        category = category_of(name)
        expected |= {
            f"{name}.mixing": (count,),
            f"{name}.value_delta": (width,),
            f"{name}.inverse_lengths": (width,),
            f"{category}/v": (width, width),
            f"{category}/v_inverse_t": (width, width),
            f"{category}/positions": (2, count),
        }
    try:
        with safe_open(folder / TENSORS_NAME, framework="pt") as file:
            missing = sorted(set(expected) - set(file.keys()))
            tensors = {} if missing else {key: file.get_tensor(key) for key in expected}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder / TENSORS_NAME} cannot be read: {error}") from None
    if missing:
        raise ConfigError(f"{folder / TENSORS_NAME} lacks {missing[0]}; save the adapter again")
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != expected[key] or not _is_sound(key, tensor, tensors):
            raise ConfigError(
                f"{folder / TENSORS_NAME}: {key} has shape {tuple(tensor.shape)}, or entries that "
                f"are not finite or out of range; {expected[key]} is needed; save it again"
            )
    return tensors


def _is_sound(key: str, tensor: Tensor, tensors: dict[str, Tensor]) -> bool:
    if not key.endswith("/positions"):
        return tensor.is_floating_point() and bool(torch.isfinite(tensor).all())
    width = tensors[f"{key.removesuffix('/positions')}/v"].shape[0]
    order = tensor[1] * width + tensor[0]
    inside = bool((tensor >= 0).all()) and bool((tensor < width).all())
    return tensor.dtype == torch.int64 and inside and bool((order.diff() > 0).all())
