"""The results that `bench step` reports."""

from dataclasses import dataclass
from statistics import quantiles

from spectral_scale.bench.machine import Machine
from spectral_scale.bench.settings import StepSettings, Variant


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A sample's median and quartiles."""

    median: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, sample: list[float]) -> "Spread":
        """Median and quartiles of a sample of at least one value."""
        several = len(sample) > 1
        lower, middle, upper = quantiles(sample, n=4, method="inclusive") if several else sample * 3
        return cls(median=middle, lower_quartile=lower, upper_quartile=upper)


@dataclass(frozen=True, kw_only=True)
class SwapTimes:
    """Cost of swapping triplets, and what that adds to a step."""

    swap_seconds: float
    """Median seconds of a swap of all matrices without decomposition: commit, draw, rebuild and
    broadcast."""
    redecompose_seconds: float
    """Seconds of a swap at which every matrix ends its round and is decomposed again; measured
    once."""
    iterations_per_round: int
    """T2: the number of swaps in a round, of which the last decomposes again."""
    amortised_seconds: float
    """Seconds of both kinds of swap, spread over the steps between:
    swap / T3 + (redecompose - swap) / (T3 T2)."""
    share_of_step: float
    """amortised_seconds over the median step seconds."""
    cpu_share_of_step: float
    """Processor seconds of swaps over those of a step; other processes disturb them less."""


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """One method's step."""

    variant: Variant
    step_seconds: Spread
    """Seconds of forward, backward and optimizer, without a swap."""
    phase_seconds: dict[str, Spread]
    """forward, backward, optimizer (clipping and retraction included)."""
    cpu_seconds: Spread
    """Processor time of this process a step: disturbed less by others than wall time."""
    step_ratio: Spread
    """Step seconds over those of the dense step of the same round."""
    cpu_ratio: Spread
    """Processor seconds over those of the dense step of the same round."""
    state_bytes: dict[str, int]
    """Counted by use: weights, gradients, moments, bank."""
    formula_bytes: dict[str, int]
    """Bytes of the same uses as in `state_bytes`, by formula."""
    boundary: SwapTimes | None
    """Times of its swaps; None for dense training."""


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """The whole measurement."""

    machine: Machine
    settings: StepSettings
    blocks: int
    """Transformer blocks measured."""
    load_average_at_start: float
    load_average_at_end: float
    """Load average of the machine after the measurement, to which this process adds."""
    other_processors_busy: float
    """Processors that other processes used, on average while steps were timed."""
    warning: str | None
    """Set if other processes disturbed the measurement."""
    results: list[VariantResult]
