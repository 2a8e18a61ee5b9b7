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
    figures = draw_figures(results, docs / FIGURES)
    replace_measured(docs / PAGE, measured(results, figures))
    return [str(docs / PAGE), *(str(docs / FIGURES / name) for name in figures)]


def replace_measured(page: Path, text_between: str) -> None:
    """Write the part of a page between its marks. Raises StudyError if it has none."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise StudyError(f"{page} lacks the lines {BEGIN!r} and {END!r}, between which to write")
    page.write_text(f"{before}{BEGIN}\n\n{text_between}\n\n{END}{after}", "utf-8")


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
    shown = {trial.name for trial in all_trials(results)} & set(results)
    if not shown:
        return "Nothing has been measured yet."
    of = {name: results[name] for name in sorted(shown)}
    speed = seconds_per_step(of)[""]
    return (
        f"{measured_on(of)}; {speed:.3f} s a step on average, on a machine shared with "
        "other work, so seconds are not comparable between variants."
    )


def measured_on(results: Mapping[str, Result]) -> str:
    """Machine, versions and commits of finished runs, as the beginning of a sentence."""
    facts = [result.facts for result in results.values()]
    machines = sorted({f"{f['machine']['cpu']}, {f['machine']['cores']} cores" for f in facts})
    versions = sorted({f"torch {f['versions']['torch']}" for f in facts})
    commits = sorted({str(f["commit"]) for f in facts})
    return (
        f"Measured on {'; '.join(machines)}, one thread a run, {', '.join(versions)}, at commits "
        f"{', '.join(commits)}"
    )
