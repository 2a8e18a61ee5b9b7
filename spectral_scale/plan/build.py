"""The plan of a run: memory by part, traffic, batch arithmetic and a verdict."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.config.schema import RunConfig
from spectral_scale.plan.activations import ASSUMPTIONS, activation_bytes, master_itemsize
from spectral_scale.plan.filter_needs import filter_needs
from spectral_scale.plan.inventory import Inventory, take_inventory
from spectral_scale.plan.memory import memory_of
from spectral_scale.plan.method_needs import method_memory
from spectral_scale.plan.traffic import traffic_of

if TYPE_CHECKING:
    from spectral_scale.methods.base import Method

Fit = Literal["fits", "tight", "no"]
RESERVED_BYTES = 2e9
"""CUDA's context, NCCL's buffers and libraries."""
FITS, TIGHT = 0.85, 0.97
"""Fractions of the memory; the rest is for fragmentation and for what the formulas leave out."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Computed, not measured; bytes of the fullest rank."""

    model: str
    backend: str
    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    tokens_per_step: int
    parameters_trained: int
    parameters_frozen: int
    memory: dict[str, int]
    """Part -> bytes, `activations` and `reserved` included."""
    peak_bytes: int
    """The larger of what a step needs and what a swap needs."""
    start_peak_bytes: int
    """What the start needs: the model gets its memory, then owners decompose matrices."""
    host_bytes: int
    """Bytes of a rank that are offloaded to host memory."""
    checkpoint_bytes: int
    """Bytes of one checkpoint on disk, all ranks together."""
    step_traffic_bytes: int
    """Bytes over each rank's links in an optimizer step."""
    boundary_traffic_bytes: int
    """Bytes over each rank's links at a swap, merge or refresh."""
    boundary_every_steps: int
    """Number of steps between swaps, merges or refreshes; 0: there are none."""
    gpu_memory_bytes: float
    verdict: Fit
    assumptions: tuple[str, ...]

    @property
    def needed_bytes(self) -> int:
        """The larger peak, which the verdict is about."""
        return max(self.peak_bytes, self.start_peak_bytes)

    def summary(self) -> str:
        """The plan in one line for a person."""
        return (
            f"{self.model} on {self.world_size} ranks ({self.backend}): "
            f"{self.needed_bytes / 1e9:.1f} of {self.gpu_memory_bytes / 1e9:.0f} GB a rank by "
            f"formula: {VERDICTS[self.verdict]}"
        )


VERDICTS: dict[Fit, str] = {
    "fits": "fits",
    "tight": "tight, it may run out of memory",
    "no": "does not fit",
}


def plan_run(
    run: ResolvedRun,
    *,
    gpu_memory_bytes: float,
    methods: "Mapping[str, Method] | None" = None,
) -> Plan:
    """Compute the plan of a run. Raises ConfigError if the data does not fit the run.

    Args:
        run: the resolved run.
        gpu_memory_bytes: of one rank's GPU.
        methods: implementation by name; by default the shipped ones.
    """
    return plan_inventory(run, gpu_memory_bytes=gpu_memory_bytes, methods=methods)[1]


def plan_inventory(
    run: ResolvedRun,
    *,
    gpu_memory_bytes: float,
    methods: "Mapping[str, Method] | None" = None,
) -> tuple[ResolvedRun, Plan, Inventory]:
    """The run with the vocabulary of its data, its plan, and the parameters that it is of."""
    run, vocabulary = with_vocabulary_of_data(run)
    inventory = take_inventory(run.config, run.architecture, run.method, methods)
    plan = plan_of(run, inventory, gpu_memory_bytes=gpu_memory_bytes, notes=vocabulary)
    return run, plan, inventory


def plan_of(
    run: ResolvedRun,
    inventory: Inventory,
    *,
    gpu_memory_bytes: float,
    notes: tuple[str, ...] = (),
) -> Plan:
    """The plan of a run whose vocabulary and parameters are known.

    Args:
        run: the resolved run.
        inventory: its parameters, which do not depend on how it is distributed.
        gpu_memory_bytes: of one rank's GPU.
        notes: further assumptions.
    """
    config = run.config
    needs = memory_of(run, inventory)
    activations = activation_bytes(config, run.architecture, run.method).total
    traffic = traffic_of(run, inventory)
    memory = {
        "weights": needs.weights,
        "gradients": needs.gradients,
        "optimizer": needs.optimizer,
        "bank": needs.bank,
        "gathered": needs.gathered,
        "activations": activations,
        "svd_workspace": needs.svd_workspace,
        "filter_workspace": needs.filter_workspace,
        "reserved": round(RESERVED_BYTES),
    }
    kept = needs.weights + needs.optimizer + needs.bank + memory["reserved"]
    step = needs.gradients + needs.gathered + activations
    filtering = needs.gradients + needs.filter_workspace
    peak = kept + max(step, needs.svd_workspace, filtering)
    start = kept + max(needs.starting, needs.svd_workspace)
    return Plan(
        model=config.model.name or str(config.model.path),
        backend=run.capability_row,
        world_size=run.world_size,
        micro_batch_size=config.train.micro_batch_size,
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        tokens_per_step=config.train.global_batch_size * config.model.sequence_length,
        parameters_trained=inventory.numel(trainable=True),
        parameters_frozen=inventory.numel(trainable=False),
        memory=memory,
        peak_bytes=peak,
        start_peak_bytes=start,
        host_bytes=needs.host,
        checkpoint_bytes=checkpoint_bytes(config, inventory),
        step_traffic_bytes=traffic.step,
        boundary_traffic_bytes=traffic.swap,
        boundary_every_steps=config.spectral.steps_per_iteration if run.method.swaps else 0,
        gpu_memory_bytes=gpu_memory_bytes,
        verdict=verdict(max(peak, start), gpu_memory_bytes),
        assumptions=(
            *notes,
            ASSUMPTIONS,
            *needs.notes,
            f"reserved: {RESERVED_BYTES / 1e9:.0f} GB for CUDA's context and NCCL",
        ),
    )


def with_vocabulary_of_data(run: ResolvedRun) -> tuple[ResolvedRun, tuple[str, ...]]:
    """Take the embedding's rows from the data, or keep the preset's and note that."""
    from spectral_scale.data.tokens import open_tokens
    from spectral_scale.engine.data import with_vocabulary

    config = run.config
    if Path(config.data.train).is_dir():
        return with_vocabulary(run, open_tokens(config.data.train)), ()
    if config.model.path is not None or config.model.vocab_size != "auto":
        return run, ()
    return run, (f"vocabulary: the preset's, as data.train={config.data.train} is not here",)


def verdict(peak_bytes: float, gpu_memory_bytes: float) -> Fit:
    """Whether a peak fits into a device's memory."""
    share = peak_bytes / gpu_memory_bytes
    return "fits" if share <= FITS else "tight" if share <= TIGHT else "no"


def disk_bytes(run: ResolvedRun) -> int:
    """Bytes of one checkpoint of a run; see `checkpoint_bytes`. Raises ConfigError."""
    run, _ = with_vocabulary_of_data(run)
    return checkpoint_bytes(run.config, take_inventory(run.config, run.architecture, run.method))


def checkpoint_bytes(config: RunConfig, inventory: Inventory) -> int:
    """Trained weights and their moments, the bank or the frozen weights' fp32 truth, and what the
    spectral filter keeps."""
    method = method_memory(config, inventory, world_size=1).saved
    filtered = filter_needs(config, inventory, world_size=1).saved
    trained = 3 * master_itemsize(config) * inventory.numel(trainable=True)
    trained -= inventory.lighter_bytes(config)
    return trained + method + filtered


def to_json(plan: Plan) -> dict[str, Any]:
    """Plain values, for --format json."""
    return asdict(plan) | {"assumptions": list(plan.assumptions)}
