"""Several methods for one run, side by side: what each holds, sends, trains and takes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from spectral_scale.config.methods import METHOD_SPECS
from spectral_scale.config.resolve import ResolvedRun, resolve
from spectral_scale.config.schema import RunConfig, SpectralConfig
from spectral_scale.errors import ConfigError
from spectral_scale.plan.build import VERDICTS, Plan, plan_inventory, plan_of
from spectral_scale.plan.estimate import Estimate, estimate_run
from spectral_scale.plan.gpus import Cluster, Rates
from spectral_scale.plan.inventory import Inventory

COMPARED: Mapping[str, Mapping[str, str]] = {
    **{spec.name: {"method": spec.name} for spec in METHOD_SPECS.values() if not spec.chosen_by},
    "sst-factored": {"method": "sst", "storage": "factored"},
    "tangent": {"method": "sst", "form": "tangent"},
}
"""Name in `--compare` -> settings of the spectral section that it stands for."""
SHARED = (
    "spectral_rank",
    "steps_per_iteration",
    "targets",
    "train_dense",
    "sparsity",
    "lora_alpha",
    "bank_device",
)
"""Keys that every method takes over from the run; others have their defaults."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One method of a comparison."""

    name: str
    plan: Plan | None
    """None if the run cannot take the method."""
    estimate: Estimate | None
    """None without a GPU."""
    largest_micro_batch: int | None
    """The largest `train.micro_batch_size` that fits by the plan and divides the batch."""
    refused: str
    """Why there is no plan."""


def compare(
    config: RunConfig,
    names: Sequence[str],
    *,
    world_size: int,
    gpu_memory_bytes: float,
    place: tuple[Rates, Cluster] | None = None,
) -> list[Compared]:
    """Plan the same run with each method. Raises ConfigError for an unknown name, or if no method
    can run.

    Args:
        config: the run; its own method keeps all of its settings.
        names: keys of COMPARED.
        world_size: ranks of the run.
        gpu_memory_bytes: of one rank's GPU.
        place: rates and cluster, to estimate times as well.
    """
    unknown = [name for name in names if name not in COMPARED]
    if unknown or not names:
        raise ConfigError(
            f"--compare {','.join(names)}: {', '.join(unknown) or 'nothing'} is no method; give "
            f"some of {', '.join(COMPARED)}, with commas between"
        )
    found = []
    for name in dict.fromkeys(names):
        try:
            run = resolve(with_method(config, name), world_size=world_size)
        except ConfigError as error:
            found.append(_refused(name, str(error)))
            continue
        found.append(_compared(name, run, gpu_memory_bytes, place))
    if all(row.plan is None for row in found):
        raise ConfigError(f"--compare: no method can run; {found[0].name}: {found[0].refused}")
    return found


def with_method(config: RunConfig, name: str) -> RunConfig:
    """The same run with another method."""
    changes: dict[str, Any] = dict(COMPARED[name])
    given = config.spectral
    if (given.method, given.storage, given.form) == (
        changes["method"],
        changes.get("storage", "residual"),
        changes.get("form", "sst"),
    ):
        return config
    shared = {key: getattr(given, key) for key in SHARED}
    return replace(config, spectral=SpectralConfig(**shared, **changes))


def _refused(name: str, reason: str) -> Compared:
    return Compared(name=name, plan=None, estimate=None, largest_micro_batch=None, refused=reason)


def _compared(
    name: str, run: ResolvedRun, memory: float, place: tuple[Rates, Cluster] | None
) -> Compared:
    run, plan, inventory = plan_inventory(run, gpu_memory_bytes=memory)
    return Compared(
        name=name,
        plan=plan,
        estimate=None if place is None else estimate_run(run, plan, inventory, *place),
        largest_micro_batch=largest_micro_batch(run, inventory, memory),
        refused="",
    )


def largest_micro_batch(run: ResolvedRun, inventory: Inventory, memory: float) -> int | None:
    """The largest micro-batch that divides a rank's part of the batch and fits; None if none."""
    batch = run.config.train.global_batch_size // run.data_parallel_size
    for size in range(batch, 0, -1):
        if batch % size == 0:
            tried = with_micro_batch(run, size)
            if plan_of(tried, inventory, gpu_memory_bytes=memory).verdict == "fits":
                return size
    return None


def with_micro_batch(run: ResolvedRun, size: int) -> ResolvedRun:
    """The same run with another micro-batch, which must divide a rank's part of the batch."""
    train = replace(run.config.train, micro_batch_size=size)
    passes = train.global_batch_size // (size * run.data_parallel_size)
    config = replace(run.config, train=train)
    return replace(run, config=config, gradient_accumulation_steps=passes)


def to_json(rows: Sequence[Compared]) -> list[dict[str, Any]]:
    """Plain values, for --format json."""
    return [asdict(row) for row in rows]


def as_text(rows: Sequence[Compared]) -> str:
    """A table for a terminal, a column for each method, then why others cannot run."""
    shown = [(row, row.plan) for row in rows if row.plan is not None]
    lines: list[tuple[str, list[str]]] = [("", [row.name for row, _ in shown])]

    def add(title: str, cells: Sequence[object]) -> None:
        lines.append((title, [str(cell) for cell in cells]))

    plans = [plan for _, plan in shown]
    add("trained at a time, M", [f"{p.parameters_trained / 1e6:,.1f}" for p in plans])
    for part in plans[0].memory:
        if any(p.memory[part] for p in plans):
            add(part.replace("_", " ") + ", GB", [f"{p.memory[part] / 1e9:.2f}" for p in plans])
    add("peak, GB", [f"{p.needed_bytes / 1e9:.2f}" for p in plans])
    add("", [VERDICTS[p.verdict].split(",")[0] for p in plans])
    add("largest micro-batch", [row.largest_micro_batch or "none" for row, _ in shown])
    add("sent a step, GB", [f"{p.step_traffic_bytes / 1e9:.2f}" for p in plans])
    add("sent at a swap, GB", [f"{p.boundary_traffic_bytes / 1e9:.2f}" for p in plans])
    add("a checkpoint, GB", [f"{p.checkpoint_bytes / 1e9:.1f}" for p in plans])
    times = [row.estimate for row, _ in shown if row.estimate is not None]
    if times:
        add("a step, s", [f"{e.step_seconds:.3f}" for e in times])
        add("of which swaps", [f"{e.swap_share:.2%}" for e in times])
        add("tokens a second", [f"{e.tokens_per_second:,.0f}" for e in times])
        add("MFU", ["" if e.mfu is None else f"{e.mfu:.1%}" for e in times])
        add("GPU-hours", [f"{e.gpu_hours:,.0f}" for e in times])
    first = shown[0][1]
    head = f"{first.model} on {first.world_size} ranks ({first.backend}), of the fullest rank:"
    width = 2 + max(len(cell) for _, cells in lines for cell in cells)
    table = [f"  {title:<26}" + "".join(f"{c:>{width}}" for c in cells) for title, cells in lines]
    refused = [f"  {row.name} cannot run: {row.refused}" for row in rows if row.plan is None]
    notes = [*first.assumptions, *(times[0].assumptions if times else ())]
    return "\n".join([head, *table, *refused, *(f"  assumed: {text}" for text in notes)])
