"""The best layouts of a run on a cluster: the shortest estimated step among those that fit.

All layouts of `layouts` are candidates. They are looked at in the order of a time that none of them
can be below, that of its passes alone, until no other can be among the best: the result is that of
the estimate of every one.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from spectral_scale.config.capability import zero_stage
from spectral_scale.config.methods import chosen_spec
from spectral_scale.config.resolve import ResolvedRun, resolve
from spectral_scale.config.schema import ParallelConfig, RunConfig
from spectral_scale.errors import ConfigError
from spectral_scale.plan.build import Plan, plan_of, verdict, with_vocabulary_of_data
from spectral_scale.plan.estimate import Estimate, estimate_run
from spectral_scale.plan.gpus import GPUS, Cluster, Rates
from spectral_scale.plan.inventory import Inventory, take_inventory
from spectral_scale.plan.memory import memory_of
from spectral_scale.plan.step_time import pass_costs, step_seconds

SHOWN = 5
"""Layouts that are shown, and rejected ones."""
LARGEST_TENSOR_PARALLEL = 8
MORE_NODES = (2, 4, 8, 16, 32, 64, 128)
"""Multiples of the nodes that are tried for a model that does not fit."""


@dataclass(frozen=True, kw_only=True)
class FoundLayout:
    """A layout that fits."""

    run: ResolvedRun
    plan: Plan
    estimate: Estimate

    @property
    def title(self) -> str:
        """The layout in words."""
        return title_of(self.run.config)


@dataclass(frozen=True, kw_only=True)
class RejectedLayout:
    """A layout that does not fit or cannot run."""

    title: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search found."""

    best: tuple[FoundLayout, ...]
    """The shortest steps first."""
    rejected: tuple[RejectedLayout, ...]
    """The first that do not fit though they may be faster, then kinds that cannot run."""
    candidates: int
    """Layouts that can run, whether or not they fit."""
    estimated: int
    """Layouts among them of which memory or time had to be computed."""


def layouts(config: RunConfig, cluster: Cluster) -> Iterator[RunConfig]:
    """Every layout of a run that is a candidate, whether or not it can run: backend, stage, shard
    group, tensor and sequence parallelism, residual, recomputation and micro-batch."""
    for parallel in _parallel(config, cluster):
        ranks = cluster.world_size // parallel.tensor_parallel
        batch = config.train.global_batch_size // ranks
        sizes = [size for size in range(1, batch + 1) if batch % size == 0]
        for recompute in (False, True):
            model = replace(config.model, activation_checkpointing=recompute)
            for size in sizes or [1]:
                train = replace(config.train, micro_batch_size=size)
                yield replace(config, parallel=parallel, model=model, train=train)


def _parallel(config: RunConfig, cluster: Cluster) -> Iterator[ParallelConfig]:
    converts = chosen_spec(config.spectral).converts
    residuals: tuple[Any, ...] = ("sharded", "replicated") if converts else ("auto",)
    parts = [n for n in (2, 4, LARGEST_TENSOR_PARALLEL) if cluster.gpus_per_node % n == 0]
    yield ParallelConfig(backend="torch")
    groups: list[Any] = ["auto"]
    if cluster.nodes > 1 and cluster.gpus_per_node > 1:
        groups.append(cluster.gpus_per_node)
    for residual in residuals:
        for group in groups:
            yield ParallelConfig(backend="fsdp2", shard_group=group, residual=residual)
        for tensor in parts:
            yield ParallelConfig(backend="fsdp2", tensor_parallel=tensor, residual=residual)
    stages: tuple[Any, ...] = (1, 2, 3)
    for stage in stages:
        yield ParallelConfig(backend="deepspeed", zero_stage=stage)
    for tensor in (1, *parts):
        for by_sequence in (False, True) if tensor > 1 else (False,):
            yield ParallelConfig(
                backend="megatron", tensor_parallel=tensor, sequence_parallel=by_sequence
            )


def title_of(config: RunConfig) -> str:
    """A layout in words."""
    parallel = config.parallel
    name = f"zero{zero_stage(parallel)}" if parallel.backend == "deepspeed" else parallel.backend
    words = ["ddp" if name == "torch" else name]
    if parallel.shard_group != "auto":
        words.append(f"shard_group {parallel.shard_group}")
    if parallel.tensor_parallel > 1:
        words.append(f"tensor_parallel {parallel.tensor_parallel}")
    if parallel.sequence_parallel:
        words.append("sequence_parallel")
    if parallel.residual != "auto":
        words.append(f"residual {parallel.residual}")
    words.append(f"micro-batch {config.train.micro_batch_size}")
    if config.model.activation_checkpointing:
        words.append("recompute")
    return ", ".join(words)


def search(
    config: RunConfig,
    rates: Rates,
    cluster: Cluster,
    *,
    gpu_memory_bytes: float,
    wanted: int = SHOWN,
) -> Search:
    """The best layouts of a run. Raises ConfigError if none fits, with the nearest that does.

    Args:
        config: the run; its layout is not looked at.
        rates: what a rank reaches.
        cluster: where it shall run.
        gpu_memory_bytes: of one rank's GPU.
        wanted: number of layouts.
    """
    runs, refused = candidates(config, cluster)
    if not runs:
        raise ConfigError(f"no layout can run: {refused[0].title}: {refused[0].reason}")
    inventory = take_inventory(runs[0].config, runs[0].architecture, runs[0].method)
    ordered = sorted(
        ((_shortest(run, inventory, rates), order, run) for order, run in enumerate(runs)),
        key=lambda entry: entry[:2],
    )
    best: list[tuple[float, int, ResolvedRun, Plan]] = []
    rejected: list[RejectedLayout] = []
    looked_at = 0
    for shortest, order, run in ordered:
        if len(best) == wanted and shortest > best[-1][0]:
            break
        looked_at += 1
        plan = plan_of(run, inventory, gpu_memory_bytes=gpu_memory_bytes)
        if plan.verdict != "fits":
            if not best and len(rejected) < SHOWN:
                rejected.append(_too_large(run, plan))
            continue
        seconds = step_seconds(run, inventory, memory_of(run, inventory), rates, cluster)
        best.append((seconds.step, order, run, plan))
        best = sorted(best, key=lambda entry: entry[:2])[:wanted]
    if not best:
        raise ConfigError(_nearest(config, runs, inventory, cluster, gpu_memory_bytes))
    found = [
        FoundLayout(run=run, plan=plan, estimate=estimate_run(run, plan, inventory, rates, cluster))
        for _, _, run, plan in best
    ]
    return Search(
        best=tuple(found),
        rejected=(*rejected, *refused),
        candidates=len(runs),
        estimated=looked_at,
    )


def candidates(
    config: RunConfig, cluster: Cluster
) -> tuple[list[ResolvedRun], list[RejectedLayout]]:
    """The layouts that can run, and one of each kind that cannot, with the reason."""
    runs: list[ResolvedRun] = []
    refused: dict[str, RejectedLayout] = {}
    vocabulary: int | None = None
    for layout in layouts(config, cluster):
        try:
            run = resolve(layout, world_size=cluster.world_size)
            if vocabulary is None:
                run, _ = with_vocabulary_of_data(run)
                vocabulary = run.architecture.vocab_size
            run = run.with_vocabulary(vocabulary) if run.config.model.path is None else run
        except ConfigError as error:
            reason = _first_problem(error)
            kind = title_of(layout).split(", micro-batch")[0]
            refused.setdefault(kind, RejectedLayout(title=kind, reason=reason))
            continue
        runs.append(run)
    return runs, list(refused.values())


def _first_problem(error: ConfigError) -> str:
    """The first of the problems that an error lists."""
    lines = str(error).splitlines()
    return lines[1].removeprefix("  - ") if len(lines) > 1 else lines[0]


def _shortest(run: ResolvedRun, inventory: Inventory, rates: Rates) -> float:
    return run.gradient_accumulation_steps * pass_costs(run, inventory).seconds(rates)


def _too_large(run: ResolvedRun, plan: Plan) -> RejectedLayout:
    needed = f"{plan.needed_bytes / 1e9:.1f} of {plan.gpu_memory_bytes / 1e9:.0f} GB a rank"
    return RejectedLayout(title=title_of(run.config), reason=f"does not fit: {needed}")


def _nearest(
    config: RunConfig,
    runs: list[ResolvedRun],
    inventory: Inventory,
    cluster: Cluster,
    memory: float,
) -> str:
    """Why nothing fits, and the smallest change by which something does."""
    least, run = _least(runs, inventory)
    text = (
        f"no layout fits into {memory / 1e9:.0f} GB a rank on {cluster.nodes} x "
        f"{cluster.gpus_per_node} {cluster.gpu.name}; the nearest, {title_of(run.config)}, needs "
        f"{least / 1e9:.1f} GB"
    )
    for times in MORE_NODES:
        larger = replace(cluster, nodes=times * cluster.nodes)
        more, _ = candidates(config, larger)
        if more and _fits(_least(more, inventory)[0], memory):
            return f"{text}; take {larger.nodes} nodes"
    enough = [g for g in GPUS.values() if _fits(least, g.memory_bytes) and g.memory_bytes > memory]
    if enough:
        smallest = min(enough, key=lambda g: g.memory_bytes)
        return f"{text}; take {smallest.name}"
    return f"{text}; choose a smaller model, or a lower spectral.spectral_rank"


def _least(runs: list[ResolvedRun], inventory: Inventory) -> tuple[int, ResolvedRun]:
    """The smallest peak of all layouts, and its layout: one with the smallest micro-batch, or one
    without accumulation, of which FSDP2 keeps fewer whole gradients."""
    small = [
        run
        for run in runs
        if run.config.model.activation_checkpointing
        and (run.config.train.micro_batch_size == 1 or run.gradient_accumulation_steps == 1)
    ]
    tried = small or runs
    needed = [plan_of(run, inventory, gpu_memory_bytes=1.0).needed_bytes for run in tried]
    index = needed.index(min(needed))
    return needed[index], tried[index]


def _fits(needed: float, memory: float) -> bool:
    return verdict(needed, memory) == "fits"


def to_json(found: Search) -> dict[str, Any]:
    """Plain values, for --format json."""
    return {
        "best": [
            {"title": x.title, "plan": asdict(x.plan), "estimate": asdict(x.estimate)}
            for x in found.best
        ],
        "rejected": [asdict(layout) for layout in found.rejected],
        "candidates": found.candidates,
        "estimated": found.estimated,
    }


def as_text(found: Search) -> str:
    """The layouts as lines for a terminal."""
    first = found.best[0]
    where = f"{first.estimate.nodes} x {first.estimate.gpus_per_node} {first.estimate.gpu}"
    lines = [
        f"{first.plan.model} on {where}: the best of {found.candidates} layouts "
        f"({found.estimated} estimated, the others cannot be faster)",
        f"  {'s a step':>9}{'tokens/s':>12}{'MFU':>7}{'peak, GB':>10}{'sent, GB':>10}  layout",
    ]
    for layout in found.best:
        e, p = layout.estimate, layout.plan
        mfu = "" if e.mfu is None else f"{e.mfu:.1%}"
        lines.append(
            f"  {e.step_seconds:>9.3f}{e.tokens_per_second:>12,.0f}{mfu:>7}"
            f"{p.needed_bytes / 1e9:>10.1f}{p.step_traffic_bytes / 1e9:>10.2f}  {layout.title}"
        )
    lines += [f"  not {x.title}: {x.reason}" for x in found.rejected]
    return "\n".join(lines + [f"  assumed: {text}" for text in first.estimate.assumptions])
