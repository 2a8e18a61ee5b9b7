"""The gradient norm of what a method trains, around the boundaries of its iterations."""

from study.results import Result

TRAINED_KINDS = ("low_rank", "spectral_direction")
"""Factors of LoRA-like methods; directions of SST."""
DIP_WINDOW = 10
"""Steps before a boundary that the norm after it is held against, and steps after it."""


def trained_norms(result: Result) -> list[float]:
    """Norm in each step, from the first on, of the factors or directions. Empty if unknown."""
    found = [norms for kind, norms in result.gradient_norms.items() if kind in TRAINED_KINDS]
    return found[0] if len(found) == 1 else []


def boundaries(result: Result) -> list[int]:
    """Steps after which the factors were merged or swapped, each followed by a whole window."""
    period, last = result.settings["spectral.steps_per_iteration"], len(trained_norms(result))
    return list(range(period, last - DIP_WINDOW + 1, period))


def dip_ratios(result: Result | None) -> tuple[list[float], list[float]] | None:
    """At each boundary, over the mean norm of the window before it: the norm in the first step
    after it, and the mean of the window after it. None without boundaries."""
    if result is None or not boundaries(result):
        return None
    norms = trained_norms(result)
    first, window = [], []
    for step in boundaries(result):
        before = _mean(norms[step - DIP_WINDOW : step])
        first.append(norms[step] / before)
        window.append(_mean(norms[step : step + DIP_WINDOW]) / before)
    return first, window


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
