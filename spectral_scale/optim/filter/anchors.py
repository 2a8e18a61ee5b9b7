"""Anchors: the parameter values relative to which the joint loss measures change."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from spectral_scale.parallel.chunks import ReadTensor, TensorChunk, range_chunks, read_range
from spectral_scale.parallel.flat_shards import ParameterShards, is_first_holder


class Anchors:
    """Full-precision values of this rank's shards at the anchor, sharded as the backend does it.

    Args:
        shards: where the values are.
        fqns: parameters to copy, as they are now.
    """

    def __init__(self, shards: ParameterShards, fqns: Iterable[str]) -> None:
        self._shards = shards
        self._kept: dict[str, Tensor] = {}
        self.renew(fqns)

    def renew(self, fqns: Iterable[str]) -> None:
        """Count the change of these parameters from now on."""
        self._kept |= {fqn: self._shards.value(fqn).clone() for fqn in fqns}

    def change(self, fqn: str) -> Tensor:
        """Value minus anchor of this rank's shard, 1-D."""
        return self._shards.value(fqn) - self._kept[fqn]

    def state_chunks(self, *, own: bool) -> Iterator[TensorChunk]:
        """The anchors of this rank's shards: all, or those that no earlier rank holds as well."""
        for fqn, kept in self._kept.items():
            if own or is_first_holder(self._shards, fqn):
                order = self._shards.order(fqn)
                yield from range_chunks(f"filter/anchor/{fqn}", kept, self._start(fqn), order)

    def load_state(self, read: ReadTensor) -> None:
        """Overwrite the anchors from a checkpoint."""
        for fqn, kept in self._kept.items():
            name, order = f"filter/anchor/{fqn}", self._shards.order(fqn)
            kept.copy_(read_range(read, name, self._start(fqn), kept.numel(), order))

    @property
    def nbytes(self) -> int:
        """Bytes kept on this rank."""
        return sum(kept.nbytes for kept in self._kept.values())

    def _start(self, fqn: str) -> int:
        return self._shards.ranges(fqn)[self._shards.group.index][0]
