"""One cast of an input that several layers read, such as q, k and v, and one product with all v.

The first of the layers that is called fills a buffer with the cast input and, in one product with
the stacked v, with what each of them needs beside it:

    [x | x v_q | x v_k | x v_v]

The others take the buffer if they are given the very same tensor; else another one is filled. So
who is called when decides on the cost alone. Parameters stay as they are.

Shape suffixes: T tokens, O out_features, I in_features, R trained triplets, S those of all members.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_scale.config.families import FAMILIES
from spectral_scale.methods.sst.casts import CastCache, CastFactors, Factors

READS = {
    linear.name: linear.reads
    for family in FAMILIES.values()
    for linear in family.linears
    if linear.kind == "column"
}
"""Last name of a linear -> what it reads; siblings that read the same have one input."""


def with_one_input(names: Sequence[str]) -> list[list[str]]:
    """Dotted names of linears, grouped by the input that they read; groups of one are left out."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if leaf in READS:
            groups.setdefault((parent, READS[leaf]), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


@dataclass(frozen=True, kw_only=True)
class JointInput:
    """The buffer, as one of the layers sees it."""

    buffer_TK: Tensor
    """[x | x v of each layer], K = I + S."""
    before: int
    """Columns between x and this layer's x v."""
    zeros_OS: Tensor
    """Takes the place of u in those columns."""

    def operands(self, residual_OI: Tensor, u_sigma_OR: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's x v, and what the buffer up to its end is multiplied with for the output."""
        (rows, width), rank = residual_OI.shape, u_sigma_OR.shape[1]
        begin = width + self.before
        parts = [residual_OI, self.zeros_OS[:rows, : self.before], u_sigma_OR]
        return self.buffer_TK[:, begin : begin + rank], torch.cat(parts, 1)


class SharedInput:
    """The buffer that layers with one input fill for each other.

    Args:
        members: what gives each layer's present factors, and its cast ones.
    """

    def __init__(self, members: Sequence[tuple[Callable[[], Factors], CastCache]]) -> None:
        self._members = members
        self._x: Tensor | None = None
        self._version = 0
        self._buffer: Tensor | None = None
        self._waiting: set[int] = set()
        self._cast: list[CastFactors] = []
        self._v_IS: Tensor | None = None
        self._zeros: Tensor | None = None

    def take(self, place: int, x: Tensor, dtype: torch.dtype) -> JointInput | None:
        """The buffer of x (..., in) for the layer at `place`; the last to take it leaves nothing.

        None where cast factors may not be kept.
        """
        if x.is_inference():  # it has no version
            return None
        if not self._holds(x, dtype) or place not in self._waiting:
            self._fill(x, dtype)
        buffer = self._buffer
        if buffer is None:
            return None
        self._waiting.discard(place)
        if not self._waiting:
            self._x = self._buffer = None
        before = sum(cast.v_IR.shape[1] for cast in self._cast[:place])
        return JointInput(buffer_TK=buffer, before=before, zeros_OS=self._padding(buffer))

    def clear(self) -> None:
        """Forget the buffer and cast factors."""
        self._x = self._buffer = self._v_IS = None
        self._cast = []

    def _holds(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether the buffer is of this tensor, as it is now."""
        if self._x is not x or self._buffer is None:
            return False
        return self._version == x._version and self._buffer.dtype == dtype

    @torch.no_grad()
    def _fill(self, x: Tensor, dtype: torch.dtype) -> None:
        """Cast x and multiply it; there is no buffer where cast factors may not be kept."""
        found = [cache.get(factors(), dtype) for factors, cache in self._members]
        cast = [factors for factors in found if factors is not None]
        self._x = self._buffer = None
        if len(cast) < len(found):
            return
        x_TI = x.detach().reshape(-1, x.shape[-1])
        v_IS, width = self._stack(cast), x_TI.shape[1]
        buffer = x_TI.new_empty((x_TI.shape[0], width + v_IS.shape[1]), dtype=dtype)
        buffer[:, :width].copy_(x_TI)
        torch.mm(buffer[:, :width], v_IS, out=buffer[:, width:])
        self._x, self._version, self._buffer = x, x._version, buffer
        self._waiting = set(range(len(self._members)))

    def _stack(self, cast: list[CastFactors]) -> Tensor:
        """v of all layers side by side (I, S), kept as long as the factors that it was made of."""
        known = len(self._cast) == len(cast)
        known = known and all(a is b for a, b in zip(self._cast, cast, strict=True))
        if self._v_IS is None or not known:
            self._cast, self._v_IS = cast, torch.cat([factors.v_IR for factors in cast], 1)
        return self._v_IS

    def _padding(self, like: Tensor) -> Tensor:
        """Zeros for all layers, made once."""
        rows = max(cast.u_OR.shape[0] for cast in self._cast)
        shape = rows, sum(cast.v_IR.shape[1] for cast in self._cast)
        known = self._zeros
        if known is None or (known.dtype, known.device) != (like.dtype, like.device):
            self._zeros = known = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return known


@dataclass(frozen=True)
class InputMember:
    """A layer's place among those that share an input."""

    shared: SharedInput
    place: int

    def take(self, x: Tensor, dtype: torch.dtype) -> JointInput | None:
        """See `SharedInput.take`."""
        return self.shared.take(self.place, x, dtype)
