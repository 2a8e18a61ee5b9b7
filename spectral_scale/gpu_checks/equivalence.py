"""Every backend on this machine's GPUs against one process on the CPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectral_scale.config.packages import require_package
from spectral_scale.errors import ConfigError
from spectral_scale.gpu_checks.findings import CheckFinding, Figure, at_most, recorded
from spectral_scale.gpu_checks.place import Place
from spectral_scale.gpu_checks.rank_processes import Ranks
from spectral_scale.gpu_checks.runs import largest_gap, make_corpus, words_of
from spectral_scale.metrics.history import load_history

LOSS_LIMIT = 1e-5
"""Largest difference of any step's loss in fp32."""
SECONDS = 240.0
"""Time for one run."""


@dataclass(frozen=True, kw_only=True)
class CheckedLayout:
    """A backend, its settings, and the number of ranks."""

    name: str
    backend: str
    ranks: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)


def _zero(stage: int, ranks: int) -> CheckedLayout:
    settings = {"parallel.zero_stage": stage}
    return CheckedLayout(name=f"ZeRO-{stage}", backend="deepspeed", ranks=ranks, settings=settings)


ALONE = (
    CheckedLayout(name="torch", backend="torch"),
    CheckedLayout(name="FSDP2", backend="fsdp2"),
    *(_zero(stage, 1) for stage in range(4)),
    CheckedLayout(name="Megatron", backend="megatron"),
)
"""Layouts that run on one GPU."""
TOGETHER = (
    CheckedLayout(name="DDP", backend="torch", ranks=2),
    CheckedLayout(name="FSDP2", backend="fsdp2", ranks=2),
    *(_zero(stage, 2) for stage in range(4)),
    CheckedLayout(name="Megatron", backend="megatron", ranks=2),
    CheckedLayout(
        name="Megatron, tensor parallel",
        backend="megatron",
        ranks=2,
        settings={"parallel.tensor_parallel": 2, "parallel.sequence_parallel": True},
    ),
    CheckedLayout(
        name="FSDP2, tensor parallel",
        backend="fsdp2",
        ranks=2,
        settings={"parallel.tensor_parallel": 2},
    ),
    CheckedLayout(name="HSDP", backend="fsdp2", ranks=4, settings={"parallel.shard_group": 2}),
)
"""Layouts that run on several GPUs of one machine."""


def check_backends(place: Place) -> CheckFinding:
    """Each backend on one GPU."""
    return compare(place, ALONE)


def check_backends_on_several_gpus(place: Place) -> CheckFinding:
    """Each backend on two GPUs, and HSDP on four where there are so many."""
    return compare(place, TOGETHER)


def compare(place: Place, layouts: tuple[CheckedLayout, ...]) -> CheckFinding:
    """The largest difference of a loss, for each layout that can run here."""
    corpus = make_corpus(place.folder / "corpus")
    reference = CheckedLayout(name="one CPU process", backend="torch")
    expected, problem = losses_of(place, reference, corpus, device="cpu")
    if expected is None:
        raise RuntimeError(f"the reference on the CPU did not train: {problem}")
    figures: list[Figure] = []
    problems: list[str] = []
    for layout in layouts:
        if reason := cannot_run(place, layout):
            figures.append(recorded(layout.name, f"left out: {reason}"))
            continue
        found, problem = losses_of(place, layout, corpus, device=place.device.type)
        gap = float("inf") if found is None else largest_gap(found, expected)
        figures.append(at_most(f"{layout.name}, difference of the loss", gap, LOSS_LIMIT))
        problems += [f"{layout.name}:\n\n```\n{problem}\n```"] if found is None else []
    return CheckFinding(figures=figures, text="\n\n".join(problems))


def cannot_run(place: Place, layout: CheckedLayout) -> str | None:
    """Why a layout is left out here."""
    if layout.ranks > place.gpus:
        return f"{layout.ranks} GPUs needed"
    if place.rehearsal and layout.backend == "megatron":
        return "Megatron needs a GPU"
    try:
        require_package(layout.backend, what=layout.name)
    except ConfigError as error:
        return str(error)
    return None


def losses_of(
    place: Place, layout: CheckedLayout, corpus: Path, *, device: str
) -> tuple[dict[int, float] | None, str]:
    """Losses by step of a run of `spectral-scale train`; None, and what it printed, if it fails."""
    run_dir = place.folder / f"{layout.name}-{layout.ranks}".replace(", ", "-").replace(" ", "-")
    changes = {"parallel.backend": layout.backend, **layout.settings}
    command = ["spectral_scale", "train", *words_of(corpus, run_dir, device, changes)]
    with Ranks(command, world_size=layout.ranks, folder=run_dir / "output") as ranks:
        codes = ranks.exit_codes(SECONDS)
        if codes != [0] * layout.ranks:
            return None, f"exit codes {codes}\n{ranks.tails()}"
    lines = load_history(run_dir).current()
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}, ""
