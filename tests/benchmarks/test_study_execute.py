"""The executor against stand-in runs: what is done is skipped, what was stopped continues."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from study import settings as declared
from study.execute import RESUMABLE, Executor
from study.plan import all_trials
from study.results import StudyError, read_results
from study.trial import Trial

# Writes what a run folder holds; the loss depends on the learning rate.
# Arguments: folder, steps, rate, mode, settings as JSON.
STAND_IN = """
import json, os, pathlib, signal, sys, time, yaml
folder, steps, rate, mode = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
settings = json.loads(sys.argv[5])
nested = {}
for key, value in settings.items():
    nested.setdefault(key.split(".")[0], {})[key.split(".")[1]] = value
(folder / "config.yaml").write_text(yaml.safe_dump(nested))
(folder / "environment.json").write_text(json.dumps({"data_fingerprint": "books", "machine": {}}))
status = lambda state, reason="": (folder / "status.json").write_text(
    json.dumps({"state": state, "reason": reason}))
if mode == "diverge":
    status("failed", "SpectralScaleError: the loss is not finite at step 3")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "validation/loss": 9.0}) + "\\n")
    sys.exit(1)
if mode == "crash":
    status("failed", "OSError: no space left")
    sys.exit(1)
if mode == "wait" and not (folder / "stopped").exists():
    def stop(*_):
        (folder / "stopped").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (folder / "begun").touch()
    time.sleep(60)
line = {"step": steps, "validation/loss": 5 + abs(float(rate) - 0.002), "train/loss": 5.0,
        "train/step_seconds": 0.1, "train/processor_seconds": 0.05, "train/tokens": 64 * steps}
line |= {f"memory/{use}_bytes": 10 for use in ("weights", "gradients", "states", "bank")}
(folder / "metrics.jsonl").write_text(json.dumps(line) + "\\n")
"""


def executor(tmp_path: Path, mode=lambda trial: "train", **options) -> tuple[Executor, list[str]]:
    started: list[str] = []

    def command(trial: Trial, run_dir: Path) -> list[str]:
        started.append(trial.name)
        rate = str(trial.settings.get("optimizer.spectral_lr", trial.settings["optimizer.lr"]))
        words = [str(run_dir), str(trial.steps), rate, mode(trial), json.dumps(trial.settings)]
        return [sys.executable, "-c", STAND_IN, *words]

    options = {"results": tmp_path / "results", "runs": tmp_path / "runs"} | options
    return Executor(command=command, say=lambda text: None, **options), started


def test_all_runs_are_made_once_and_skipped_afterwards(tmp_path, tiny_study):
    first, started = executor(tmp_path, workers=2)
    assert first.run() == 0
    results = read_results(tmp_path / "results")
    assert sorted(started) == sorted(results) == sorted(t.name for t in all_trials(results))
    assert results["final-full-seed_0"].settings["optimizer.lr"] == 2e-3
    assert results["final-full-seed_0"].facts["train_seconds"] == declared.FINAL_STEPS * 0.1
    steps = declared.FINAL_STEPS
    assert results["final-full-seed_0"].costs == [(steps, 64 * steps, steps * 0.05, 40)]
    again, started_again = executor(tmp_path)
    assert again.run() == 0
    assert started_again == []


def test_only_what_is_wanted_is_run(tmp_path, tiny_study):
    some, started = executor(tmp_path, wanted=lambda t: t.name == "tune-full-lr_0.002")
    assert some.run() == 0
    assert started == ["tune-full-lr_0.002"]


def test_a_stopped_run_continues_in_its_own_folder(tmp_path, tiny_study):
    def stop_when_begun() -> None:
        while not (tmp_path / "runs/tune-full-lr_0.002/begun").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    first, started = executor(tmp_path, lambda trial: "wait")
    stopper = threading.Thread(target=stop_when_begun)
    stopper.start()
    assert first.run() == RESUMABLE
    stopper.join()
    assert started == ["tune-full-lr_0.002"]
    assert not (tmp_path / "results").exists()
    only_first = {"wanted": lambda t: t.name == "tune-full-lr_0.002"}
    second, _ = executor(tmp_path, lambda trial: "wait", **only_first)
    assert second.run() == 0
    assert (tmp_path / "results/tune-full-lr_0.002.json").exists()


def test_divergence_is_a_result_and_a_crash_is_not(tmp_path, tiny_study):
    first_only = {"wanted": lambda t: t.name == "tune-full-lr_0.002"}
    diverging, _ = executor(tmp_path, lambda trial: "diverge", **first_only)
    assert diverging.run() == 0
    assert read_results(tmp_path / "results")["tune-full-lr_0.002"].diverged
    crashing, started = executor(tmp_path, lambda trial: "crash")
    assert crashing.run() == 1
    assert crashing.failed == started == ["tune-full-lr_0.004"]
    assert list(read_results(tmp_path / "results")) == ["tune-full-lr_0.002"]


def test_a_run_folder_of_other_settings_is_refused(tmp_path, tiny_study):
    folder = tmp_path / "runs/tune-full-lr_0.002"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("optimizer: {lr: 0.5}\n")
    study, _ = executor(tmp_path)
    with pytest.raises(StudyError, match=r"tune-full-lr_0.002.*optimizer.lr: 0.5 -> 0.002"):
        study.run()
