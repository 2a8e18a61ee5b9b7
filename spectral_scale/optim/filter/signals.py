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
    """Features a unit."""

    def read(self, start: int, stop: int) -> Tensor:
        """Units [start, stop) of all nodes as (n, (stop - start) * unit), float32 or float64."""

    def write(self, start: int, stop: int, block: Tensor) -> None:
        """Overwrite units from `start` on with the given values."""

    def sample(self, index: Tensor) -> Tensor:
        """Features `index` (q,) of all nodes, (n, q), float32 or float64."""


class StackedSignal:
    """A signal with one flat tensor a node, such as the matrices of different layers."""

    unit = 1

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = parts
        self.num_nodes, self.num_units = len(parts), parts[0].numel()

    def read(self, start: int, stop: int) -> Tensor:
        """Stack a range of every part."""
        return _wide(torch.stack([part[start:stop] for part in self._parts]))

    def write(self, start: int, stop: int, block: Tensor) -> None:
        """Copy each row back to its part."""
        for part, row in zip(self._parts, block, strict=True):
            part[start:stop].copy_(row)

    def sample(self, index: Tensor) -> Tensor:
        """Read the given entries of every part."""
        return _wide(torch.stack([part[index] for part in self._parts]))


class BlockedSignal:
    """A signal whose nodes lie inside one flat tensor, viewed as (before, nodes, after)."""

    def __init__(self, flat: Tensor, shape: tuple[int, int, int]) -> None:
        before, self.num_nodes, after = shape
        self._cube = flat.view(shape).movedim(1, 0)  # (nodes, before, after)
        self.num_units, self.unit = (after, 1) if before == 1 else (before, after)
        self._axis = 2 if before == 1 else 1

    def read(self, start: int, stop: int) -> Tensor:
        """A slice of every node, made contiguous."""
        part = self._cube.narrow(self._axis, start, stop - start)
        return _wide(part.reshape(self.num_nodes, -1))

    def write(self, start: int, stop: int, block: Tensor) -> None:
        """Write a slice back to every node."""
        part = self._cube.narrow(self._axis, start, stop - start)
        part.copy_(block.view(part.shape))

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
