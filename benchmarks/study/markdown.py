"""Cells and tables of Markdown. What was not measured is a dash."""

import math
from collections.abc import Iterable, Sequence

NOTHING = "–"


def number(value: float | None, *, digits: int = 4) -> str:
    """A loss, or that the run diverged."""
    if value is None:
        return NOTHING
    return f"{value:.{digits}f}" if math.isfinite(value) else "diverged"


def difference(loss: float | None, reference: float | None) -> str:
    """A loss minus another, with its sign."""
    if loss is None or reference is None or not math.isfinite(loss - reference):
        return NOTHING
    return f"{loss - reference:+.4f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under a head."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
