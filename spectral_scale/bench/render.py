"""A measurement as JSON and as Markdown."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from spectral_scale.bench.results import Spread, StepBench, VariantResult
from spectral_scale.bench.sampling import PHASES


def to_json(bench: StepBench) -> str:
    """Every number, in seconds and bytes."""
    return json.dumps(asdict(bench), indent=2)


def to_markdown(bench: StepBench) -> str:
    """Tables for a person: time, swaps, memory, and the machine they were measured on."""
    parts = [_heading(bench), _warning(bench), _steps(bench), _swaps(bench), _memory(bench)]
    return "\n\n".join(part for part in (*parts, _machine(bench)) if part)


def _heading(bench: StepBench) -> str:
    s = bench.settings
    what = "whole model" if s.whole_model else "no embeddings, no head"
    return (
        f"### One training step: {s.model}, {bench.blocks} block(s) ({what}), {s.dtype}\n\n"
        f"{s.batch_size} x {s.sequence_length} tokens, spectral rank {s.spectral_rank}, "
        f"{s.steps} interleaved steps each. Medians, quartiles in brackets; ratios are to the "
        "dense step of the same round."
    )


def _warning(bench: StepBench) -> str:
    return "" if bench.warning is None else f"**Warning:** {bench.warning}."


def _steps(bench: StepBench) -> str:
    header = ["", "step", *PHASES, "step / dense", "CPU time / dense"]
    rows = [
        [
            r.variant,
            _seconds(r.step_seconds, spread_shown=True),
            *(_seconds(r.phase_seconds[phase]) for phase in PHASES),
            _ratio(r.step_ratio),
            _ratio(r.cpu_ratio),
        ]
        for r in bench.results
    ]
    return _table(header, rows)


def _swaps(bench: StepBench) -> str:
    steps = bench.settings.steps_per_iteration
    header = [
        "swaps",
        "swap",
        "swap and SVD",
        "T2",
        f"a step (T3 = {steps})",
        "of a step",
        "of its CPU time",
    ]
    rows = [
        [
            r.variant,
            f"{r.boundary.swap_seconds:.3f} s",
            f"{r.boundary.redecompose_seconds:.3f} s",
            str(r.boundary.iterations_per_round),
            f"{1000 * r.boundary.amortised_seconds:.2f} ms",
            f"{100 * r.boundary.share_of_step:.2f} %",
            f"{100 * r.boundary.cpu_share_of_step:.2f} %",
        ]
        for r in bench.results
        if r.boundary is not None
    ]
    return _table(header, rows) if rows else ""


def _memory(bench: StepBench) -> str:
    uses = list(bench.results[0].state_bytes)
    dense = sum(bench.results[0].state_bytes.values())
    header = ["state, MB", *uses, "sum", "formula", "counted / formula", "/ dense", "no bank"]
    return _table(header, [_memory_row(r, uses, dense) for r in bench.results])


def _memory_row(result: VariantResult, uses: Sequence[str], dense: int) -> list[str]:
    counted = result.state_bytes
    total, formula = sum(counted.values()), sum(result.formula_bytes.values())
    return [
        result.variant,
        *(f"{counted[use] / 1e6:.1f}" for use in uses),
        f"{total / 1e6:.1f}",
        f"{formula / 1e6:.1f}",
        f"{total / formula:.4f}",
        f"{total / dense:.3f}",
        f"{(total - counted['bank']) / dense:.3f}",
    ]


def _machine(bench: StepBench) -> str:
    m, threads = bench.machine, bench.settings.threads
    where = m.gpu or f"{m.cpu} ({m.cpu_capability}), {threads} of {m.cpus} processors"
    return (
        f"Measured on {where}, {m.memory_bytes / 2**30:.0f} GiB, {m.system}, Python {m.python}, "
        f"torch {m.torch}. Load average {bench.load_average_at_start:.2f} before, "
        f"{bench.load_average_at_end:.2f} after (this process included); other processes kept "
        f"{bench.other_processors_busy:.2f} processors busy."
    )


def _seconds(spread: Spread, *, spread_shown: bool = False) -> str:
    text = f"{spread.median:.4f} s"
    if not spread_shown:
        return text
    return f"{text} [{spread.lower_quartile:.4f}, {spread.upper_quartile:.4f}]"


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.3f} [{spread.lower_quartile:.3f}, {spread.upper_quartile:.3f}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
