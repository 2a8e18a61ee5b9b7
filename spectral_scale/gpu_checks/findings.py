"""What a check found: figures with what is required of them, and the verdict that follows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "fail", "skip", "not run"]
"""skip: this machine lacks something the check needs. not run: the time was over before."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number or word, and whether it is as required."""

    name: str
    value: float | str
    required: str = ""
    """The requirement in words; empty for a figure that is only recorded."""
    ok: bool = True


@dataclass(frozen=True, kw_only=True)
class CheckFinding:
    """What a check returns. It passes if all its figures are as required."""

    figures: Sequence[Figure]
    text: str = ""
    """Markdown that follows the figures on the page."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The measurement itself, for `plan --calibration`; not on the page."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a check, as kept between runs of the command."""

    name: str
    verdict: Verdict
    reason: str = ""
    """Why it did not pass."""
    seconds: float = 0.0
    """How long its process took."""
    figures: Sequence[Figure] = ()
    text: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The measurement itself, for `plan --calibration`."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Versions and devices that it ran with."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Result":
        """The result that `to_json` gave. Raises TypeError or KeyError for anything else."""
        figures = [Figure(**figure) for figure in values["figures"]]
        return cls(**{**values, "figures": figures})


def at_most(name: str, value: float, limit: float) -> Figure:
    """A number that must not exceed a limit; NaN does."""
    return Figure(name=name, value=value, required=f"at most {limit:g}", ok=value <= limit)


def equal(name: str, value: float | str, expected: float | str) -> Figure:
    """A value that must be another one exactly."""
    return Figure(name=name, value=value, required=f"equal to {expected}", ok=value == expected)


def holds(name: str, ok: bool, *, value: str, required: str) -> Figure:
    """A condition that must hold, described in words."""
    return Figure(name=name, value=value, required=required, ok=ok)


def recorded(name: str, value: float | str) -> Figure:
    """A value that is written down and not judged."""
    return Figure(name=name, value=value)


def judged(name: str, finding: CheckFinding, *, seconds: float, facts: Mapping[str, str]) -> Result:
    """The result of a check that ran to its end."""
    wrong = [f"{f.name} is {shown(f.value)}, {f.required} is required" for f in finding.figures
             if not f.ok]  # fmt: skip
    return Result(
        name=name,
        verdict="fail" if wrong else "pass",
        reason="; ".join(wrong),
        seconds=seconds,
        figures=finding.figures,
        text=finding.text,
        data=finding.data,
        facts=facts,
    )


def shown(value: float | str) -> str:
    """A value for a person: four digits of a number."""
    return value if isinstance(value, str) else f"{value:.4g}"
