"""The parts of the report that are tables: headline, attempts, comparison, configuration."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from spectral_scale.metrics.history import OPENINGS, Line
from spectral_scale.metrics.report.figures import run_color
from spectral_scale.metrics.report.headline import (
    LossComparison,
    compare_losses,
    headline,
    recomputed,
    state,
)
from spectral_scale.metrics.report.html import (
    UNKNOWN,
    Section,
    count,
    dot,
    duration,
    number,
    size,
    table,
    text,
)
from spectral_scale.metrics.report.run import RunRecord

Runs = Sequence[RunRecord]
Headline = dict[str, Any]


def headline_section(runs: Runs) -> Section:
    """The headline table: a row a measure, a column a run; with cards for a single run."""
    columns = [headline(run) for run in runs]
    best = _best_perplexity(columns)
    rows = []
    for title, cell in _ROWS.items():
        cells = [cell(column) for column in columns]
        if title == "Validation perplexity, best" and best is not None:
            cells[best] = f'<b class="best">{cells[best]}</b>'
        if any(value != UNKNOWN for value in cells):
            rows.append([title, *cells])
    head = ["", *(_named(run, index) for index, run in enumerate(runs))] if len(runs) > 1 else []
    cards = _cards(columns[0]) if len(runs) == 1 else ""
    body = cards + (table(head, rows) if len(runs) > 1 else _in_columns(rows))
    return Section(anchor="headline", title="Headline", body=body)


def attempts_section(runs: Runs) -> Section | None:
    """Section on runs that were killed and resumed; None if there are none."""
    interrupted = [run for run in runs if len(run.history.attempts()) > 1]
    if not interrupted:
        return None
    body = ""
    for run in interrupted:
        attempts = run.history.attempts()
        ends = ["killed"] * (len(attempts) - 1) + [state(run)]
        rows = [
            _attempt_row(order, lines, end)
            for order, (lines, end) in enumerate(zip(attempts, ends, strict=True), start=1)
        ]
        title = f"<h3>{_named(run, runs.index(run))}</h3>" if len(runs) > 1 else ""
        head = ["Attempt", "Began (UTC)", "From", "Last logged step", "Time", "Ended"]
        body += title + f"<p>{_recomputed_sentence(recomputed(run))}</p>" + table(head, rows)
    return Section(anchor="attempts", title="Interruptions", body=body)


def comparison_section(runs: Runs) -> Section | None:
    """Section comparing the training losses of other runs with the first; None for a single run."""
    if len(runs) == 1:
        return None
    rows = []
    for index, run in enumerate(runs[1:], start=1):
        result = compare_losses(runs[0].lines, run.lines)
        rows.append([_named(run, index), *_comparison_cells(result)])
    head = ["Run", "Shared logged steps", "Identical", "Largest difference", "First differs at"]
    lead = f"<p>Training losses against {_named(runs[0], 0)}, compared exactly, step by step.</p>"
    return Section(anchor="comparison", title="Same losses?", body=lead + table(head, rows))


def configuration_section(runs: Runs) -> Section | None:
    """The resolved configuration; for several runs first what differs."""
    if len(runs) == 1:
        groups = {**runs[0].config}
        if runs[0].environment:
            groups["environment"] = runs[0].environment
        return _configuration(_grouped(groups)) if groups else None
    flat = [_flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    if not keys:
        return None
    rows = {key: [_shown(settings.get(key, UNKNOWN)) for settings in flat] for key in keys}
    differing = [[text(key), *cells] for key, cells in rows.items() if len(set(cells)) > 1]
    everything = [[text(key), *cells] for key, cells in rows.items()]
    head = ["Setting", *(_named(run, index) for index, run in enumerate(runs))]
    body = table(head, differing) if differing else "<p>All settings are equal.</p>"
    body += f"<details><summary>All settings</summary>{table(head, everything)}</details>"
    return _configuration(body)


def _configuration(body: str) -> Section:
    return Section(anchor="configuration", title="Configuration", body=body)


def _grouped(groups: Mapping[str, Any]) -> str:
    parts = ""
    for name, values in groups.items():
        settings = _flatten(values) if isinstance(values, dict) else {"": values}
        rows = [[text(key), _shown(value)] for key, value in settings.items()]
        parts += f'<div class="group"><h3>{text(name)}</h3>{table([], rows)}</div>'
    return f'<div class="settings">{parts}</div>'


def _flatten(values: Mapping[Any, Any], prefix: str = "", depth: int = 4) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and depth > 1:
            flat |= _flatten(value, f"{name}.", depth - 1)
        else:
            flat[name] = value
    return flat


def _shown(value: Any) -> str:
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
    return text(shown)


def _in_columns(rows: list[list[str]]) -> str:
    """A long two-column table broken in halves where the page is wide."""
    half = (len(rows) + 1) // 2
    return f'<div class="halves">{table([], rows[:half])}{table([], rows[half:])}</div>'


def _named(run: RunRecord, index: int) -> str:
    return dot(run_color(index)) + text(run.name)


def _best_perplexity(columns: list[Headline]) -> int | None:
    """The column with the lowest best perplexity, when there is something to choose from."""
    found = [
        (column["validation_perplexity_best"], index)
        for index, column in enumerate(columns)
        if column["validation_perplexity_best"] is not None
    ]
    return min(found)[1] if len({value for value, _ in found}) > 1 else None


def _cards(numbers: Headline) -> str:
    first, last = (numbers[f"validation_perplexity_{when}"] for when in ("first", "last"))
    cards = [
        ("Validation perplexity", _perplexity(last), f"from {_perplexity(first)} at the start"),
        ("Training loss", number(numbers["train_loss_last"]), "at the last logged step"),
        ("Tokens", count(numbers["tokens"]), f"in {_steps(numbers)} steps"),
        ("Wall time", duration(numbers["wall_seconds"]), text(numbers["state"])),
        ("Tokens a second", number(numbers["tokens_per_second"], 3), "median"),
        ("Peak memory", size(numbers["peak_memory_bytes"]), "on rank 0"),
    ]
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><span>{title}</span><b>{value}</b><span>{note}</span></div>'
            for title, value, note in cards
            if value != UNKNOWN
        )
        + "</div>"
    )


def _method(numbers: Headline) -> str:
    parts = [numbers["method"], numbers["storage"]]
    if numbers["spectral_rank"] is not None:
        parts.append(f"rank {numbers['spectral_rank']}")
    known = [text(part) for part in parts if part is not None]
    return ", ".join(known) or UNKNOWN


def _parameters(numbers: Headline) -> str:
    trained, total = numbers["parameters_trained"], numbers["parameters_dense"]
    if trained is None and total is None:
        return UNKNOWN
    return f"{count(trained)} of {count(total)}"


def _steps(numbers: Headline) -> str:
    planned = numbers["planned_steps"]
    return count(numbers["steps"]) + (f" of {count(planned)}" if planned else "")


def _perplexity(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.2f}" if value < 1e5 else number(value)


def _best(numbers: Headline) -> str:
    value, step = (numbers[f"validation_perplexity_best{part}"] for part in ("", "_step"))
    return UNKNOWN if value is None else f"{_perplexity(value)} at step {count(step)}"


def _devices(numbers: Headline) -> str:
    size_, device = numbers["world_size"], numbers["device"]
    if device is None:
        return UNKNOWN if size_ is None else f"{count(size_)} processes"
    return text(device) + (f" × {count(size_)}" if size_ is not None else "")


def _non_finite(numbers: Headline) -> str:
    found = numbers["non_finite_losses"]
    return f'<span class="bad">{count(found)} logged steps</span>' if found else UNKNOWN


def _left_out(numbers: Headline) -> str:
    found, back = numbers["steps_left_out"], numbers["went_back_to_steps"]
    if not found and not back:
        return UNKNOWN
    returns = f"; went back {len(back)} ×, to step {', '.join(map(count, back))}" if back else ""
    return f"{count(found)}{returns} (incidents.jsonl)"


def _slowest(numbers: Headline) -> str:
    rank, ratio = numbers["slowest_rank"], numbers["slowest_rank_ratio"]
    return UNKNOWN if rank is None else f"rank {rank}, {ratio:.2f} × the median rank's time"


def _swapped(numbers: Headline) -> str:
    vectors, swaps = numbers["swapped_vectors"], numbers["swaps"]
    return UNKNOWN if vectors is None else f"{count(vectors)} at {count(swaps)} swaps"


def _resumes(numbers: Headline) -> str:
    steps = numbers["resumed_at_steps"]
    if not steps:
        return "never" if numbers["attempts"] <= 1 else "never; restarted from step 0"
    return f"{len(steps)} ×, at step{'s' * (len(steps) > 1)} {', '.join(map(count, steps))}"


_ROWS: dict[str, Callable[[Headline], str]] = {
    "Model": lambda n: UNKNOWN if n["model"] is None else text(n["model"]),
    "Method": _method,
    "Parameters trained": _parameters,
    "Devices": _devices,
    "State": lambda n: text(n["state"]),
    "Steps": _steps,
    "Tokens": lambda n: count(n["tokens"]),
    "Validation perplexity, first": lambda n: _perplexity(n["validation_perplexity_first"]),
    "Validation perplexity, last": lambda n: _perplexity(n["validation_perplexity_last"]),
    "Validation perplexity, best": _best,
    "Training loss, last": lambda n: number(n["train_loss_last"], 5),
    "Loss not finite": _non_finite,
    "Steps left out": _left_out,
    "Slowest rank": _slowest,
    "Wall time": lambda n: duration(n["wall_seconds"]),
    "Tokens a second, median": lambda n: number(n["tokens_per_second"], 4),
    "MFU, median": lambda n: UNKNOWN if n["mfu"] is None else f"{n['mfu']:.1%}",
    "Peak memory": lambda n: size(n["peak_memory_bytes"]),
    "Layers converted": lambda n: count(n["layers_converted"]),
    "Active triplets": lambda n: count(n["active_triplets"]),
    "Vectors swapped": _swapped,
    "Moments reset": lambda n: count(n["moments_reset"]),
    "Resumed": _resumes,
}


def _attempt_row(order: int, lines: list[Line], end: str) -> list[str]:
    times = [line["time"] for line in lines if isinstance(line.get("time"), (int, float))]
    opening = lines[0].get("event")
    began = f"step {count(lines[0]['step'])}" if opening in OPENINGS[1:] else "scratch"
    ended = {"done": "done", "stop": "stopped"}.get(str(lines[-1].get("event")), end)
    return [
        str(order),
        _clock(times[0]) if times else UNKNOWN,
        began,
        count(max(line["step"] for line in lines)),
        duration(max(times) - min(times)) if times else UNKNOWN,
        text(ended),
    ]


def _clock(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, OSError, ValueError):
        return UNKNOWN


def _recomputed_sentence(result: LossComparison) -> str:
    shared, same = result.shared_steps, result.identical_steps
    if not shared:
        return "No logged step was computed twice."
    if same == shared:
        return (
            f'<span class="good">Exact:</span> all {count(shared)} logged losses that were lost '
            "and computed again after a resume are identical."
        )
    return (
        f'<span class="bad">Not exact:</span> of {count(shared)} logged losses that were lost and '
        f"computed again after a resume, {count(shared - same)} differ, by up to "
        f"{number(result.largest_difference)}, first at step {count(result.first_difference_step)}."
    )


def _comparison_cells(result: LossComparison) -> list[str]:
    if not result.shared_steps:
        return ["0", UNKNOWN, UNKNOWN, UNKNOWN]
    same = result.identical_steps == result.shared_steps
    share = f"{count(result.identical_steps)} of {count(result.shared_steps)}"
    return [
        count(result.shared_steps),
        f'<span class="good">all {count(result.shared_steps)}</span>' if same else share,
        "0" if same else number(result.largest_difference),
        UNKNOWN if same else f"step {count(result.first_difference_step)}",
    ]
