"""From the folder of a finished run to its result."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import yaml

from spectral_scale.metrics.history import MetricsHistory, load_history
from study.results import Cost, Result, StudyError
from study.settings import Settings
from study.trial import Trial, require_settings

NOT_FINITE = "is not finite"
"""In the reason of a run that was given up because its loss or gradient overflowed."""
STATE = {f"memory/{use}_bytes" for use in ("weights", "gradients", "states", "bank")}
"""Metrics whose sum are the bytes of the training state."""


def check_run_folder(trial: Trial, run_dir: Path) -> None:
    """Raises StudyError if the folder holds a run with other settings than the trial's."""
    config = run_dir / "config.yaml"
    if config.exists():
        require_settings(trial, _settings_in(config, trial), f"the run in {run_dir}")


def collect(trial: Trial, run_dir: Path, *, diverged: bool) -> Result:
    """Read what the run logged. Raises StudyError if it is not the whole of this trial."""
    check_run_folder(trial, run_dir)
    history = load_history(run_dir)
    lines = history.current()
    validation = _curve(lines, "validation/loss")
    if not diverged and (not validation or validation[-1][0] != trial.steps):
        raise StudyError(f"{run_dir} holds no validation loss at step {trial.steps}; remove it")
    logs_every_step = (trial.settings or {}).get("metrics.log_interval") == 1
    return Result(
        name=trial.name,
        stage=trial.stage,
        settings=dict(trial.settings or {}),
        diverged=diverged,
        validation=validation,
        training=_curve(lines, "train/loss"),
        costs=_costs(lines),
        gradient_norms=_gradient_norms(lines) if logs_every_step else {},
        facts=_facts(run_dir, history),
    )


def diverged(run_dir: Path) -> bool:
    """Whether the last attempt failed because a loss or a gradient norm was not finite."""
    status = _read_json(run_dir / "status.json")
    return status.get("state") == "failed" and NOT_FINITE in str(status.get("reason"))


def _settings_in(config: Path, trial: Trial) -> Settings:
    """The trial's keys as the run folder's resolved configuration has them."""
    raw = yaml.safe_load(config.read_text(encoding="utf-8"))
    keys = (key.split(".") for key in trial.settings or {})
    return {f"{section}.{leaf}": raw.get(section, {}).get(leaf) for section, leaf in keys}


def _curve(lines: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], round(line[key], 5)) for line in lines if key in line]


def _costs(lines: list[dict[str, Any]]) -> list[Cost]:
    """At each evaluation: tokens and processor seconds of the steps so far, and bytes kept."""
    costs: list[Cost] = []
    seconds, last, tokens = 0.0, 0, 0
    for line in lines:
        if "train/processor_seconds" in line:
            seconds += line["train/processor_seconds"] * (line["step"] - last)
            last, tokens = line["step"], line["train/tokens"]
        if "validation/loss" in line and STATE <= line.keys():
            kept = sum(int(line[key]) for key in STATE)
            costs.append((line["step"], tokens, round(seconds, 3), kept))
    return costs


def _gradient_norms(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    prefix = "train/grad_norm/"
    norms: dict[str, list[float]] = {}
    for line in lines:
        for key in (key for key in line if key.startswith(prefix)):
            norms.setdefault(key.removeprefix(prefix), []).append(round(line[key], 6))
    return norms


def _facts(run_dir: Path, history: MetricsHistory) -> dict[str, Any]:
    environment = _read_json(run_dir / "environment.json")
    kept = ("parameters_trained", "parameters_dense", "data_fingerprint", "versions")
    return {key: environment.get(key) for key in kept} | {
        "train_seconds": round(_train_seconds(history.current()), 3),
        "resumed_at_steps": history.resume_steps(),
        "machine": {"cpu": cpu_model(), "cores": environment.get("machine", {}).get("cpu_count")},
        "commit": commit(),
    }


def _train_seconds(lines: list[dict[str, Any]]) -> float:
    """Seconds of the steps themselves: no evaluation, no checkpoint, no start."""
    total, last = 0.0, 0
    for line in lines:
        if "train/step_seconds" in line:
            total += line["train/step_seconds"] * (line["step"] - last)
            last = line["step"]
    return total


def cpu_model() -> str:
    """The processor's name as its vendor gives it, or the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def commit() -> str | None:
    """The checkout's commit, None outside one."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
