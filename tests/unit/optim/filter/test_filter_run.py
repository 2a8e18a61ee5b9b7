"""The filter in whole runs of one process: FRoD's coefficients, sigma at swaps, steps left out."""

from pathlib import Path
from typing import Any

import pytest

from spectral_scale.optim.filter.spectral_filter import SpectralFilter
from spectral_scale.testing.tiny import tiny_config, train_tiny

SETTINGS = {"train__eval_interval": 6, "train__steps": 6, "filter__kind": "rational"}


def run(corpus: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return train_tiny(tiny_config(corpus, folder, **(SETTINGS | changes)))


def test_coefficients_of_frod(corpus: Path, tmp_path: Path) -> None:
    """S and lambda have shared positions and bases, so that their layers can be filtered."""
    found = run(corpus, tmp_path, spectral__method="frod")
    last = found["lines"][-1][1]
    for kind in ("q_proj.mixing", "fc2.value_delta"):
        assert last[f"filter/removed/{kind}"] > 0


def test_sigma_is_anchored_again_at_every_swap(corpus: Path, tmp_path: Path) -> None:
    """Afterwards the singular values belong to other triplets: their change starts at nothing."""
    changes = {"spectral__steps_per_iteration": 3, "filter__joint_loss_mu": 0.1}
    lines = run(corpus, tmp_path, **changes)["lines"]
    pulled = {step: line["filter/joint_loss"] for step, line in lines if step}
    # Measured before the update: steps 1 and 4 follow the start and a swap.
    assert pulled[1] == pulled[4] == 0
    assert min(pulled[2], pulled[3], pulled[5], pulled[6]) > 0


def test_a_step_that_is_left_out_leaves_no_trace(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient is not finite, and must not enter the mean gradients that make the graph."""
    plain = SpectralFilter.apply
    spoiled = []

    def spoil(chosen: SpectralFilter, *, measure: bool = False) -> None:
        if chosen.steps == 2 and not spoiled:
            spoiled.append(chosen.steps)
            chosen._shards.gradient(chosen.fqns[0])[0] = float("nan")  # type: ignore[index]
        plain(chosen, measure=measure)

    monkeypatch.setattr(SpectralFilter, "apply", spoil)
    changes = {"filter__graph": "knn", "filter__refresh_steps": 2, "spectral__method": "full"}
    found = run(corpus, tmp_path, **changes)
    assert spoiled == [2]
    assert int(found["tensors"]["filter/steps"]) == 5
    means = [v for k, v in found["tensors"].items() if k.endswith("/mean_gradients")]
    assert means and all(bool((m == m).all()) for m in means)
