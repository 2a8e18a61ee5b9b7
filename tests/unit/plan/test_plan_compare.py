"""Methods side by side."""

import json
from pathlib import Path

import pytest

from spectral_scale.cli.main import main
from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError
from spectral_scale.plan.build import FITS, plan_run
from spectral_scale.plan.compare import COMPARED, compare, with_method

WORDS = ["--model.name=opt-125m", "--train.precision=bf16", "--train.global_batch_size=64"]


def config(*words: str) -> RunConfig:
    return load_config([], [*WORDS, *words]).config


def test_every_method_is_that_of_its_own_run() -> None:
    base = config("--spectral.spectral_rank=32")
    rows = compare(base, list(COMPARED), world_size=4, gpu_memory_bytes=80e9)
    assert [row.name for row in rows] == list(COMPARED) and not any(row.refused for row in rows)
    for row in rows:
        run = resolve(with_method(base, row.name), world_size=4)
        assert row.plan == plan_run(run, gpu_memory_bytes=80e9)
    trained = {row.name: row.plan.parameters_trained for row in rows if row.plan}
    assert trained["lora"] == trained["relora"] < trained["sst"] < trained["full"]


def test_the_run_s_own_method_keeps_its_settings() -> None:
    own = config("--spectral.extra_sigma=4", "--spectral.spectral_rank=32")
    assert with_method(own, "sst") is own
    lora = with_method(own, "lora").spectral
    assert (lora.method, lora.spectral_rank, lora.extra_sigma) == ("lora", 32, 0)


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    base = config()
    four = resolve(config("--train.micro_batch_size=4"), world_size=4)
    memory = 1.001 * plan_run(four, gpu_memory_bytes=80e9).needed_bytes / FITS
    (row,) = compare(base, ["sst"], world_size=4, gpu_memory_bytes=memory)
    assert row.largest_micro_batch == 4
    (none,) = compare(base, ["sst"], world_size=4, gpu_memory_bytes=1e9)
    assert none.largest_micro_batch is None


def test_a_method_that_cannot_run_is_told() -> None:
    base = config("--parallel.backend=fsdp2", "--parallel.tensor_parallel=2")
    sst, galore = compare(base, ["sst", "galore"], world_size=4, gpu_memory_bytes=80e9)
    assert sst.plan is not None and galore.plan is None
    assert "galore" in galore.refused.lower()
    with pytest.raises(ConfigError, match="no method can run; galore"):
        compare(base, ["galore"], world_size=4, gpu_memory_bytes=80e9)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "methods.svg"
    words = [*WORDS, "--compare", "full,sst,lora,galore", "--gpu", "h100", "--nodes", "1"]
    assert main(["plan", *words, "--figure", str(picture)]) == 0
    text = capsys.readouterr().out
    for part in ("full", "galore", "largest micro-batch", "GPU-hours", "a step, s"):
        assert part in text
    drawn = picture.read_text()
    assert drawn.startswith("<?xml") and "a step, s" in drawn and "galore" in drawn
    assert main(["plan", *words, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["full", "sst", "lora", "galore"]
    assert rows[0]["plan"]["memory"] and rows[0]["estimate"]["step_seconds"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "sst,adalora"], "adalora is no method; give some of full, sst"),
        (["--compare", ","], "nothing is no method"),
        (["--figure", "a.svg"], "give --compare"),
        (["--compare", "sst", "--figure", "no/such/folder/a.svg"], "cannot be written"),
    ],
)
def test_what_the_command_refuses(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *WORDS, *words]) == 78
    assert message in capsys.readouterr().err
