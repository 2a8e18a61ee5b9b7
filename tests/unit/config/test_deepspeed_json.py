"""DeepSpeed's JSON beside a run: "auto", agreement, contradiction, refusal, misspelling."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))


def run_with(path: Path | None, **changes: Any) -> RunConfig:
    values = {"parallel.backend": "deepspeed"}
    values |= {} if path is None else {"parallel.deepspeed_config": str(path)}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config([], [f"--{key}={value}" for key, value in values.items()]).config


def written(folder: Path, value: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps(value))
    return path


def settings(config: RunConfig, *, world_size: int = 1) -> dict[str, Any]:
    """What DeepSpeed is initialized with."""
    found = resolve(config, world_size=world_size).deepspeed
    assert found is not None
    return found.initialize


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [value]


def test_there_is_a_file_for_every_variant() -> None:
    names = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    assert [path.stem for path in SHIPPED] == names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_resolve_without_a_warning(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They name the stage and the offload, and no "auto" is left."""
    run = resolve(run_with(path), world_size=2)
    assert run.config.parallel.zero_stage == int(path.stem[4])
    assert run.config.parallel.offload == ("cpu" if "offload" in path.stem else "none")
    resolved = settings(run.config, world_size=2)
    assert "auto" not in leaves(resolved)
    assert resolved["train_batch_size"] == 32
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["zero_optimization"]["round_robin_gradients"] is False
    assert not caplog.records


def test_without_a_file_it_is_zero_2() -> None:
    resolved = settings(run_with(None))
    assert resolved["zero_optimization"]["stage"] == 2
    assert "offload_optimizer" not in resolved["zero_optimization"]


def test_equal_values_pass_and_clipping_stays_ours(tmp_path: Path) -> None:
    path = written(tmp_path, {"gradient_clipping": 1, "train_micro_batch_size_per_gpu": 8})
    assert settings(run_with(path))["gradient_clipping"] == 0.0


CONTRADICTIONS: list[tuple[Any, str]] = [
    ({"train_batch_size": 64}, "train_batch_size=64 differs from 32, given by train.global_batch"),
    ({"gradient_clipping": 0.5}, "gradient_clipping=0.5 differs from 1.0, given by optimizer.clip"),
    ({"bf16": {"enabled": True}}, "bf16.enabled=true differs from false, given by train.precision"),
    ({"optimizer": {"params": {"lr": 1e-4}}}, "optimizer.params.lr=0.0001 differs from 0.001"),
    ({"optimizer": {"type": "Lamb"}}, 'optimizer.type="Lamb" differs from "AdamW"'),
    ({"train_batch_size": True}, "train_batch_size=true differs from 32"),
]


@pytest.mark.parametrize(("value", "message"), CONTRADICTIONS, ids=str)
def test_contradictions_name_both(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        settings(run_with(written(tmp_path, value)))
    assert message in str(error.value)


def test_a_stage_given_twice_must_agree(tmp_path: Path) -> None:
    path = written(tmp_path, {"zero_optimization": {"stage": 3}})
    config = run_with(path, parallel__zero_stage=1)
    with pytest.raises(
        ConfigError, match=r"zero_optimization.stage=3 differs from 1, given by par"
    ):
        settings(config)


REFUSED: list[tuple[Any, str]] = [
    ({"zero_optimization": {"round_robin_gradients": True}}, "swapped triplets would land"),
    ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero_hpz_partition_size=8 is refused"),
    ({"zero_optimization": {"mics_shard_size": 8}}, "HSDP: parallel.backend=fsdp2 with"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "gathered weights would be rounded"),
    (
        {"zero_optimization": {"zero_quantized_nontrainable_weights": True}},
        "frozen weights would be rounded",
    ),
    ({"zero_optimization": {"zero_quantized_gradients": True}}, "gradients would be rounded"),
    ({"zero_optimization": {"zeropp_loco_param": {"err_beta": 0.8}}}, "gradients would be rounded"),
    ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "use cpu"),
    ({"zero_optimization": {"cpu_offload": True}}, 'write "offload_optimizer": {"device": "cpu"}'),
    ({"checkpoint": {"load_universal": True}}, "universal checkpoint loses frozen weights"),
    ({"scheduler": {"type": "WarmupLR"}}, "optimizer.schedule"),
    ({"zero_force_ds_cpu_optimizer": "yes"}, '="yes" must be true, false or "auto"'),
    ({"torch_autocast": {"enabled": True}}, "precision is train.precision"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=str)
def test_what_breaks_the_method_is_refused(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        settings(run_with(written(tmp_path, value)))
    assert message in str(error.value)


def test_the_flops_profiler_is_refused_in_stage_3_alone(tmp_path: Path) -> None:
    path = written(tmp_path, {"flops_profiler": {"enabled": True}})
    with pytest.raises(ConfigError, match=r"flops_profiler.enabled=true is refused in stage 3"):
        settings(run_with(path, parallel__zero_stage=3))
    assert settings(run_with(path))["flops_profiler"] == {"enabled": True}


def test_deepspeeds_adam_cannot_step_galore(tmp_path: Path) -> None:
    path = written(tmp_path, {"zero_force_ds_cpu_optimizer": True})
    with pytest.raises(ConfigError, match=r"zero_force_ds_cpu_optimizer=true is refused with"):
        settings(run_with(path, spectral__method="galore"))
    settings(run_with(path))


def test_all_problems_are_listed_together(tmp_path: Path) -> None:
    value = {"train_batch_size": 1, "gradient_clipping": 9, "prescale_gradients": True}
    with pytest.raises(ConfigError) as error:
        settings(run_with(written(tmp_path, value)))
    assert str(error.value).count("\n  - ") == 3


def test_harmless_values_of_refused_keys_pass(tmp_path: Path) -> None:
    value = {
        "zero_optimization": {"round_robin_gradients": False, "zero_hpz_partition_size": 1},
        "curriculum_learning": {"enabled": False},
        "checkpoint": {"load_universal": False},
    }
    settings(run_with(written(tmp_path, value)))


def test_unknown_keys_are_named_with_the_nearest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, {"zero_optimization": {"reduce_bucket_sise": 5}})
    with caplog.at_level(logging.WARNING):
        resolved = settings(run_with(path))
    assert "zero_optimization.reduce_bucket_sise is not known" in caplog.text
    assert "the nearest known one is zero_optimization.reduce_bucket_size" in caplog.text
    assert "reduce_bucket_sise" not in resolved["zero_optimization"]


def test_deepspeeds_own_keys_are_handed_on(tmp_path: Path) -> None:
    value = {"flops_profiler": {"enabled": True, "profile_step": 3}, "wall_clock_breakdown": True}
    resolved = settings(run_with(written(tmp_path, value)))
    assert resolved["flops_profiler"] == {"enabled": True, "profile_step": 3}
    assert resolved["wall_clock_breakdown"] is True


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_unusable_files_are_named(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"parallel.deepspeed_config=.*ds.json"):
        settings(run_with(path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"zero_stage": 0, "offload": "cpu"}, "stage 0 shards nothing"),
        ({"zero_stage": 3, "residual": "replicated"}, "ZeRO-3 shards frozen weights"),
        ({"zero_stage": 2, "residual": "sharded"}, "set parallel.zero_stage=3"),
    ],
    ids=str,
)
def test_pairs_that_cannot_be_are_refused_by_name(changes: Any, reason: str) -> None:
    config = run_with(None)
    config = replace(config, parallel=replace(config.parallel, **changes))
    with pytest.raises(ConfigError, match=reason):
        resolve(config, world_size=1)


def test_other_backends_do_not_read_the_file() -> None:
    config = load_config([], ["--parallel.deepspeed_config=/nowhere.json"]).config
    with pytest.raises(ConfigError, match="set parallel.backend=deepspeed"):
        resolve(config, world_size=1)


def test_stage_3_overlaps_communication_unless_the_file_says_no(tmp_path: Path) -> None:
    """As DeepSpeed does by default; in the other stages only where the file asks for it."""

    def overlaps(stage: int, **given: Any) -> bool:
        path = written(tmp_path, {"zero_optimization": {"stage": stage} | given})
        found: bool = settings(run_with(path))["zero_optimization"]["overlap_comm"]
        return found

    assert [overlaps(stage) for stage in (1, 2, 3)] == [False, False, True]
    assert overlaps(2, overlap_comm=True) and not overlaps(3, overlap_comm=False)
    assert overlaps(3, overlap_comm="auto")
