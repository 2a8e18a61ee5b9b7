"""The settings of what watches over a run and measures it: `health` and `metrics`. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Checks for steps that must not be applied, replicas that diverge, and ranks that hang."""

    skip: bool = True
    """Skip a step, on all ranks together, if its loss or gradient is not finite or is a spike."""
    spike_sigmas: float = 0.0
    """A loss or gradient norm this many standard deviations above the mean of the last healthy
    steps is a spike. 0: skip only steps that are not finite."""
    spike_window: int = 128
    """Number of healthy steps in that mean. At least a quarter of them are needed to detect a
    spike."""
    rollback_after: int = 3
    """Return to the last checkpoint after this many consecutive skipped steps, and pass over the
    data read since. 0 disables."""
    max_rollbacks: int = 2
    """End the run with an error when more rollbacks than this are needed without a new checkpoint
    in between."""
    replica_interval: int = 500
    """Number of steps between bitwise comparisons of everything that several ranks hold. 0
    disables."""
    hang_timeout_seconds: float = 45.0
    """End the run with stack traces when a rank is silent for this long, or when a step takes ten
    times as long as the longest so far and at least this long. 0 disables."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is measured, and where the measurements go."""

    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    log_interval: int = 10
    """Number of steps between logged lines."""
    progress: bool = True
    """Show a progress bar on a terminal."""
    report: bool = True
    """Draw report.html when the run completes; `spectral-scale report` draws it at any time."""
