"""Runs that must repeat bit for bit, and swaps that must not depend on where the bank lies."""

import shutil
from pathlib import Path
from typing import Any

from spectral_scale.gpu_checks.findings import CheckFinding, Figure, equal, holds, recorded
from spectral_scale.gpu_checks.place import Place
from spectral_scale.gpu_checks.runs import (
    LLAMA,
    Trained,
    different,
    largest_gap,
    make_corpus,
    resolved,
    small_config,
    train_here,
)
from spectral_scale.plan.build import RESERVED_BYTES, plan_run

HALFWAY = 5
"""The step from which a run is resumed; swaps follow after it."""
LISTED = 3


def check_determinism(place: Place) -> CheckFinding:
    """OPT and LLaMA: the same run twice, and one that goes on from a checkpoint."""
    corpus = make_corpus(place.folder / "corpus")
    figures: list[Figure] = []
    for name, model in (("OPT", {}), ("LLaMA", LLAMA)):
        figures += repeated(place, corpus, name, model)
    return CheckFinding(figures=figures)


def repeated(place: Place, corpus: Path, name: str, model: dict[str, Any]) -> list[Figure]:
    """Three runs of one model: undisturbed, again, and resumed halfway."""
    changes = model | {"train.deterministic": True, "checkpoint.interval": HALFWAY}
    configs = {
        part: small_config(place, corpus, f"{name.lower()}-{part}", changes)
        for part in ("first", "again", "resumed")
    }
    first = train_here(configs["first"])
    expected = first.tensors()
    again = train_here(configs["again"])
    halfway_copy(Path(configs["first"].train.run_dir), Path(configs["resumed"].train.run_dir))
    resumed = train_here(configs["resumed"])
    return [
        *same_run(f"{name}, repeated", again, first, expected),
        *same_run(f"{name}, resumed at step {HALFWAY}", resumed, first, expected, after=HALFWAY),
    ]


def halfway_copy(run_dir: Path, target: Path) -> None:
    """Copy a run folder as it was when the checkpoint of `HALFWAY` had been written."""
    shutil.copytree(run_dir, target)
    for folder in (target / "checkpoints").iterdir():
        if folder.name != f"step_{HALFWAY:08d}":
            shutil.rmtree(folder)


def same_run(
    name: str, found: Trained, first: Trained, expected: dict[str, Any], after: int = 0
) -> list[Figure]:
    """Whether two runs have the same losses, from a step on, and the same state to the bit."""
    losses = {s: v for s, v in first.series("train/loss").items() if s > after}
    wrong = different(found.tensors(), expected)
    text = f"{len(expected) - len(wrong)} of {len(expected)}"
    if wrong:
        text += f" ({', '.join(wrong[:LISTED])} differ)"
    return [
        equal(
            f"{name}: difference of the loss", largest_gap(found.series("train/loss"), losses), 0
        ),
        holds(f"{name}: equal tensors", not wrong, value=text, required="all"),
    ]


# -- the bank's place ------------------------------------------------------------------------


def check_swap(place: Place) -> CheckFinding:
    """Two rounds with the bank on the model's device and in the host's memory."""
    corpus = make_corpus(place.folder / "corpus")
    figures: list[Figure] = []
    runs: dict[str, Trained] = {}
    for bank_device in ("model", "cpu"):
        place.reset_peak()
        changes = {
            "spectral.bank_device": bank_device,
            "spectral.spectral_rank": place.choose(64, 8),
            "model.hidden_size": place.choose(1024, 64),
            "model.num_heads": place.choose(16, 4),
        }
        config = small_config(place, corpus, f"bank-{bank_device}", changes)
        runs[bank_device] = train_here(config)
        plan = plan_run(resolved(config), gpu_memory_bytes=80e9)
        planned = plan.needed_bytes - RESERVED_BYTES
        figures += peak_figures(f"bank on {bank_device}", place.peak_bytes(), planned)
    return CheckFinding(figures=[*same_triplets(runs["cpu"], runs["model"]), *figures])


def same_triplets(found: Trained, expected: Trained) -> list[Figure]:
    """Whether two runs drew the same triplets and had the same losses."""
    a, b = (
        {n: t for n, t in run.tensors().items() if n.endswith("/active")}
        for run in (found, expected)
    )
    wrong = different(a, b)
    gap = largest_gap(found.series("train/loss"), expected.series("train/loss"))
    return [
        holds(
            "matrices with the same triplets",
            bool(b) and not wrong,
            value=f"{len(b) - len(wrong)} of {len(b)}",
            required="all",
        ),
        equal("difference of the loss", gap, 0),
    ]


def peak_figures(name: str, peak: int | None, planned: float) -> list[Figure]:
    """The measured peak against the plan's, in MB; only a GPU can tell it."""
    title = f"{name}: peak, MB"
    if peak is None:
        return [recorded(title, "not measured on a CPU"), recorded(f"{title} of the plan",
                planned / 1e6)]  # fmt: skip
    return [
        holds(
            title,
            peak <= planned,
            value=f"{peak / 1e6:.0f}",
            required=f"at most {planned / 1e6:.0f}, the plan's",
        )
    ]
