"""Learning-rate schedules as pure functions of the step."""

import math

from spectral_scale.config.schema import OptimizerConfig


def lr_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Factor on every group's peak learning rate in optimizer step `step` (0-based)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.min_lr_ratio
    if config.schedule == "constant":
        return 1.0
    span = max(1, total_steps - config.warmup_steps)
    if config.schedule == "wsd":
        decay = max(1, total_steps // 10) if config.decay_steps == "auto" else config.decay_steps
        decay = min(decay, span)  # never begin before warm-up has ended: the rate would jump
        progress = (step + 1 - (total_steps - decay)) / decay
        return 1.0 - (1.0 - floor) * min(1.0, max(0.0, progress))
    progress = min(1.0, (step + 1 - config.warmup_steps) / span)
    linear = config.schedule == "linear"
    shape = 1.0 - progress if linear else 0.5 + 0.5 * math.cos(math.pi * progress)
    return floor + (1.0 - floor) * shape
