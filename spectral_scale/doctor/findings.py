"""Results of an examination, each with its remedy."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["ok", "warning", "fault"]
"""fault: a run would fail or be wrong; warning: it would work, but worse or not everywhere."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One result of the examination of one rank."""

    name: str
    """The part that was examined."""
    verdict: Verdict
    text: str
    """The result, for a person."""
    remedy: str = ""
    """How to correct it; empty for a healthy part."""
    rank: int = 0
    host: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def ok(name: str, text: str) -> Finding:
    """A finding that needs no action."""
    return Finding(name=name, verdict="ok", text=text)


def warning(name: str, text: str, remedy: str) -> Finding:
    """A finding with which a run works, but worse."""
    return Finding(name=name, verdict="warning", text=text, remedy=remedy)


def fault(name: str, text: str, remedy: str) -> Finding:
    """A finding with which a run fails."""
    return Finding(name=name, verdict="fault", text=text, remedy=remedy)


def exit_code(findings: list[Finding]) -> int:
    """Exit code of the command: 1 if there is a fault, else 0."""
    return int(any(finding.verdict == "fault" for finding in findings))
