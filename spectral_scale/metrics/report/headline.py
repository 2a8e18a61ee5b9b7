"""The numbers a run is judged by, and whether two runs computed the same losses."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spectral_scale.config.methods import METHOD_SPECS, named_method
from spectral_scale.config.methods.spec import MethodSpec
from spectral_scale.metrics.history import Line
from spectral_scale.metrics.report.run import RunRecord, Series

LOSS = "train/loss"
UNKNOWN = MethodSpec(name="unknown", title="unknown")
"""Stands for the method of a run whose configuration names none of this version's."""


@dataclass(frozen=True, kw_only=True)
class LossComparison:
    """Two records of `train/loss`, step by step."""

    shared_steps: int
    """Logged steps that both have."""
    identical_steps: int
    """Shared steps with exactly equal losses (NaN equals NaN)."""
    largest_difference: float | None
    """Largest absolute difference over the shared steps; None without one."""
    first_difference_step: int | None
    """The first step whose losses differ; None when none does."""


def headline(run: RunRecord) -> dict[str, Any]:
    """Headline numbers of a run under stable names; None where the run does not say.

    `wall_seconds` sums the attempts from first to last logged line; `tokens_per_second` and
    `mfu` are medians over the logged steps; memory is in bytes.
    """
    return {
        "name": run.name,
        "run_dir": str(run.run_dir),
        "state": state(run),
        **_identity(run),
        "steps": int(run.lines[-1]["step"]) if run.lines else None,
        "planned_steps": run.setting("train", "steps"),
        "tokens": _whole(_last(run.series("train/tokens"))),
        "train_loss_last": _last(run.series(LOSS)),
        "non_finite_losses": int((~np.isfinite(run.series(LOSS).values)).sum()),
        **_perplexity(run),
        "wall_seconds": wall_seconds(run),
        "tokens_per_second": _median(run.series("train/tokens_per_second")),
        "mfu": _median(run.series("train/mfu")),
        "peak_memory_bytes": _whole(_largest(run.series("memory/peak_bytes"))),
        "swaps": int((run.series("spectral/swapped_vectors").values > 0).sum()),
        "swapped_vectors": _whole(_total(run.series("spectral/swapped_vectors"))),
        "moments_reset": _whole(_total(run.series("spectral/moments_reset"))),
        "attempts": len(run.history.attempts()),
        "resumed_at_steps": run.history.resume_steps(),
        "went_back_to_steps": run.history.rollback_steps(),
        "steps_left_out": sum("health/skipped" in line for line in run.lines),
        **_slowest_rank(run),
        "recomputed": asdict(recomputed(run)),
    }


def state(run: RunRecord) -> str:
    """State of the run according to status.json, or to the last logged event."""
    for key in ("state", "status"):
        if isinstance(run.status.get(key), str):
            found: str = run.status[key]
            return "running or killed" if found == "running" else found
    events = [line["event"] for line in run.history.lines if isinstance(line.get("event"), str)]
    last = events[-1] if events else None
    return {"done": "done", "stop": "stopped"}.get(str(last), "running or killed")


def validation_perplexity(run: RunRecord) -> Series:
    """`validation/perplexity`, or exp(`validation/loss`) where only that was logged."""
    series = run.series("validation/perplexity")
    if len(series):
        return series
    loss = run.series("validation/loss")
    with np.errstate(over="ignore"):
        return Series(steps=loss.steps, values=np.exp(loss.values))


def wall_seconds(run: RunRecord) -> float | None:
    """Seconds between the first and the last line of each attempt, summed."""
    total, known = 0.0, False
    for attempt in run.history.attempts():
        times = [line["time"] for line in attempt if isinstance(line.get("time"), (int, float))]
        if times:
            known = True
            total += max(times) - min(times)
    return total if known else None


def recomputed(run: RunRecord) -> LossComparison:
    """Losses that a kill lost against those computed again after the resume."""
    return compare_losses(run.history.superseded(), run.lines)


def compare_losses(first: Sequence[Line], second: Sequence[Line]) -> LossComparison:
    """Compare two records of `train/loss` exactly; steps may repeat in `first`."""
    of_second = {line["step"]: line[LOSS] for line in second if _has_loss(line)}
    pairs = [
        (line["step"], line[LOSS], of_second[line["step"]])
        for line in first
        if _has_loss(line) and line["step"] in of_second
    ]
    differing = sorted(step for step, a, b in pairs if not _same(a, b))
    return LossComparison(
        shared_steps=len(pairs),
        identical_steps=len(pairs) - len(differing),
        largest_difference=max((_distance(a, b) for _, a, b in pairs), default=None),
        first_difference_step=differing[0] if differing else None,
    )


def _identity(run: RunRecord) -> dict[str, Any]:
    method, form = run.setting("spectral", "method"), run.setting("spectral", "form")
    spec = METHOD_SPECS.get(named_method(str(method), form), UNKNOWN)
    spectral = {key: run.setting("spectral", key) for key in spec.headline_settings}
    return {
        "model": run.setting("model", "path") or run.setting("model", "name"),
        "method": method,
        "storage": spectral.get("storage") or spectral.get("form"),
        "spectral_rank": spectral.get("spectral_rank"),
        "parameters_trained": run.fact("parameters_trained"),
        "parameters_dense": run.fact("parameters_dense"),
        "layers_converted": _whole(_last(run.series("spectral/layers"))),
        "active_triplets": _whole(_last(run.series("spectral/active_triplets"))),
        "world_size": run.fact("world_size"),
        "device": run.fact("device"),
    }


def _slowest_rank(run: RunRecord) -> dict[str, Any]:
    """The rank that was slowest most often, and by how much: median of its time over the median
    rank's."""
    ranks = run.series("ranks/slowest").values
    if not len(ranks):
        return {"slowest_rank": None, "slowest_rank_ratio": None}
    rank = int(np.bincount(ranks.astype(np.int64)).argmax())
    own = run.series("ranks/slowest_seconds").values[ranks == rank]
    median = run.series("ranks/median_seconds").values[ranks == rank]
    ratio = float(np.median(own / np.maximum(median, 1e-9)))
    return {"slowest_rank": rank, "slowest_rank_ratio": ratio}


def _perplexity(run: RunRecord) -> dict[str, Any]:
    series = validation_perplexity(run)
    finite = series.finite()
    best = int(np.argmin(finite.values)) if len(finite) else None
    return {
        "validation_perplexity_first": float(series.values[0]) if len(series) else None,
        "validation_perplexity_last": _last(series),
        "validation_perplexity_best": None if best is None else float(finite.values[best]),
        "validation_perplexity_best_step": None if best is None else int(finite.steps[best]),
    }


def _has_loss(line: Line) -> bool:
    return isinstance(line.get(LOSS), (int, float))


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _distance(a: float, b: float) -> float:
    return 0.0 if _same(a, b) else abs(a - b)


def _last(series: Series) -> float | None:
    return float(series.values[-1]) if len(series) else None


def _largest(series: Series) -> float | None:
    return float(finite.values.max()) if len(finite := series.finite()) else None


def _total(series: Series) -> float | None:
    return float(finite.values.sum()) if len(finite := series.finite()) else None


def _median(series: Series) -> float | None:
    return float(np.median(finite.values)) if len(finite := series.finite()) else None


def _whole(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else int(value)
