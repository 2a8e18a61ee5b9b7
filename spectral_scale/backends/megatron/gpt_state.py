"""Weights and moments between transformers' names and the Megatron parameters of a rank."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from spectral_scale.backends.megatron.gpt_weights import MegatronWeight, WeightMap, logical_shapes
from spectral_scale.errors import ConfigError
from spectral_scale.parallel.chunks import ReadTensor, TensorChunk
from spectral_scale.parallel.shard_geometry import Rectangle, Shape, tiling_fault


def read_parameter(weight: MegatronWeight, read: ReadTensor, *, name: str = "{fqn}") -> Tensor:
    """This rank's parameter (or moment) put together from logical tensors; padding is zero.

    Args:
        weight: what to read.
        read: reads a rectangle of a logical tensor.
        name: what that calls it, e.g. `optimizer/{fqn}/exp_avg`.
    """
    result: Tensor | None = None
    for region in weight.regions:
        box = region.logical
        value = read(name.format(fqn=region.fqn), offset=box.offset, shape=box.shape)
        if tuple(value.shape) != box.shape:
            raise ConfigError(
                f"{region.fqn}: elements of shape {tuple(value.shape)} were read where {box.shape} "
                "were asked for; the weights belong to another model"
            )
        if result is None:
            result = value.new_zeros(weight.shape)
        result[_index(region.local)] = value
    if result is None:
        raise ConfigError("a rank without a token of the vocabulary; use fewer ranks")
    return result


def parameter_chunks(
    weight: MegatronWeight, tensor: Tensor, *, name: str = "{fqn}"
) -> Iterator[TensorChunk]:
    """The rectangles of logical tensors in a parameter (or moment) of this shape, as views.

    Exactly one rank may write those of a replicated parameter.
    """
    if tuple(tensor.shape) != weight.shape:
        raise ConfigError(f"{name}: shape {tuple(tensor.shape)}, the map has {weight.shape}")
    for region in weight.regions:
        yield TensorChunk(
            name.format(fqn=region.fqn),
            tensor.detach()[_index(region.local)],
            region.global_shape,
            region.logical.offset,
        )


def to_megatron(weights: WeightMap, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One rank's GPTModel state from a whole transformers state dict.

    Raises ConfigError unless the state holds each logical tensor, in its shape.
    """
    for fqn, shape in logical_shapes(weights).items():
        if fqn not in state or tuple(state[fqn].shape) != shape:
            found = tuple(state[fqn].shape) if fqn in state else "nothing"
            raise ConfigError(f"{fqn} of shape {shape} is needed, {found} was given")
    read = state_reader(state)
    return {name: read_parameter(weight, read) for name, weight in weights.items()}


@torch.no_grad()
def load_weights(model: nn.Module, weights: WeightMap, read: ReadTensor) -> int:
    """Overwrite every parameter of a GPTModel from logical tensors, in place; their number.

    Raises ConfigError unless model and map have the same parameters, in the same shapes.
    """
    parameters = dict(model.named_parameters())
    if different := sorted(parameters.keys() ^ weights.keys()):
        raise ConfigError(
            f"{len(different)} parameters of the model and the map have no counterpart: "
            f"{different[:5]}; build the model with build_gpt_model from the same settings"
        )
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != weights[name].shape:
            raise ConfigError(
                f"{name} has shape {tuple(parameter.shape)}, the map {weights[name].shape}; build "
                "both for the same number of tensor-parallel ranks"
            )
        parameter.copy_(read_parameter(weights[name], read))
    return len(parameters)


def state_reader(state: Mapping[str, Tensor]) -> ReadTensor:
    """Reads rectangles of the tensors of a whole transformers state dict."""

    def read(name: str, offset: Shape | None = None, shape: Shape | None = None) -> Tensor:
        if name not in state:
            raise ConfigError(f"the weights hold no {name}; give the whole state dict")
        if offset is None or shape is None:
            return state[name]
        return state[name][_index(Rectangle(offset, shape))]

    return read


def to_transformers(
    ranks: Sequence[tuple[WeightMap, Mapping[str, Tensor]]],
) -> dict[str, Tensor]:
    """The transformers state dict from the states of all tensor-parallel ranks, in their order.

    Raises ConfigError if parameters are missing or ranks do not make up whole tensors.
    """
    chunks: dict[str, list[TensorChunk]] = {}
    for index, (weights, state) in enumerate(ranks):
        if missing := sorted(weights.keys() - state.keys()):
            raise ConfigError(f"rank {index} lacks {missing[:5]}; give each rank's whole state")
        for name, weight in weights.items():
            if index == 0 or not weight.replicated:
                for chunk in parameter_chunks(weight, state[name]):
                    chunks.setdefault(chunk.name, []).append(chunk)
    return {fqn: _join(fqn, found) for fqn, found in chunks.items()}


def _join(fqn: str, chunks: list[TensorChunk]) -> Tensor:
    shape = chunks[0].global_shape
    if fault := tiling_fault([c.rectangle for c in chunks], shape):
        raise ConfigError(f"{fqn}: {fault}; give the states of all ranks, each once")
    result = chunks[0].tensor.new_empty(shape)
    for chunk in chunks:
        result[_index(chunk.rectangle)] = chunk.tensor
    return result


def _index(box: Rectangle) -> tuple[slice, ...]:
    return tuple(map(slice, box.offset, box.end))
