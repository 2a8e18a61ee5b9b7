"""What the rest of the project asks about a training method, answered without torch.

Nothing outside a method's own files compares names of methods: it asks the `MethodSpec` instead.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import RunConfig, SpectralConfig

Shape = tuple[int, int]
"""(out_features, in_features) of a linear layer, (m, n) in formulas."""


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """What a plan tells a method about the converted model and the ranks that hold it."""

    matrices: Mapping[str, Shape]
    """Converted layer -> its shape; empty for methods that convert none."""
    owners: Mapping[str, int]
    """Converted layer -> the rank, of all ranks, that decomposes and sends it."""
    block_matrices: Sequence[Shape]
    """Every linear layer of every block, converted or not."""
    block_owners: Sequence[int]
    """The rank that owns each of `block_matrices`, among `block_ranks` ranks."""
    block_ranks: int
    """Ranks over which whole matrices of the blocks can be divided; 1 where each rank holds all."""
    world_size: int
    """Number of all ranks."""
    itemsize: int
    """Bytes of an element of what trains, of its moments and of triplets."""
    frozen_itemsize: int
    """Bytes of an element of a frozen weight; 0 if nothing is frozen."""
    frozen_bytes: int
    """Bytes of all frozen weights."""
    flat_buffers: bool
    """Whether the backend shards gradients as one flat buffer, so that a rank's range begins and
    ends inside two matrices at most."""
    tokens: int
    """Tokens of a micro-batch."""
    product_itemsize: int
    """Bytes of an element of a product."""
    passes: int
    """Times that a layer's weight is used for a micro-batch: forward, backward, and recomputed."""
    row_parallel: frozenset[str]
    """Converted layers whose inputs are sharded by tensor parallelism."""
    tensor_parallel: int
    """Ranks over which inputs of `row_parallel` and outputs of all other layers are sharded."""

    def shard_shapes(self) -> list[Shape]:
        """What a tensor-parallel rank holds of each of `matrices`."""
        parts, row = self.tensor_parallel, self.row_parallel
        return [
            (m, n // parts) if name in row else (m // parts, n)
            for name, (m, n) in self.matrices.items()
        ]

    def largest_load(self, cost: Callable[[Shape], int]) -> int:
        """The sum of `cost` over converted layers on the rank where it is largest."""
        loads = [0] * self.world_size
        for name, rank in self.owners.items():
            loads[rank] += cost(self.matrices[name])
        return max(loads)

    def decomposed_by_one(self) -> int:
        """max(m, n) min(m, n)^2 of all matrices that the busiest owner decomposes."""
        return self.largest_load(lambda shape: max(shape) * min(shape) ** 2)


@dataclass(frozen=True, kw_only=True)
class MethodMemory:
    """Bytes that a method needs besides weights, gradients and dense moments, by formula."""

    optimizer: int = 0
    """Bytes added to the dense moments of the fullest rank; negative where moments are smaller."""
    gathered: int = 0
    """Bytes held on the fullest rank while a pass or an exchange is under way."""
    owned: int = 0
    """Bytes kept by the rank that owns most."""
    workspace: int = 0
    """Bytes held during the largest decomposition, which never coincides with activations."""
    saved: int = 0
    """Bytes in a checkpoint besides trained weights and their moments, all ranks together."""


@dataclass(frozen=True, kw_only=True)
class MethodTraffic:
    """Bytes that a method adds to what the backend sends, by formula."""

    step: float = 0
    """Bytes over each rank's links in an optimizer step."""
    swap: float = 0
    """Bytes over each rank's links at a swap, merge or renewal."""
    completed: int = 0
    """Whole all-reduces of a micro-batch that complete gradients over tensor-parallel ranks."""


@dataclass(frozen=True, kw_only=True)
class MethodWork:
    """What a method computes besides the products of its matrices with tokens, by formula."""

    micro_batch_flops: float = 0.0
    """FLOPs, in the precision of what trains, of weights that are formed for each micro-batch."""
    step_flops: float = 0.0
    """FLOPs, in the precision of what trains, on the busiest rank in an optimizer step."""
    swap_flops: float = 0.0
    """The same at a swap, merge or renewal: weights that are merged and rebuilt."""
    decomposed: float = 0.0
    """Work of the decompositions of the busiest owner at a swap, on average: the sum of
    max(m, n) min(m, n)^2, to which their time is proportional."""


def no_problems(*_: object) -> Iterable[str]:
    """The answer of a method that has no rule of its own, or no feature."""
    return ()


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One choice of `spectral.method`; its runtime counterpart is `methods.base.Method`."""

    name: str
    """What `spectral.method` gives, or the name of a form (see `config.methods.method_name`)."""
    title: str
    """Name of the method for a person."""
    chosen_by: str = ""
    """The setting that chooses a form of a method, as the capability tables name it; empty for a
    method that `spectral.method` names."""
    converts: bool = False
    """Whether it replaces linears: those of `spectral.targets`, or all of the blocks' linears."""
    keys: frozenset[str] = frozenset()
    """Dotted configuration keys that it uses, among those that only some methods use."""

    @property
    def feature(self) -> str:
        """The feature by which the capability tables name this method."""
        return self.chosen_by or f"method={self.name}"

    # -- rules -----------------------------------------------------------------------------
    problems: Callable[[SpectralConfig, Architecture], Iterable[str]] = no_problems
    """What is wrong with its settings for a model, a sentence each, with what to change."""
    run_problems: Callable[[RunConfig], Iterable[str]] = no_problems
    """What is wrong with the rest of the run, whatever its model."""
    features: Callable[[SpectralConfig], Iterable[str]] = no_problems
    """Rows of the capability tables that its settings ask for, besides `method=NAME`."""
    filter_refusals: Mapping[str, str] = field(default_factory=dict)
    """Nodes of the spectral filter for which it leaves nothing to filter -> why, and what to do.
    Methods that convert linears refuse them only where no dense linear of the blocks trains."""
    tensor_parallel: bool = True
    """Whether its layers, if it has any, compute over tensor-parallel ranks
    (`FactoredLinear.sharded_product`); otherwise every run that asks for it is refused."""
    own_optimizer: bool = False
    """Whether it steps with an optimizer of its own in the place of AdamW."""
    muon: bool = False
    """Whether `optimizer.name=muon` trains what it trains: factors if it converts linears, else the
    blocks' dense matrices."""

    # -- what a run keeps --------------------------------------------------------------------
    layout_keys: tuple[str, ...] = ()
    """Keys of the spectral section that decide what a checkpoint's tensors mean, besides `method`,
    `targets` and `train_dense`."""
    keeps_initial_weights: bool = False
    """Whether checkpoints leave out weights that it never changes, so that a run needs those it
    started from for as long as it lives."""
    has_adapter: bool = False
    """Whether what it trained can be saved apart from the weights it changes."""
    decomposes: bool = False
    """Whether matrices are decomposed on their owners, for which the other ranks wait."""
    swaps: bool = False
    """Whether something is swapped, merged or renewed every `steps_per_iteration` steps."""

    # -- plans, counts and reports ---------------------------------------------------------
    kept_per_token: Callable[[SpectralConfig, Architecture], int] = lambda *_: 0
    """Elements that a converted layer keeps of each token for the backward pass, besides what a
    dense layer keeps."""
    memory: Callable[[SpectralConfig, PlannedModel], MethodMemory] = lambda *_: MethodMemory()
    """Bytes that it needs."""
    traffic: Callable[[SpectralConfig, PlannedModel], MethodTraffic] = lambda *_: MethodTraffic()
    """Bytes that it sends."""
    work: Callable[[SpectralConfig, PlannedModel], MethodWork] = lambda *_: MethodWork()
    """What it computes besides the products with tokens."""
    counted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Rows of `spectral-scale count`: label -> settings that it stands for."""
    counted_by: str | None = None
    """The key of the spectral section whose value `count` must be given for these rows."""
    headline_settings: tuple[str, ...] = ("storage", "spectral_rank")
    """Keys of the spectral section that a report shows beside the method's name."""
