"""One run folder as the report reads it: files that may be missing, broken or of another age."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from spectral_scale.errors import ConfigError
from spectral_scale.metrics.history import Line, MetricsHistory, load_history

Array = NDArray[np.float64]

RUN_FILES = ("config.yaml", "environment.json", "metrics.jsonl", "status.json")


@dataclass(frozen=True, kw_only=True)
class Series:
    """One measured key over the steps at which it was logged."""

    steps: Array
    """Ascending optimizer steps."""
    values: Array
    """Values of the same length; NaN and infinities are kept."""

    def finite(self) -> "Series":
        """Only the points with a finite value."""
        keep = np.isfinite(self.values)
        return Series(steps=self.steps[keep], values=self.values[keep])

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The records of a run folder."""

    name: str
    """Unique among the runs of one report."""
    run_dir: Path
    """The run folder."""
    config: dict[str, Any]
    """`config.yaml`: sections of settings; empty when missing or unreadable."""
    environment: dict[str, Any]
    """`environment.json`; empty when missing or unreadable."""
    status: dict[str, Any]
    """`status.json`; empty when missing or unreadable."""
    history: MetricsHistory
    """Every line of `metrics.jsonl`."""
    notes: tuple[str, ...]
    """One line for each file that is missing, unreadable or damaged."""

    @cached_property
    def lines(self) -> list[Line]:
        """One line a step, without the work that was lost to a kill."""
        return self.history.current()

    def series(self, key: str) -> Series:
        """The numbers logged under `key`; other types are passed over."""
        points = [(x["step"], x[key]) for x in self.lines if _is_number(x.get(key))]
        table = np.array(points, dtype=np.float64).reshape(-1, 2)
        return Series(steps=table[:, 0], values=table[:, 1])

    def keys_under(self, prefix: str) -> list[str]:
        """Logged keys that are `prefix` or lie under `prefix/`, in order of appearance."""
        found: dict[str, None] = {}
        for line in self.lines:
            found.update(
                dict.fromkeys(k for k in line if k == prefix or k.startswith(f"{prefix}/"))
            )
        return list(found)

    def setting(self, section: str, key: str) -> Any:
        """A setting of the resolved configuration; None when it is not there."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, dict) else None

    def fact(self, key: str) -> Any:
        """Value of `key` in environment.json, status.json, or the first logged line with it."""
        for source in (self.environment, self.status, *self.lines):
            if source.get(key) is not None:
                return source[key]
        return None


def load_runs(run_dirs: Sequence[Path], *, allow_different_data: bool = False) -> list[RunRecord]:
    """Read the runs of one report.

    Raises:
        ConfigError: no folder, a folder that is not a run, one folder twice, or runs whose data
            fingerprints differ (unless `allow_different_data`).
    """
    if not run_dirs:
        raise ConfigError("no run folder given; at least one is required")
    folders = [Path(run_dir) for run_dir in run_dirs]
    resolved = [folder.resolve() for folder in folders]
    for folder, absolute in zip(folders, resolved, strict=True):
        if resolved.count(absolute) > 1:
            raise ConfigError(f"run folder {folder} is given more than once; give each once")
    names = _names(resolved)
    runs = [_load(folder, name) for folder, name in zip(folders, names, strict=True)]
    if not allow_different_data:
        _check_same_data(runs)
    return runs


def _names(folders: list[Path]) -> list[str]:
    """Names of the folders, with enough parent folders to make them unique."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _check_same_data(runs: list[RunRecord]) -> None:
    known = [run for run in runs if run.environment.get("data_fingerprint") is not None]
    for first, other in pairwise(known):
        ours, theirs = (run.environment["data_fingerprint"] for run in (first, other))
        if ours != theirs:
            raise ConfigError(
                f"runs {first.name!r} (data {_short(ours)}) and {other.name!r} (data "
                f"{_short(theirs)}) were trained on different data, so their losses do not "
                "compare; runs on the same data are required. Report them separately, or pass "
                "--allow-different-data"
            )


def _short(fingerprint: Any) -> str:
    text = fingerprint if isinstance(fingerprint, str) else json.dumps(fingerprint, sort_keys=True)
    return text if len(text) <= 60 else text[:60] + "..."


def _load(run_dir: Path, name: str) -> RunRecord:
    if not any((run_dir / file).is_file() for file in RUN_FILES):
        raise ConfigError(
            f"{run_dir} given, but it holds none of {', '.join(RUN_FILES)}; the folder of a run "
            "(its train.run_dir) is required"
        )
    notes: list[str] = []
    config = _read_mapping(run_dir / "config.yaml", notes)
    environment = _read_mapping(run_dir / "environment.json", notes)
    status = _read_mapping(run_dir / "status.json", notes, required=False)
    history = _read_history(run_dir, notes)
    return RunRecord(
        name=name,
        run_dir=run_dir,
        config=config,
        environment=environment,
        status=status,
        history=history,
        notes=tuple(notes),
    )


def _read_history(run_dir: Path, notes: list[str]) -> MetricsHistory:
    try:
        history = load_history(run_dir)
    except OSError as error:
        notes.append(f"metrics.jsonl cannot be read ({error.strerror or error})")
        return MetricsHistory(lines=(), damaged_lines=())
    if not history.lines:
        notes.append("metrics.jsonl is missing or empty")
    if history.damaged_lines:
        numbers = ", ".join(str(number) for number in history.damaged_lines)
        notes.append(f"metrics.jsonl: line {numbers} was cut off by a kill and is left out")
    return history


def _read_mapping(path: Path, notes: list[str], *, required: bool = True) -> dict[str, Any]:
    """A YAML or JSON object; a failure becomes a note and an empty one."""
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except FileNotFoundError:
        if required:
            notes.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__})")
        return {}
    if not isinstance(values, dict):
        notes.append(f"{path.name} is not a mapping")
        return {}
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
