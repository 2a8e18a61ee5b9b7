"""The command itself: listing, clear errors, and one real run from settings to result."""

import runpy
import sys
from pathlib import Path

import pytest
from study import settings as declared
from study.execute import Executor, train_command
from study.prepare import DATA_VARIABLE, prepare_books
from study.results import StudyError, read_results, write_result
from study_results import complete

RUN = Path(__file__).parents[2] / "benchmarks" / "study" / "run.py"


def command(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
    return runpy.run_path(str(RUN), run_name="study_run")["main"]()


def test_the_listing_says_what_is_done_and_how_long_the_rest_takes(
    monkeypatch, capsys, tmp_path, tiny_study
):
    results = complete(until=lambda trial: trial.stage == "ablation")
    for result in results.values():
        write_result(tmp_path, result)
    assert command(monkeypatch, "--list", "--workers", 2, "--results", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "done, validation loss 5.0000" in lines[0]
    # Two finals and the base ablation at the 0.5 s a step of the others, with 15 % on top.
    hours = (2 * declared.FINAL_STEPS + declared.ABLATION_STEPS) * 0.5 * 1.15 / 2 / 3600
    assert lines[-1].startswith(f"{len(results)} of {len(results) + 3} runs are done; left: 3 runs")
    assert lines[-1].endswith(f"about {hours:.1f} h with 2 worker(s)")


def test_what_is_wrong_is_said_in_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "tune-x.json").write_text("{")
    assert command(monkeypatch, "--list", "--results", tmp_path) == 1
    assert "tune-x.json is no result" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(monkeypatch, "--list", "--workers", 0)
    assert "must be at least 1" in capsys.readouterr().err


def test_missing_books_name_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(StudyError, match=f"set {DATA_VARIABLE}, to the folder"):
        prepare_books(tmp_path / "out")


def test_a_real_run_becomes_a_result(monkeypatch, tmp_path, corpus, tiny_study):
    small = {"num_layers": 1, "num_heads": 2, "hidden_size": 32, "sequence_length": 32}
    changes = {f"model.{key}": value for key, value in small.items()}
    changes |= {"train.eval_interval": 3, "data.validation_sequences": 8}
    monkeypatch.setattr(declared, "COMMON", declared.COMMON | changes)
    monkeypatch.setattr(declared, "DIP", declared.DIP | {"spectral.steps_per_iteration": 2})
    monkeypatch.setattr(declared, "DIP_VARIANTS", (declared.SST,))
    monkeypatch.setattr(declared, "DIP_STEPS", 6)
    study = Executor(
        results=tmp_path / "results",
        runs=tmp_path / "runs",
        command=train_command(corpus),
        wanted=lambda trial: trial.stage == "dip",
        say=lambda text: None,
    )
    log = tmp_path / "runs/dip-sst_residual_r12.log"
    assert study.run() == 0, log.read_text()
    result = read_results(tmp_path / "results")["dip-sst_residual_r12"]
    assert [step for step, _ in result.validation] == [0, 3, 6]
    assert [step for step, _ in result.training] == [1, 2, 3, 4, 5, 6]
    assert set(result.gradient_norms) == {"dense", "spectral_direction", "spectral_value"}
    assert all(len(norms) == 6 for norms in result.gradient_norms.values())
    assert result.facts["train_seconds"] > 0 and result.facts["parameters_trained"] > 0
    assert len(result.facts["data_fingerprint"]) == 64
