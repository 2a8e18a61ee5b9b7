"""A group's gradient as a matrix of nodes by features, read and written block by block.

Blocks are narrow enough to stay in the processor's cache, so that a filter passes over the memory
of a gradient once, and no second gradient exists.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

BLOCK_ELEMENTS = {"cpu": 1 << 18}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 24


class Signal(Protocol):
    """n nodes by d features; features are counted from 0 in this rank's range."""

    num_nodes: int
    num_units: int
    """Slices, of one or more features each, between which blocks begin and end."""
    unit: int
    """Number of features in a unit."""

    def read(self, start: int, stop: int) -> Tensor:
        """Units [start, stop) of all nodes as (n, (stop - start) * unit), float32 or float64."""

    def write(self, start: int, stop: int, block: Tensor) -> None:
        """Overwrite units from `start` on with the given values."""

    def sample(self, index: Tensor) -> Tensor:
        """Features `index` (q,) of all nodes, (n, q), float32 or float64."""


class StackedSignal:
    """A signal with one flat tensor a node, such as the matrices of different layers."""

    unit = 1

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self.num_nodes, self.num_units = len(tensors), tensors[0].numel()

    def read(self, start: int, stop: int) -> Tensor:
        """Stack a range of every tensor."""
        return _wide(torch.stack([tensor[start:stop] for tensor in self._tensors]))

    def write(self, start: int, stop: int, block: Tensor) -> None:
        """Copy each row back to its tensor."""
        for tensor, row in zip(self._tensors, block, strict=True):
            tensor[start:stop].copy_(row)

    def sample(self, index: Tensor) -> Tensor:
        """Read the given entries of every tensor."""
        return _wide(torch.stack([tensor[index] for tensor in self._tensors]))


class BlockedSignal:
    """A signal whose nodes lie inside one flat tensor, viewed as (before, nodes, after)."""

    def __init__(self, flat: Tensor, shape: tuple[int, int, int]) -> None:
        before, self.num_nodes, after = shape
        self._cube = flat.view(shape).movedim(1, 0)  # (nodes, before, after)
        self.num_units, self.unit = (after, 1) if before == 1 else (before, after)
        self._axis = 2 if before == 1 else 1

    def read(self, start: int, stop: int) -> Tensor:
        """A slice of every node, made contiguous."""
        tensor = self._cube.narrow(self._axis, start, stop - start)
        return _wide(tensor.reshape(self.num_nodes, -1))

    def write(self, start: int, stop: int, block: Tensor) -> None:
        """Write a slice back to every node."""
        tensor = self._cube.narrow(self._axis, start, stop - start)
        tensor.copy_(block.view(tensor.shape))

    def sample(self, index: Tensor) -> Tensor:
        """Read entries of every node; feature f is entry f % after of slice f // after."""
        after = self._cube.shape[2]
        return _wide(self._cube[:, index // after, index % after])


def blocks(signal: Signal, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of units that fit into the cache together with their filtered copies."""
    elements = BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS_ELSEWHERE)
    width = max(1, elements // (signal.num_nodes * signal.unit))
    for start in range(0, signal.num_units, width):
        yield start, min(start + width, signal.num_units)


def _wide(block: Tensor) -> Tensor:
    """The block in at least single precision, contiguous."""
    return block.to(torch.promote_types(block.dtype, torch.float32)).contiguous()
