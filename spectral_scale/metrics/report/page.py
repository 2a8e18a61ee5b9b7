"""One self-contained page about one run, or several compared."""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spectral_scale.errors import ConfigError
from spectral_scale.metrics.report import sections as charts
from spectral_scale.metrics.report import tables
from spectral_scale.metrics.report.figures import run_color
from spectral_scale.metrics.report.filter import filter_section
from spectral_scale.metrics.report.headline import headline
from spectral_scale.metrics.report.html import Section, dot, page, text
from spectral_scale.metrics.report.run import RunRecord, load_runs

logger = logging.getLogger(__name__)

Builder = Callable[[Sequence[RunRecord]], Section | None]

# In the order of the page: the section, and the note that takes its place without data.
_SECTIONS: list[tuple[Builder, str | None]] = [
    (tables.headline_section, None),
    (charts.loss_section, "Loss and perplexity: nothing under train/loss or validation/."),
    (tables.comparison_section, None),
    (tables.attempts_section, None),
    (charts.rates_section, "Learning rates and gradients: no train/lr or train/grad_norm."),
    (charts.speed_section, "Speed: no train/step_seconds or train/tokens_per_second."),
    (charts.memory_section, "Memory: nothing under memory/."),
    (charts.spectral_section, "Spectral health: no effective rank or orthogonality error."),
    (charts.spectrum_section, "Singular spectra: nothing under spectral/spectrum/."),
    (filter_section, None),
    (tables.configuration_section, "Configuration: no config.yaml could be read."),
]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The rendered page and the numbers that it shows."""

    html: str
    """The whole document; needs no other file and no network."""
    headlines: list[dict[str, Any]]
    """`report_headline.headline` of each run, in the order given."""


def build_report(run_dirs: Sequence[Path], *, allow_different_data: bool = False) -> Report:
    """Read the runs and render the page; nothing is written.

    Raises:
        ConfigError: as `load_runs`.
    """
    runs = load_runs(run_dirs, allow_different_data=allow_different_data)
    sections: list[Section] = []
    notes = _notes(runs)
    for build, missing in _SECTIONS:
        try:
            section = build(runs)
        except Exception as error:  # a run's numbers must be readable even if one chart is not
            logger.warning("report: %s failed", build.__name__, exc_info=True)
            notes.append(f"{build.__name__} could not be drawn ({type(error).__name__}: {error}).")
            continue
        if section is not None:
            sections.append(section)
        elif missing is not None:
            notes.append(missing)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    html = page(title=title, lead=_lead(runs), sections=sections, left_out=notes)
    return Report(html=html, headlines=[headline(run) for run in runs])


def write_report(
    run_dirs: Sequence[Path], output: Path, *, allow_different_data: bool = False
) -> Path:
    """Write the page about `run_dirs` to `output`, whole or not at all.

    Only config.yaml, environment.json, metrics.jsonl and status.json of each folder are read.

    Returns:
        `output`.

    Raises:
        ConfigError: a folder is not a run, runs were trained on different data (unless
            `allow_different_data`), or `output` cannot be written.
    """
    report = build_report(run_dirs, allow_different_data=allow_different_data)
    return save_report(report, output)


def save_report(report: Report, output: Path) -> Path:
    """Write a built page to `output` by a rename; raises ConfigError when that is impossible."""
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # A folder's name may hold bytes that are no UTF-8; they are shown as escapes.
        temporary.write_text(report.html, encoding="utf-8", errors="backslashreplace")
        temporary.replace(output)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ConfigError(
            f"the report cannot be written to {output} ({error.strerror or error}); a file in a "
            "writable folder is required, give one with --output"
        ) from error
    return output


def _lead(runs: Sequence[RunRecord]) -> str:
    made = f"Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC from the run's own log"
    if len(runs) == 1:
        return f'<div class="chips"><span>{made}</span></div>'
    names = "".join(
        f"<span>{dot(run_color(index))}{text(run.name)}</span>" for index, run in enumerate(runs)
    )
    return f'<div class="chips">{names}</div>'


def _notes(runs: Sequence[RunRecord]) -> list[str]:
    named = len(runs) > 1
    notes = [f"{run.name}: {note}" if named else f"{note}." for run in runs for note in run.notes]
    unknown = [run.name for run in runs if run.environment.get("data_fingerprint") is None]
    if named and unknown:
        notes.append(f"Not checked to be the same data: {', '.join(unknown)} (no fingerprint).")
    return notes
