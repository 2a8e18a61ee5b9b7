"""Runs with a spectral filter that several tests compare: settings, and what was measured."""

from collections.abc import Sequence
from typing import Any

SETTINGS: dict[str, Any] = {
    "model__num_layers": 3,
    "data__validation_sequences": 1,
    "optimizer__eps": 1e-5,  # above rounding, which Adam would blow up to full steps
    "optimizer__clip_grad_norm": 0.1,  # below most norms: the filter must come first
    "optimizer__spectral_lr": 1e-4,
    "spectral__steps_per_iteration": 2,  # a swap after 2
    "filter__kind": "rational",
    "filter__strength": 2.0,
}
"""Settings of `tiny_config` for a run with a filter."""
KNN = {"filter__graph": "knn", "filter__neighbors": 1, "filter__refresh_steps": 2}
JOINT = {"filter__joint_loss_mu": 0.1, "filter__anchor_steps": 2}

Lines = Sequence[tuple[int, dict[str, Any]]]
"""Steps and their metrics, as `train_tiny` gives them under `lines`."""


def compare_measures(
    found: Lines, expected: Lines, *, rel: float, abs_: float, energy_rel: float
) -> tuple[int, list[str]]:
    """How many of the filter's metrics two runs share, and those that differ, as text.

    Energies are compared by their sum: equal frequencies share theirs as rounding has it.
    """
    compared, different = 0, []
    for (step, line), (_, reference) in zip(found, expected, strict=True):
        for key in (key for key in reference if key.startswith("filter/")):
            compared += 1
            pairs: list[tuple[float, float, float, float]]
            if key.startswith("filter/energy"):
                pairs = [(sum(line[key]), sum(reference[key]), energy_rel, 1e-12)]
            else:
                pairs = [(a, b, rel, abs_) for a, b in _pairs(line[key], reference[key])]
            if not all(abs(a - b) <= max(r * abs(b), least) for a, b, r, least in pairs):
                different.append(f"{key} at step {step}: {line[key]}, not {reference[key]}")
    return compared, different


def _pairs(found: Any, expected: Any) -> list[tuple[float, float]]:
    if isinstance(expected, list):
        return list(zip(found, expected, strict=True))
    return [(found, expected)]
