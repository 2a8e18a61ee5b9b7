"""What an examination found, and what to do about it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["ok", "warning", "fault"]
"""fault: a run would fail or be wrong; warning: it would work, but worse or not everywhere."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at, on one rank."""

    name: str
    """What was looked at."""
    verdict: Verdict
    text: str
    """What was found."""
    remedy: str = ""
    """What to do; empty if all is well."""
    rank: int = 0
    host: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def ok(name: str, text: str) -> Finding:
    """All is well."""
    return Finding(name=name, verdict="ok", text=text)


def warning(name: str, text: str, remedy: str) -> Finding:
    """A run would work, but worse."""
    return Finding(name=name, verdict="warning", text=text, remedy=remedy)


def fault(name: str, text: str, remedy: str) -> Finding:
    """A run would fail."""
    return Finding(name=name, verdict="fault", text=text, remedy=remedy)


def exit_code(findings: list[Finding]) -> int:
    """1 if there is a fault, else 0."""
    return int(any(finding.verdict == "fault" for finding in findings))
