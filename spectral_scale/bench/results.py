"""What `bench step` reports."""

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
        """Of a sample of at least one value."""
        several = len(sample) > 1
        lower, middle, upper = quantiles(sample, n=4, method="inclusive") if several else sample * 3
        return cls(median=middle, lower_quartile=lower, upper_quartile=upper)


@dataclass(frozen=True, kw_only=True)
class SwapTimes:
    """Cost of swapping triplets, and a step's share of it."""

    swap_seconds: float
    """Commit, draw, rebuild and install all matrices, without decomposition; median."""
    redecompose_seconds: float
    """The same when every matrix ends its round and is decomposed again; measured once."""
    iterations_per_round: int
    """T2: one boundary in so many ends a round."""
    amortised_seconds: float
    """Both kinds, spread over the steps between: swap / T3 + (redecompose - swap) / (T3 T2)."""
    share_of_step: float
    """amortised_seconds over the median step seconds."""
    cpu_share_of_step: float
    """The same of processor seconds, which other processes disturb less."""


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """One method's step."""

    variant: Variant
    step_seconds: Spread
    """Forward, backward, optimizer; no boundary."""
    phase_seconds: dict[str, Spread]
    """forward, backward, optimizer (clipping and retraction included)."""
    cpu_seconds: Spread
    """Processor time of this process a step: disturbed less by others than wall time."""
    step_ratio: Spread
    """Step seconds over those of the dense step of the same round."""
    cpu_ratio: Spread
    """The same of processor seconds."""
    state_bytes: dict[str, int]
    """Counted by use: weights, gradients, moments, bank."""
    formula_bytes: dict[str, int]
    """By formula, likewise."""
    boundary: SwapTimes | None
    """None for dense training."""


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """The whole measurement."""

    machine: Machine
    settings: StepSettings
    blocks: int
    """Transformer blocks measured."""
    load_average_at_start: float
    load_average_at_end: float
    """This process included."""
    other_processors_busy: float
    """By other processes, on average while steps were timed."""
    warning: str | None
    """Set if other processes disturbed the measurement."""
    results: list[VariantResult]
