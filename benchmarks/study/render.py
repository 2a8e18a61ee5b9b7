"""Writes the measured part of docs/study.md, between two marks, from the result files alone."""

from collections.abc import Mapping
from pathlib import Path

from study.figures import draw_figures
from study.listing import seconds_per_step
from study.plan import all_trials
from study.results import Result, StudyError, require_same_data
from study.tables import (
    ablation_table,
    curve_table,
    dip_table,
    finals_table,
    missing_runs,
    progress_table,
    tuning_table,
)

BEGIN, END = "<!-- results: begin (written by run.py --render) -->", "<!-- results: end -->"
PAGE, FIGURES = "study.md", "study"


def render(results: Mapping[str, Result], docs: Path) -> list[str]:
    """Replace the measured part of `docs`/study.md and the figures; return the paths written.

    Raises StudyError if the page has no marks or results do not belong together.
    """
    require_same_data(dict(results))
    page = docs / PAGE
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise StudyError(f"{page} lacks the lines {BEGIN!r} and {END!r}, between which to write")
    figures = draw_figures(results, docs / FIGURES)
    page.write_text(f"{before}{BEGIN}\n\n{measured(results, figures)}\n\n{END}{after}", "utf-8")
    return [str(page), *(str(docs / FIGURES / name) for name in figures)]


def measured(results: Mapping[str, Result], figures: list[str]) -> str:
    """All tables and the existing figures, as Markdown."""
    sections = [
        ("State", [progress_table(results), _measured_on(results)]),
        ("Final runs", [finals_table(results), curve_table(results), _image("curves", figures)]),
        ("Tuning", [tuning_table(results), _image("tuning", figures)]),
        ("Ablations", [ablation_table(results), _image("ablations", figures)]),
        ("Adam's epsilon", [_image("epsilon", figures)]),
        (
            "Gradient norm at a swap or merge",
            [dip_table(results), _image("gradient_norm", figures)],
        ),
        ("Missing runs", [missing_runs(results)]),
    ]
    parts = [f"## {title}\n\n" + "\n\n".join(filter(None, body)) for title, body in sections]
    return "\n\n".join(parts)


def _image(name: str, figures: list[str]) -> str:
    file = f"{name}.png"
    words = name.replace("_", " ")
    return f"![{words}]({FIGURES}/{file})" if file in figures else ""


def _measured_on(results: Mapping[str, Result]) -> str:
    """Machine, versions, commits and speed of the finished runs, as a sentence."""
    shown = {trial.name for trial in all_trials(results)} & set(results)
    facts = [results[name].facts for name in sorted(shown)]
    if not facts:
        return "Nothing has been measured yet."
    machines = sorted({f"{f['machine']['cpu']}, {f['machine']['cores']} cores" for f in facts})
    versions = sorted({f"torch {f['versions']['torch']}" for f in facts})
    commits = sorted({str(f["commit"]) for f in facts})
    speed = seconds_per_step({name: results[name] for name in shown})[""]
    return (
        f"Measured on {'; '.join(machines)}, one thread a run, {', '.join(versions)}, at commits "
        f"{', '.join(commits)}; {speed:.3f} s a step on average, on a machine shared with "
        "other work, so seconds are not comparable between variants."
    )
