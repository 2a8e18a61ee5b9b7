"""What keeps a step from being fast: waits for the device, recompilations, saves that stall."""

from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from spectral_scale.errors import ConfigError
from spectral_scale.gpu_checks.findings import CheckFinding, Figure, at_most, equal, holds, recorded
from spectral_scale.gpu_checks.place import Place
from spectral_scale.gpu_checks.runs import (
    LLAMA,
    largest_gap,
    make_corpus,
    resolved,
    small_config,
    train_here,
)
from spectral_scale.gpu_checks.synchronisations import SyncCounter, counting_syncs

ALLOWED_SYNCS = 1
"""Waits of an ordinary step: the one that reads whether the step was healthy."""
WARM_STEPS = 3
"""Steps before the counting begins; the first ones build things."""
QUIET_STEPS = 6
LISTED = 5
"""Lines that the page names."""
COMPILED_LIMIT = 1e-3
"""Largest difference of a compiled run's loss."""
STALL_LIMIT = 0.05
"""Share of a background save for which training may stand still."""


def check_synchronisations(place: Place) -> CheckFinding:
    """Waits in a step that neither logs, swaps nor saves, of OPT and LLaMA in bf16.

    In a rehearsal they are recorded only: reads that cost nothing on a CPU count as well.
    """
    corpus = make_corpus(place.folder / "corpus")
    figures: list[Figure] = []
    lines: list[str] = []
    for name, model in (("OPT", {}), ("LLaMA", LLAMA)):
        counts, places = syncs_of_steps(place, corpus, name.lower(), model)
        title, most = f"{name}, waits of a step", max(counts)
        judge = not place.rehearsal
        figures.append(at_most(title, most, ALLOWED_SYNCS) if judge else recorded(title, most))
        lines += [f"- {name}: `{where}`, {count} times" for where, count in places.items()]
    listed = f"Lines that waited, over {QUIET_STEPS} steps:\n\n" + "\n".join(lines)
    return CheckFinding(figures=figures, text=listed if lines else "")


def syncs_of_steps(
    place: Place, corpus: Path, name: str, model: dict[str, Any]
) -> tuple[list[int], dict[str, int]]:
    """Waits of each quiet step, and how often each line waited."""
    changes = {
        "spectral.steps_per_iteration": 1000,
        "metrics.log_interval": 1000,
        "health.replica_interval": 0,
        "train.precision": "bf16",
        "train.steps": WARM_STEPS + QUIET_STEPS + 1,
    }
    totals: list[int] = []
    with ExitStack() as stack:
        counters: list[SyncCounter] = []

        def watch(number: int) -> None:
            if number == WARM_STEPS:
                counters.append(stack.enter_context(counting_syncs(place)))
            totals.extend(counter.count for counter in counters)
            if number == WARM_STEPS + QUIET_STEPS:
                stack.close()  # the last step logs and saves

        train_here(small_config(place, corpus, name, changes | model), watch=watch)
    counts = [after - before for before, after in pairwise(totals)]
    return counts, dict(counters[0].places.most_common(LISTED))


# -- compilation -----------------------------------------------------------------------------


def check_compile(place: Place) -> CheckFinding:
    """Compiled blocks on each backend of one process that takes them."""
    corpus = make_corpus(place.folder / "corpus")
    figures: list[Figure] = []
    for backend in ("torch", "fsdp2"):
        changes = {"model.compile": True, "parallel.backend": backend}
        config = small_config(place, corpus, f"compiled-{backend}", changes)
        try:
            resolved(config)
        except ConfigError:
            figures.append(recorded(f"{backend}", "does not take model.compile"))
            continue
        figures += compiled_against_eager(place, corpus, backend)
    return CheckFinding(figures=figures)


def compiled_against_eager(place: Place, corpus: Path, backend: str) -> list[Figure]:
    """A compiled run over two swaps against the same one that is not compiled."""
    torch._dynamo.reset()
    graphs: list[int] = []
    changes = {"parallel.backend": backend}
    eager = train_here(small_config(place, corpus, f"eager-{backend}", changes))
    config = small_config(place, corpus, f"compiled-{backend}", changes | {"model.compile": True})
    compiled = train_here(config, watch=lambda _: graphs.append(compiled_graphs()))
    graphs.append(compiled_graphs())
    first_swap = config.spectral.steps_per_iteration
    gap = largest_gap(compiled.series("train/loss"), eager.series("train/loss"))
    return [
        holds(
            f"{backend}, graphs before the first swap",
            graphs[first_swap - 1] > graphs[0],
            value=str(graphs[first_swap - 1] - graphs[0]),
            required="at least 1",
        ),
        equal(f"{backend}, graphs compiled after it", graphs[-1] - graphs[first_swap - 1], 0),
        at_most(f"{backend}, difference of the loss", gap, COMPILED_LIMIT),
    ]


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


# -- saving ----------------------------------------------------------------------------------


def check_async_save(place: Place) -> CheckFinding:
    """How long training stands still for a background save, as a share of the save."""
    corpus = make_corpus(place.folder / "corpus")
    step = 3
    changes = {
        "model.name": place.choose("opt-125m", "opt-tiny"),
        "model.hidden_size": place.choose("null", 64),
        "model.num_layers": place.choose("null", 2),
        "model.num_heads": place.choose("null", 4),
        "model.vocab_size": place.choose(50272, "auto"),
        "spectral.steps_per_iteration": 1000,
        "train.precision": "bf16",
        "train.steps": step + 1,
        "checkpoint.interval": step,
        "checkpoint.async_save": True,
    }
    trained = train_here(small_config(place, corpus, "run", changes))
    stall = trained.series("checkpoint/save_seconds")[step]
    save = trained.loop.saver.last_seconds
    return CheckFinding(figures=stall_figures(stall, save, judge=not place.rehearsal))


def stall_figures(stall: float, save: float, *, judge: bool) -> list[Figure]:
    """The stall as a share of the save; times of a rehearsal are not judged."""
    share = stall / save
    name = "stall / save"
    return [
        recorded("stall, s", stall),
        recorded("save, s", save),
        at_most(name, share, STALL_LIMIT) if judge else recorded(name, share),
    ]
