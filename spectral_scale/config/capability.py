"""What each backend can do: every "yes" names the test that proves it, every "no" its reason.

`check_config` refuses what a backend cannot do before anything starts. No torch here.
"""

from collections.abc import Iterator, Mapping

from spectral_scale.config.methods import chosen_spec
from spectral_scale.config.methods.spec import MethodSpec
from spectral_scale.config.schema import ParallelConfig, RunConfig
from spectral_scale.config.support import FEATURES, No, Support, Yes
from spectral_scale.config.support_deepspeed import DEEPSPEED
from spectral_scale.config.support_fsdp2 import FSDP2, FSDP2_TP, HSDP
from spectral_scale.config.support_megatron import MEGATRON
from spectral_scale.config.support_torch import TORCH


def variant(parallel: ParallelConfig, *, world_size: int) -> str:
    """The row of the table that a configuration runs on.

    On 8 ranks: `zero3+offload` for DeepSpeed with zero_stage 3 and offload cpu; `fsdp2+tp` for
    FSDP2 with tensor_parallel 2; `hsdp` for FSDP2 with shard_group 4, which makes two replicas;
    `fsdp2` for FSDP2 with shard_group auto.
    """
    if parallel.backend == "deepspeed":
        suffix = "+offload" if parallel.offload == "cpu" else ""
        return f"zero{zero_stage(parallel)}{suffix}"
    if parallel.backend == "fsdp2" and parallel.tensor_parallel > 1:
        return "fsdp2+tp"
    if parallel.backend == "fsdp2" and shard_group_size(parallel, world_size) < world_size:
        return "hsdp"
    return parallel.backend


def zero_stage(parallel: ParallelConfig) -> int:
    """DeepSpeed's stage, once that of `deepspeed_config` has been taken over."""
    return 2 if parallel.zero_stage == "auto" else parallel.zero_stage


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Ranks that see different data: of 8 ranks with tensor_parallel 2, 4.

    At least 1, so that a configuration with too few ranks reaches the rule that refuses it.
    """
    return max(1, world_size // max(1, parallel.tensor_parallel))


def shard_group_size(parallel: ParallelConfig, world_size: int) -> int:
    """Ranks over which one replica of the model is sharded."""
    return world_size if parallel.shard_group == "auto" else parallel.shard_group


def projection_group(parallel: ParallelConfig, world_size: int) -> int:
    """Ranks over which GaLore's matrices are sharded; 1 where each rank holds all of them."""
    if parallel.backend == "fsdp2":
        return shard_group_size(parallel, world_size)
    return world_size if parallel.backend == "deepspeed" and zero_stage(parallel) else 1


def shards_residual(parallel: ParallelConfig) -> bool:
    """Whether frozen weights of converted layers are sharded."""
    if parallel.residual != "auto":
        return parallel.residual == "sharded"
    if parallel.backend == "deepspeed":
        return zero_stage(parallel) == 3
    return parallel.backend == "fsdp2"


def requested(config: RunConfig, spec: MethodSpec | None = None) -> Iterator[str]:
    """The features a configuration asks for."""
    spectral, model = config.spectral, config.model
    spec = spec or chosen_spec(spectral)
    yield spec.feature
    yield f"precision={config.train.precision}"
    yield from spec.features(spectral)
    if config.optimizer.name == "muon":
        yield "muon=factors" if spec.converts else "muon=matrices"
    if config.optimizer.name == "scale":
        yield "scale=matrices"
    if not spectral.train_dense:
        yield "dense=frozen"
    if spec.converts:
        yield "residual=sharded" if shards_residual(config.parallel) else "residual=replicated"
    if config.filter.enabled:
        yield f"filter={config.filter.nodes}"
        if config.filter.joint_loss_mu:
            yield "joint_loss"
    for key in ("activation_checkpointing", "compile"):
        if getattr(model, key):
            yield key
    if model.dropout > 0:
        yield "dropout"


def key_problems(parallel: ParallelConfig, *, world_size: int) -> Iterator[str]:
    """Keys that the backend does not read, and shard groups that do not fit."""
    backend = parallel.backend
    # Key -> the only backend that reads it, and the value that asks for nothing.
    owners: dict[str, tuple[str, object]] = {
        "zero_stage": ("deepspeed", "auto"),
        "offload": ("deepspeed", "none"),
        "deepspeed_config": ("deepspeed", None),
        "shard_group": ("fsdp2", "auto"),
        "sequence_parallel": ("megatron", False),
        "distributed_optimizer": ("megatron", True),
        "factor_gradients": ("megatron", "bottleneck"),
    }
    for key, (owner, neutral) in owners.items():
        value = getattr(parallel, key)
        if value != neutral and backend != owner:
            yield (
                f"parallel.{key}={value} has no effect on parallel.backend={backend}; leave it "
                f"out, or set parallel.backend={owner}"
            )
    if parallel.tensor_parallel != 1 and backend not in ("fsdp2", "megatron"):
        yield (
            f"parallel.tensor_parallel={parallel.tensor_parallel} has no effect on "
            f"parallel.backend={backend}; leave it out, or set parallel.backend=fsdp2 or megatron"
        )
    if parallel.sequence_parallel and parallel.tensor_parallel == 1:
        yield (
            "parallel.sequence_parallel=true shards the sequence over tensor-parallel ranks, and "
            "there is one; leave it out, or raise parallel.tensor_parallel"
        )
    if parallel.tensor_parallel > 1 and parallel.shard_group != "auto":
        yield (
            f"parallel.shard_group={parallel.shard_group} with parallel.tensor_parallel="
            f"{parallel.tensor_parallel}: replicas of a tensor-parallel model were not tried; "
            "leave shard_group out"
        )
    group = shard_group_size(parallel, world_size)
    if backend == "fsdp2" and (group < 1 or world_size % group):
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        yield (
            f"parallel.shard_group={group} must divide the {world_size} ranks; one of {divisors}"
        )


CAPABILITIES: dict[str, dict[str, Support]] = {
    "torch": TORCH,
    "fsdp2": FSDP2,
    "hsdp": HSDP,
    "fsdp2+tp": FSDP2_TP,
    "megatron": MEGATRON,
    **DEEPSPEED,
}
"""Row (see `variant`) -> feature -> support; what a row does not name is refused."""
NO_TENSOR_PARALLEL_FORM = No(
    "its layers have no tensor-parallel form; leave parallel.tensor_parallel out"
)
"""The answer for a method whose specification has none, unless the row has its own reason."""


def refusals(
    config: RunConfig,
    spec: MethodSpec,
    capabilities: Mapping[str, Mapping[str, Support]] = CAPABILITIES,
    *,
    world_size: int,
) -> Iterator[str]:
    """Every feature asked for that the backend cannot do, with the reason."""
    parallel = config.parallel
    yield from key_problems(parallel, world_size=world_size)
    row = variant(parallel, world_size=world_size)
    supported = dict(capabilities[row])
    method = spec.feature
    if parallel.tensor_parallel > 1 and not spec.tensor_parallel:
        # The row may say more exactly why; a "yes" of the row is for methods that have such a form.
        told = supported.get(method)
        supported[method] = told if isinstance(told, No) else NO_TENSOR_PARALLEL_FORM
    for feature in requested(config, spec):
        support = supported.get(feature, No("no test has shown it yet"))
        if isinstance(support, No):
            title = FEATURES.get(feature, spec.title)
            yield f"{title} ({feature}) does not run on {row}: {support.reason}"


def markdown_table() -> str:
    """Feature by row, for documents: `yes`, or nothing for what is refused; rows that can do
    nothing are left out."""
    able = {r: c for r, c in CAPABILITIES.items() if any(isinstance(s, Yes) for s in c.values())}
    rows = list(able)
    lines = [["", *rows], ["---"] * (len(rows) + 1)]
    for feature, name in FEATURES.items():
        cells = [isinstance(CAPABILITIES[row].get(feature), Yes) for row in rows]
        lines.append([name, *("yes" if works else "" for works in cells)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
