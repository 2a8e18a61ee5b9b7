"""When triplets swap and matrices are decomposed again: pure arithmetic on applied steps."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SpectralSchedule:
    """A run is rounds x T2 iterations x T3 steps."""

    steps_per_iteration: int
    """T3, optimizer steps between swaps."""
    iterations_per_round: int
    """T2, iterations between re-decompositions."""
    warmup_steps: int
    """Steps of the learning-rate ramp after each swap."""

    def is_swap(self, applied_steps: int) -> bool:
        """True if a swap follows the applied step of that count."""
        return applied_steps > 0 and applied_steps % self.steps_per_iteration == 0

    def iteration(self, applied_steps: int) -> int:
        """Iterations completed after that many applied steps."""
        return applied_steps // self.steps_per_iteration

    def position(self, iteration: int, offset: int = 0) -> tuple[int, int]:
        """(round, iteration within the round) of a matrix whose rounds are shifted by `offset`."""
        return divmod(iteration + offset, self.iterations_per_round)

    def starts_round(self, iteration: int, offset: int = 0) -> bool:
        """True if the matrix is decomposed again before `iteration` begins."""
        return iteration > 0 and self.position(iteration, offset)[1] == 0

    def ramp(self, applied_steps: int) -> float:
        """Factor on the spectral learning rates of the next step: up to 1 linearly after a swap."""
        done = applied_steps % self.steps_per_iteration
        return 1.0 if self.warmup_steps == 0 else min(1.0, (done + 1) / self.warmup_steps)
