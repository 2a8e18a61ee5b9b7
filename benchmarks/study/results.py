"""One JSON file a finished run, small enough to be committed; the study continues from these."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from study.settings import Settings

Cost = tuple[int, int, float, int]
"""Step, tokens and processor seconds of the steps so far, bytes of the training state."""
FORMAT, FORMAT_VERSION = "spectral_scale.study", 1


class StudyError(Exception):
    """A result or run folder that cannot be used; says which and what to do."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run gave."""

    name: str
    """Of the run; the file is NAME.json."""
    stage: str
    """The part of the study that it belongs to."""
    settings: Settings
    """What it was run with, by dotted key."""
    diverged: bool
    """Whether it ended with a loss that is not finite."""
    validation: list[tuple[int, float]]
    """(step, validation loss), the last one at the end of the run."""
    training: list[tuple[int, float]]
    """(step, training loss of that step)."""
    costs: list[Cost] = field(default_factory=list)
    """What was spent and held at each evaluation, if that was measured."""
    gradient_norms: dict[str, list[float]] = field(default_factory=dict)
    """Kind of parameters -> norm in each step (runs that log every step only)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Counts, seconds, versions, machine, data: what was measured but is not compared."""

    @property
    def loss(self) -> float:
        """Validation loss at the end, nats a token; infinite if the run diverged."""
        return math.inf if self.diverged else self.validation[-1][1]


def write_result(folder: Path, result: Result) -> Path:
    """Replace NAME.json as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    content = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(result)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(_to_text(content), encoding="utf-8")
    temporary.replace(path)
    return path


def _to_text(content: dict[str, Any]) -> str:
    """One line a top-level key: readable differences, small files."""
    lines = [f" {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_results(folder: Path) -> dict[str, Result]:
    """All results of a folder by name. Raises StudyError for a file that is not one."""
    return {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}


def _read(path: Path) -> Result:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if (raw.pop("format"), raw.pop("format_version")) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"it is not of format {FORMAT} {FORMAT_VERSION}")
        if unknown := set(raw) - {f.name for f in fields(Result)}:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        for curve in ("validation", "training"):
            raw[curve] = [(int(step), float(loss)) for step, loss in raw[curve]]
        raw["costs"] = [tuple(cost) for cost in raw.get("costs", [])]
        result = Result(**raw)
        if result.name != path.stem:
            raise ValueError(f"it names itself {result.name}")
        if not result.validation and not result.diverged:
            raise ValueError("it holds no validation loss")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(
            f"{path} is no result of the study ({error}); remove it, so that it is run again"
        ) from None
    return result


def differences(found: Settings, expected: Settings) -> list[str]:
    """`key: found -> expected` of every setting in which two runs differ."""
    return [
        f"{key}: {found.get(key, 'default')} -> {expected.get(key, 'default')}"
        for key in sorted(set(found) | set(expected))
        if found.get(key) != expected.get(key)
    ]


def require_same_data(results: dict[str, Result]) -> None:
    """Raises StudyError if results of different data or vocabulary lie together."""
    seen: dict[str, str] = {}
    for name, result in results.items():
        seen.setdefault(str(result.facts.get("data_fingerprint")), name)
    if len(seen) > 1:
        raise StudyError(
            f"runs {sorted(seen.values())} trained on different data, so their losses cannot be "
            "compared; remove the results of one of them"
        )
