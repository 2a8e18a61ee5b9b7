"""Writes the measured part of docs/study2.md, between two marks, from the result files alone."""

from collections.abc import Mapping
from pathlib import Path

from study.render import measured_on, replace_measured
from study.results import Result, require_same_data

from study2 import settings as declared
from study2.figures import draw_figures
from study2.plan import all_trials
from study2.tables import (
    ablation_table,
    bytes_table,
    finals_table,
    missing_runs,
    progress_table,
    rank_table,
    time_table,
    tuning_table,
)

PAGE, FIGURES = "study2.md", "study2"


def render(results: Mapping[str, Result], docs: Path) -> list[str]:
    """Replace the measured part of the page and the figures; return the paths written.

    Raises StudyError if the page has no marks or results do not belong together.
    """
    require_same_data(dict(results))
    figures = draw_figures(results, docs / FIGURES)
    replace_measured(docs / PAGE, measured(results, figures))
    return [str(docs / PAGE), *(str(docs / FIGURES / name) for name in figures)]


def measured(results: Mapping[str, Result], figures: list[str]) -> str:
    """All tables and the existing figures, as Markdown."""

    def image(name: str) -> str:
        return f"![{name}]({FIGURES}/{name}.png)" if f"{name}.png" in figures else ""

    shown = {t.name: results[t.name] for t in all_trials(results) if t.name in results}
    state = f"{measured_on(shown)}." if shown else "Nothing has been measured yet."
    main, *others = declared.VARIANTS
    sections = [
        ("State", [progress_table(results), state]),
        (f"Equal tokens, width {main}", [finals_table(results, main), image("tokens")]),
        (f"Equal processor time, width {main}", [time_table(results, main), image("seconds")]),
        ("Equal bytes of training state", [bytes_table(results), image("bytes")]),
        ("Rank", [rank_table(results), image("rank")]),
        ("Changes of the tangent form", [ablation_table(results)]),
        *((f"Equal tokens, width {width}", [finals_table(results, width)]) for width in others),
        ("Learning rates", [tuning_table(results), image("tuning")]),
        ("Missing runs", [missing_runs(results)]),
    ]
    parts = [f"## {title}\n\n" + "\n\n".join(filter(None, body)) for title, body in sections]
    return "\n\n".join(parts)
