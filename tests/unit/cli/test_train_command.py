"""`spectral-scale train` as a user runs it: what it writes, says, survives, and never writes."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectral_scale.cli.main import main
from spectral_scale.config.load import known_keys, load_config
from spectral_scale.metrics.history import read_metrics
from spectral_scale.testing.tiny import tiny_words

SECRETS = {"HF_TOKEN": "hf_Xq7secret", "AWS_SECRET_ACCESS_KEY": "aws_Zz9secret"}
STEPS = 12  # swaps after 4, 8 (re-SVD) and 12


def train(corpus: Path, run_dir: Path, **changes: Any) -> int:
    return main(["train", *tiny_words(corpus, run_dir, **changes)])


def status(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def snapshot(run_dir: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {
        str(file.relative_to(run_dir)): file.read_bytes()
        for file in sorted(run_dir.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A complete run, started with secrets in its environment."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        assert train(corpus, run_dir, metrics__tensorboard=True, metrics__report=True) == 0
    yield run_dir


def test_a_run_leaves_what_is_promised(finished: Path) -> None:
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "status.json", "report.html"):
        assert (finished / name).stat().st_size > 0, name
    assert (finished / "logs" / "rank_00000.log").is_file()
    assert list((finished / "tensorboard").iterdir())
    assert checkpoints(finished) == ["step_00000012"]
    assert (finished / "checkpoints" / "step_00000012" / "manifest.json").is_file()
    expected = {"state": "completed", "step": 12, "steps": 12, "reason": "", "exit_code": 0}
    assert expected.items() <= status(finished).items()
    left = {path.name for path in finished.iterdir() if path.name.startswith(".")}
    assert left <= {".lock"}


def test_the_written_configuration_is_resolved_and_runs_again(finished: Path) -> None:
    raw = yaml.safe_load((finished / "config.yaml").read_text())
    assert [f"{section}.{key}" for section in raw for key in raw[section]] == known_keys()
    assert raw["model"]["vocab_size"] == 512  # was auto
    assert load_config([finished / "config.yaml"]).config.train.steps == STEPS


def test_no_secret_reaches_a_file(finished: Path) -> None:
    files = snapshot(finished)
    assert len(files) > 8
    for name, content in files.items():
        for key, value in SECRETS.items():
            assert value.encode() not in content and key.encode() not in content, name
    environment = json.loads(files["environment.json"])
    assert environment.keys() >= {"versions", "machine", "device", "world_size"}
    assert environment["world_size"] == 1 and environment["device"] == "cpu"


KEYS = {
    "train/loss",
    "train/perplexity",
    "train/tokens",
    "train/epoch",
    "train/lr",
    "train/lr/dense",
    "train/lr/spectral_direction",
    "train/lr/spectral_value",
    "train/grad_norm",
    "train/grad_norm/dense",
    "train/grad_norm/spectral_direction",
    "train/grad_norm/spectral_value",
    "train/step_seconds",
    "train/processor_seconds",
    "train/tokens_per_second",
}
EVALUATED = {"validation/loss", "validation/perplexity", "validation/seconds"}
MEMORY = {f"memory/{use}_bytes" for use in ("weights", "gradients", "states", "bank", "peak")}
BOUNDARY = {
    f"spectral/{what}"
    for what in (
        *("iteration", "layers", "active_triplets", "swapped_vectors", "moments_reset"),
        *("redecomposed", "kept_factors", "boundary_seconds"),
    )
}


def test_metrics_have_their_keys_at_their_steps(finished: Path) -> None:
    lines = {line["step"]: line for line in read_metrics(finished)}
    assert sorted(lines) == list(range(STEPS + 1))
    for step in range(1, STEPS + 1):
        assert lines[step].keys() >= KEYS
        assert all(math.isfinite(lines[step][key]) for key in KEYS)
    for step in (0, 6, 12):
        assert lines[step].keys() >= EVALUATED | MEMORY
    for step in (4, 8, 12):
        assert lines[step].keys() >= BOUNDARY
        assert lines[step]["spectral/layers"] == 12
        assert lines[step]["spectral/active_triplets"] == 12 * 8
    assert not lines[5].keys() & (EVALUATED | BOUNDARY)
    assert [s for s in lines if lines[s].get("spectral/redecomposed")] == [8]
    assert lines[7]["train/tokens"] == 7 * 12 * 32


def test_logged_rates_are_those_of_the_step(finished: Path) -> None:
    """Warm-up of all rates over 3 steps, and of the spectral ones over 2 after each swap."""
    lines = {line["step"]: line for line in read_metrics(finished)}
    dense = [lines[step]["train/lr"] / 1e-3 for step in range(1, 7)]
    assert dense == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    spectral = [lines[step]["train/lr/spectral_value"] / 1e-3 for step in range(1, 7)]
    assert spectral == pytest.approx([1 / 6, 2 / 3, 1, 1, 1 / 2, 1])


def test_run_again_after_completion(
    finished: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Says that it is done, with exit code 0, and changes nothing but the time of the status."""
    before = snapshot(finished)
    assert train(corpus, finished, metrics__tensorboard=True) == 0
    out = capsys.readouterr().out
    assert "run complete at step 12" in out and "--train.steps" in out
    after = snapshot(finished)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"status.json", "logs/rank_00000.log"}
    assert status(finished)["state"] == "completed"


def test_the_result_as_json(
    finished: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--format", "json", *tiny_words(corpus, finished)]) == 0
    result = json.loads(capsys.readouterr().out)
    lines = read_metrics(finished)
    assert result == {
        "run_dir": str(finished),
        "step": 12,
        "state": "completed",
        "perplexity_before": lines[0]["validation/perplexity"],
        "perplexity_after": lines[-1]["validation/perplexity"],
    }


def test_print_config_shows_sources_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"train: {{run_dir: {tmp_path / 'run'}, steps: 5}}")
    assert main(["train", "--config", str(file), "--print-config", "--optimizer.lr=2e-3"]) == 0
    out = capsys.readouterr().out
    assert "  lr: 0.002  # command line" in out
    assert f"  steps: 5  # {file}" in out
    assert "  seed: 0  # default" in out
    assert not (tmp_path / "run").exists()


def test_help_config_describes_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help-config"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--spectral.steps_per_iteration" in out and "optimizer steps between swaps" in out


def test_help_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    assert "--print-config" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["metrics.jsonl", "tensorboard"])
def test_a_sink_that_fails_costs_only_the_sink(
    corpus: Path, tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder where metrics.jsonl should be, or a file where tensorboard's folder should be."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    if broken == "tensorboard":
        (run_dir / broken).write_text("in the way")
    else:
        (run_dir / broken).mkdir()
    assert train(corpus, run_dir, train__steps=4, metrics__tensorboard=True) == 0
    assert "run complete at step 4" in capsys.readouterr().out
    assert checkpoints(run_dir) == ["step_00000004"]
    assert status(run_dir)["state"] == "completed"
    log = (run_dir / "logs" / "rank_00000.log").read_text()
    assert log.count("cannot be written") == 1 and broken in log


def test_a_status_that_cannot_be_written_costs_only_the_status(
    corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "status.json" / "in the way").mkdir(parents=True)
    assert train(corpus, tmp_path, train__steps=4) == 0
    assert checkpoints(tmp_path) == ["step_00000004"]
    assert "status.json could not be written" in (tmp_path / "logs/rank_00000.log").read_text()


def test_a_report_that_cannot_be_written_costs_only_the_report(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training was successful and stays so; nothing names a page that is not there."""
    (tmp_path / "report.html" / "in the way").mkdir(parents=True)
    assert train(corpus, tmp_path, train__steps=4, metrics__report=True) == 0
    shown = capsys.readouterr()
    assert "warning: report.html could not be written" in shown.err
    assert "run complete at step 4" in shown.out and "report.html" not in shown.out
    assert status(tmp_path)["state"] == "completed"
    assert not list(tmp_path.glob("*.tmp"))


HUGE = {
    "optimizer__lr": 1e30,
    "optimizer__spectral_lr": 1e30,
    "checkpoint__interval": 3,
    "health__skip": False,
}


@pytest.mark.parametrize("noticed", ["when logged", "when saved", "at a re-SVD", "at once"])
def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_nothing(
    corpus: Path, tmp_path: Path, noticed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(corpus, tmp_path, train__steps=4) == 0
    good = snapshot(tmp_path / "checkpoints")
    intervals = {
        "when logged": {},
        "when saved": {"metrics__log_interval": 100},
        "at a re-SVD": {"metrics__log_interval": 100, "checkpoint__interval": 100},
        # The update overflows in the very step that is saved, whose loss is still finite.
        "at once": {"optimizer__lr": 1e39, "checkpoint__interval": 1},
    }[noticed]
    capsys.readouterr()
    changes = HUGE | {"train__steps": 20, "train__eval_interval": 100} | intervals
    assert train(corpus, tmp_path, **changes) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    if noticed == "at a re-SVD":
        assert "restart from the last checkpoint with a lower learning rate" in error
    elif noticed == "at once":
        assert "step 5 was not saved: rank 0: not finite after the update: model/" in error
        assert "lower the learning rates, then start again to resume from step 4" in error
    else:
        assert "not finite at step 6" in error and "lower the learning rates" in error
        assert "nothing was saved since step 4" in error
    assert snapshot(tmp_path / "checkpoints") == good
    found = status(tmp_path)
    assert (found["state"], found["step"]) == ("failed", 4)
    assert error.endswith(found["reason"].partition(": ")[2])
    # The same folder goes on with a sane rate.
    assert train(corpus, tmp_path, train__steps=6) == 0
    losses = [line["train/loss"] for line in read_metrics(tmp_path) if line["step"] > 4]
    assert all(map(math.isfinite, losses)) and len(losses) == 2
