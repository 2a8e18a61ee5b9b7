"""GaLore in a run: what it projects, and that a matrix left out is never silent."""

import pytest

from spectral_scale.config.schema import OptimizerConfig, SpectralConfig
from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.galore.controller import GaLoreController, galore_groups
from spectral_scale.methods.galore.optimizer import GaLoreAdamW, ProjectionStats
from spectral_scale.methods.sst.layer import convert

GALORE = SpectralConfig(method="galore", spectral_rank=2, steps_per_iteration=3)
OPTIMIZER = OptimizerConfig(lr=1e-3, spectral_lr=2e-3, weight_decay=0.1)


def test_every_parameter_is_in_one_group_and_the_blocks_are_projected(stack) -> None:
    groups = {group["name"]: group for group in galore_groups(stack, GALORE, OPTIMIZER)}
    assert groups["projected"]["fqns"] == [f"layers.{i}.weight" for i in range(3)]
    assert groups["dense"]["fqns"] == ["entry.weight"]
    settings = {k: groups["projected"][k] for k in ("galore_rank", "update_interval", "scale")}
    assert settings == {"galore_rank": 2, "update_interval": 3, "scale": 0.25}
    assert groups["projected"]["lr"] == groups["projected"]["base_lr"] == 2e-3
    assert groups["projected"]["weight_decay"] == 0.1 and not groups["projected"]["spectral"]
    assert "galore_rank" not in groups["dense"] and groups["dense"]["lr"] == 1e-3
    parameters = dict(stack.named_parameters())
    fqns = [fqn for group in groups.values() for fqn in group["fqns"]]
    assert sorted(fqns) == sorted(parameters)
    for group in groups.values():
        for fqn, parameter in zip(group["fqns"], group["params"], strict=True):
            assert parameters[fqn] is parameter


def test_reports_at_renewals_only(stack, take_step) -> None:
    optimizer = GaLoreAdamW(galore_groups(stack, GALORE, OPTIMIZER))
    controller = GaLoreController(optimizer)
    reports = []
    for number in range(5):
        take_step(stack, optimizer, number)
        reports.append(controller.after_step())
    metrics = [None if report is None else report.metrics() for report in reports]
    assert metrics[0] == {"galore/projections": 3}
    assert metrics[1] is metrics[2] is metrics[4] is None
    assert metrics[3]["galore/projections"] == 3
    assert 0.0 < metrics[3]["galore/subspace_overlap"] < 1.0
    assert controller.applied_steps == 5 and controller.lr_factor() == 1.0


@pytest.mark.parametrize(
    "stats",
    [ProjectionStats(), ProjectionStats(projected=2), ProjectionStats(projected=3, renewed=1)],
)
def test_a_matrix_left_out_is_an_error(stack, take_step, stats: ProjectionStats) -> None:
    """Broken on purpose: the step did less than it should."""
    optimizer = GaLoreAdamW(galore_groups(stack, GALORE, OPTIMIZER))
    controller = GaLoreController(optimizer)
    take_step(stack, optimizer, 0)
    optimizer.stats = stats
    with pytest.raises(SpectralError, match="3 were expected: GaLore is partly off"):
        controller.after_step()


def test_nothing_to_project_is_refused(stack) -> None:
    with pytest.raises(ConfigError, match="no parameter group holds galore_rank"):
        GaLoreController(GaLoreAdamW([{"params": list(stack.parameters())}]))
    convert(stack, SpectralConfig(spectral_rank=2))
    with pytest.raises(ConfigError):
        galore_groups(stack, GALORE, OPTIMIZER)
