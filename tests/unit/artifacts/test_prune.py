"""Pruning is the best approximation of its rank, and undone exactly."""

import pytest
import torch
from torch import nn

from spectral_scale.artifacts.prune import PrunableModel, curve_table, pruning_curve
from spectral_scale.engine.evaluate import Evaluation
from spectral_scale.errors import ConfigError


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 20), nn.Linear(20, 2))


def test_each_matrix_is_its_best_approximation() -> None:
    model = make()
    full = [model[i].weight.detach().clone() for i in (0, 2, 3)]
    size = PrunableModel(model, ["0", "2"]).keep(0.5)
    assert torch.equal(model[3].weight, full[2])
    for index, before in ((0, full[0]), (2, full[1])):
        sigma = torch.linalg.svdvals(before)
        error = float(torch.linalg.matrix_norm(model[index].weight.detach() - before))
        assert error == pytest.approx(float(sigma[3:].square().sum().sqrt()), rel=1e-4)
        assert torch.linalg.matrix_rank(model[index].weight, rtol=1e-4) == 3
    assert size.triplets == 6
    assert size.elements == 3 * (10 + 6) + 3 * (6 + 20)
    assert size.elements_dense == 60 + 120
    squares = [torch.linalg.svdvals(weight).square() for weight in full[:2]]
    kept = sum(float(s[:3].sum()) for s in squares) / sum(float(s.sum()) for s in squares)
    assert size.energy == pytest.approx(kept, rel=1e-5)


def test_keeping_all_restores_every_bit_after_any_other_fraction() -> None:
    model = make()
    before = model[0].weight.detach().clone()
    prunable = PrunableModel(model, ["0"])
    prunable.keep(0.2)
    assert not torch.equal(model[0].weight, before)
    size = prunable.keep(1.0)
    assert torch.equal(model[0].weight, before)
    assert size.energy == 1.0 and size.elements == 60


def test_at_least_one_singular_value_stays() -> None:
    model = make()
    assert PrunableModel(model, ["0"]).keep(0.01).triplets == 1


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_fractions_outside_are_refused(fraction: float) -> None:
    model = make()
    before = model[0].weight.detach().clone()
    with pytest.raises(ConfigError, match="kept fraction"):
        PrunableModel(model, ["0"]).keep(fraction)
    assert torch.equal(model[0].weight, before)


def test_the_curve_measures_each_pruned_model_and_ends_unpruned() -> None:
    model = make()
    before = model[0].weight.detach().clone()

    def measure() -> Evaluation:
        return Evaluation(loss=float((model[0].weight.detach() - before).abs().sum()), tokens=1)

    points = pruning_curve(PrunableModel(model, ["0"]), [0.3, 1.0, 0.6], measure)
    assert [point.keep for point in points] == [0.3, 1.0, 0.6]
    assert points[0].loss > points[2].loss > points[1].loss == 0.0
    assert torch.equal(model[0].weight, before)
    table = curve_table(points).splitlines()
    assert len(table) == 5 and table[3] == "| 1 (6) | 100.0% of dense | 100.00% | 0.0000 | 1.00 |"
