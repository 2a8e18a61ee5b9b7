"""Dense linears to the layers of any method and back; what was touched is returned and counted."""

import fnmatch
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import nn

from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.layer import FactoredLinear, factored_layers
from spectral_scale.parallel.dtensor_collectives import is_sharded

logger = logging.getLogger(__name__)

Layer = TypeVar("Layer", bound=FactoredLinear)
_LISTED = 6


def replace_linears(
    model: nn.Module,
    spectral_rank: int,
    make: Callable[[nn.Linear], Layer],
    *,
    targets: Sequence[str] | None = None,
) -> dict[str, Layer]:
    """Put `make(linear)` in the place of every targeted linear; return the new layers by fqn.

    The bias moves over, and a real (not meta) dense weight waits as `initial_weight`.

    Args:
        model: converted in place.
        spectral_rank: the smallest side that a linear may have.
        make: the layer of a method for a dense one, with its sizes, device and dtype.
        targets: see `find_targets`.

    Raises ConfigError as `find_targets` does, and for a linear that is smaller than the rank,
    before anything is changed.
    """
    names = find_targets(model, targets)
    kinds = {name: type(model.get_submodule(name)) for name in names}
    linears = {name: _as_linear(model.get_submodule(name)) for name in names}
    for name, linear in linears.items():
        _check_rank(name, linear.weight, spectral_rank)
    converted = {}
    for name, linear in linears.items():
        layer = make(linear)
        if linear.bias is not None:
            layer.bias = linear.bias
        if not linear.weight.is_meta:
            layer.initial_weight = linear.weight.detach()
        layer.dense_kind = kinds[name]
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, layer)
        converted[name] = layer
    _say_what_stays_dense(model, converted, chosen=targets is not None)
    return converted


def _say_what_stays_dense(
    model: nn.Module, converted: Mapping[str, FactoredLinear], *, chosen: bool
) -> None:
    """Log the matrices inside numbered blocks that no converted layer holds, and their fraction.

    Weights of other modules (the experts of a mixture in one 3-D parameter) would otherwise stay
    dense without a word. A warning if they are the larger part and nobody
    chose the layers by name.
    """
    dense = dense_block_weights(model, converted)
    left = sum(dense.values())
    taken = sum(layer.in_features * layer.out_features for layer in converted.values())
    if not left:
        return
    names = sorted(dense, key=lambda name: -dense[name])
    listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    fraction = left / (left + taken)
    level = logging.WARNING if fraction > 0.5 and not chosen else logging.INFO
    logger.log(
        level,
        "%.0f %% of the blocks' matrix weights stay dense (%d of %d): %s",
        100 * fraction,
        left,
        left + taken,
        listed,
    )


def dense_block_weights(
    model: nn.Module, converted: Mapping[str, FactoredLinear]
) -> dict[str, int]:
    """Elements of the dense matrices inside numbered blocks, by name; numbers in names as `*`."""
    found: dict[str, int] = {}
    for fqn, parameter in model.named_parameters():
        parts = fqn.split(".")
        in_block = any(part.isdigit() for part in parts)
        if not in_block or parameter.ndim < 2 or ".".join(parts[:-1]) in converted:
            continue
        name = ".".join("*" if part.isdigit() else part for part in parts)
        found[name] = found.get(name, 0) + parameter.numel()
    return found


def freeze_dense(model: nn.Module, frozen_dtype: torch.dtype, *, also: Sequence[str] = ()) -> int:
    """Freeze all parameters but the factors of converted layers, in place; returns their number.

    Parameters of a module that `also` names, by its last name, train on. Raises ConfigError for a
    name that no module with parameters has. Weights and biases of frozen linears take
    `frozen_dtype` unless they are tied to an embedding: products cast them to it anyway. Embeddings
    and norms stay in float32 at least.
    """
    kept = {
        id(getattr(layer, leaf))
        for layer in factored_layers(model).values()
        for leaf in layer.trained_shapes()
    }
    kept |= _parameters_of(model, also)
    modules = [m for m in model.modules() if isinstance(m, nn.Linear | FactoredLinear)]
    linear = {id(p) for module in modules for p in module.parameters(recurse=False)}
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    linear -= {id(p) for module in embeddings for p in module.parameters(recurse=False)}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in frozen:
        wide = torch.promote_types(frozen_dtype, torch.float32)
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(frozen_dtype if id(parameter) in linear else wide)
    logger.info("froze %d parameters that no method converts", len(frozen))
    return len(frozen)


def _parameters_of(model: nn.Module, names: Sequence[str]) -> set[int]:
    """Identities of all trained parameters in the modules of these last names.

    Raises ConfigError for a name without any.
    """
    found: set[int] = set()
    for wanted in names:
        modules = [m for n, m in model.named_modules() if n.rpartition(".")[2] == wanted]
        parameters = {id(p) for m in modules for p in m.parameters() if p.requires_grad}
        if not parameters:
            heads = [name for name, module in model.named_children()]
            raise ConfigError(
                f"spectral.train_also names {wanted}, which is no module with parameters to train; "
                f"the model's outermost modules are {heads}; correct it"
            )
        found |= parameters
    return found


@torch.no_grad()
def merge(model: nn.Module) -> int:
    """Make converted layers what they were, dense, in place; returns their number."""
    layers = factored_layers(model)
    for name, layer in layers.items():
        if layer.merged_by is not None:
            raise SpectralError(f"{name} is merged by {layer.merged_by}; call that instead")
        if not layer.ready:
            raise SpectralError(f"{name} cannot be merged: no controller gave it values")
        if any(map(is_sharded, layer.parameters())):
            raise SpectralError(
                f"{name} cannot be merged: its weights are sharded; save a checkpoint, load "
                "it into a model that is whole, and merge that"
            )
        dense = _dense_again(layer)
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, dense)
    return len(layers)


def _is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether modules of this kind are linears of GPT-2: their weight is stored as (in, out)."""
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def _as_linear(module: nn.Module) -> nn.Linear:
    """The linear itself, or one that equals a Conv1D and has its bias."""
    if type(module) is nn.Linear:
        return module
    weight_IO, bias = cast(nn.Parameter, module.weight), cast(nn.Parameter, module.bias)
    inputs, outputs = weight_IO.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(weight_IO.detach().t().contiguous())
    linear.bias = bias
    return linear


def _dense_again(layer: FactoredLinear) -> nn.Module:
    """A module of the kind that the layer was made of, with its present weight and bias."""
    weight, sizes = layer.effective_weight(), (layer.in_features, layer.out_features)
    if _is_conv1d(layer.dense_kind):
        with torch.device("meta"):
            dense = layer.dense_kind(*reversed(sizes))
        dense.weight = nn.Parameter(weight.t().contiguous())
    else:
        dense = nn.Linear(*sizes, bias=layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach())
    return dense


def find_targets(model: nn.Module, targets: Sequence[str] | None = None) -> list[str]:
    """Names of the linears that a method takes.

    Args:
        model: dense; nothing is changed.
        targets: fnmatch patterns of module names; None takes every nn.Linear, and every Conv1D of
            GPT-2, inside a numbered block (`...layers.3.fc1`), which leaves embeddings and output
            layers dense.

    Raises ConfigError if a pattern matches no linear, if there is none at all, or if a weight is
    tied to another parameter.
    """
    kinds = {name: type(module) for name, module in model.named_modules()}
    linears = [name for name, kind in kinds.items() if kind is nn.Linear or _is_conv1d(kind)]
    if targets is None:
        found = [name for name in linears if any(p.isdigit() for p in name.split("."))]
    else:
        for pattern in targets:
            if not fnmatch.filter(linears, pattern):
                raise ConfigError(f"target {pattern!r} matches no nn.Linear; there are: {linears}")
        found = [name for name in linears if any(fnmatch.fnmatch(name, t) for t in targets)]
    if not found:
        blocks = ", ".join(dense_block_weights(model, {})) or "none"
        raise ConfigError(
            "no linear layer to convert: no nn.Linear lies inside a numbered block; "
            f"name them with targets=[...]; the model's linears are: {linears}; the matrices of "
            f"its blocks, which belong to other kinds of modules, are: {blocks}"
        )
    _refuse_tied(model, found)
    return found


def _refuse_tied(model: nn.Module, names: Sequence[str]) -> None:
    holders: dict[int, list[str]] = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(fqn)
    for name in names:
        tied = holders[id(model.get_submodule(name).weight)]
        if len(tied) > 1:
            raise ConfigError(f"{name} shares its weight ({', '.join(tied)}); leave it dense")


def _check_rank(name: str, weight: torch.Tensor, spectral_rank: int) -> None:
    if spectral_rank > min(weight.shape):
        raise ConfigError(
            f"{name} is {weight.shape[0]} x {weight.shape[1]}: spectral_rank="
            f"{spectral_rank} exceeds {min(weight.shape)}; lower it"
        )
