"""The results as one Markdown page, which can be put into `docs/` as it is."""

from collections.abc import Mapping, Sequence

from spectral_scale.gpu_checks.catalogue import Check
from spectral_scale.gpu_checks.findings import Figure, Result, shown

MARKS = {"pass": "pass", "fail": "**FAIL**", "skip": "skip", "not run": "not run"}


def to_markdown(
    checks: Sequence[Check],
    results: Sequence[Result],
    facts: Mapping[str, str],
    *,
    rehearsal: bool,
) -> str:
    """The whole page: machine, verdicts, then the figures of each check that ran.

    Args:
        checks: those that were asked for.
        results: theirs, in the same order.
        facts: versions and devices.
        rehearsal: whether they ran on the CPU, which the page then says first.
    """
    parts = ["# GPU checks", _written(results, rehearsal=rehearsal), _facts(facts)]
    rows = [
        [f"`{r.name}`", c.title, MARKS[r.verdict], _seconds(r), _cell(r.reason)]
        for c, r in zip(checks, results, strict=True)
    ]
    parts.append(table(["check", "what must hold", "verdict", "seconds", "reason"], rows))
    parts += [_section(result) for result in results if result.figures or result.text]
    return "\n\n".join(parts) + "\n"


def _written(results: Sequence[Result], *, rehearsal: bool) -> str:
    counts = {v: sum(r.verdict == v for r in results) for v in MARKS}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    text = f"Written by `spectral-scale doctor --gpu`: {said}."
    if not rehearsal:
        return text
    return (
        f"{text}\n\n**A rehearsal on the CPU with small sizes. It tests the checks, and says "
        "nothing about a GPU.**"
    )


def _facts(facts: Mapping[str, str]) -> str:
    return table(["", "version or device"], [[name, value] for name, value in facts.items()])


def _section(result: Result) -> str:
    parts = [f"## {result.name}"]
    if result.figures:
        rows = [_row(figure) for figure in result.figures]
        parts.append(table(["figure", "value", "required", ""], rows))
    return "\n\n".join([*parts, result.text] if result.text else parts)


def _row(figure: Figure) -> list[str]:
    verdict = "" if not figure.required else "ok" if figure.ok else "**not so**"
    return [_cell(figure.name), _cell(shown(figure.value)), _cell(figure.required), verdict]


def _seconds(result: Result) -> str:
    return f"{result.seconds:.0f}" if result.seconds else ""


def _cell(text: str) -> str:
    """A text that stays in its cell."""
    return " ".join(text.replace("|", "\\|").split())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
