"""Whole messages of collectives, and what they cost a rank's links."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Bytes of whole messages, by collective operation."""

    all_gather: float = 0
    reduce_scatter: float = 0
    all_reduce: float = 0

    def __add__(self, other: "Payload") -> "Payload":
        return Payload(
            all_gather=self.all_gather + other.all_gather,
            reduce_scatter=self.reduce_scatter + other.reduce_scatter,
            all_reduce=self.all_reduce + other.all_reduce,
        )

    def __mul__(self, times: float) -> "Payload":
        return Payload(
            all_gather=times * self.all_gather,
            reduce_scatter=times * self.reduce_scatter,
            all_reduce=times * self.all_reduce,
        )

    def ring_bytes(self, ranks: int) -> float:
        """Bytes over each rank's links.

        A message of B bytes costs (N - 1) / N B in an all-gather or a reduce-scatter, and twice
        that in an all-reduce (Thakur et al. 2005, section 4).
        """
        moved = self.all_gather + self.reduce_scatter + 2 * self.all_reduce
        return moved * (ranks - 1) / ranks
