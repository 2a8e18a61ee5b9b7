"""The time of a step by a roofline: each product takes as long as its arithmetic or its bytes.

The products are those from which a run's MFU is computed (`metrics.flops.matrix_products`). What is
not a product moves bytes in proportion to the activations that a pass keeps. No torch.
"""

from dataclasses import dataclass, replace

from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.metrics.flops import MatrixProduct, attention_flops_per_token
from spectral_scale.plan.activations import activation_bytes, itemsizes, master_itemsize
from spectral_scale.plan.gpus import HOST_RATE, Cluster, Rates
from spectral_scale.plan.inventory import Inventory
from spectral_scale.plan.links import MessageSeconds, hidden_seconds, message_seconds
from spectral_scale.plan.memory import Memory
from spectral_scale.plan.method_needs import method_work
from spectral_scale.plan.tensor_parallel_traffic import rank_shard

MOVED = 12
"""Bytes that a pass and its backward pass move for each byte of activations that they keep, besides
products: an assumption."""
LAUNCHES = 124
"""Operations of a block in a forward and a backward pass (docs/gpu.md)."""
CAST_BYTES = 16
"""Bytes moved for each trained element of a matrix in a micro-batch of half precision: the cast of
the weight, the cast of its gradient, and the sum."""
SUM_BYTES = 12
"""Bytes moved for each trained element in a micro-batch of full precision: the sum of gradients."""
STEP_ASSUMPTIONS = (
    "step time: a roofline of every product (docs/plan.md); elementwise operations move "
    f"{MOVED} bytes for each byte of activations kept; the host queues {LAUNCHES} operations a "
    "block",
)


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """The parts of an optimizer step's time, which are summed."""

    passes: float
    """Forward and backward passes of all micro-batches."""
    optimizer: float
    """Clipping and the update, with what the method computes in every step."""
    waiting: float
    """Messages for which a rank waits."""
    swap: float
    """One swap, merge or renewal: its messages, rebuilt weights and decompositions."""
    swap_every: int
    """Steps between swaps; 0: there are none."""

    @property
    def swap_a_step(self) -> float:
        """A swap's time spread over the steps between."""
        return self.swap / self.swap_every if self.swap_every else 0.0

    @property
    def step(self) -> float:
        """The time of a step, swaps spread over all."""
        return self.passes + self.optimizer + self.waiting + self.swap_a_step

    @property
    def swap_share(self) -> float:
        """The share of the run's time that swaps take."""
        return self.swap_a_step / self.step


def step_seconds(
    run: ResolvedRun, inventory: Inventory, memory: Memory, rates: Rates, cluster: Cluster
) -> StepSeconds:
    """The estimate for a run on a cluster.

    Args:
        run: the resolved run, on all ranks of the cluster.
        inventory: its parameters.
        memory: what `plan.memory.memory_of` gives for it.
        rates: what a rank reaches.
        cluster: where it runs.
    """
    micro = pass_costs(run, inventory).seconds(rates)
    messages = message_seconds(run, inventory, cluster)
    work = method_work(run.config, inventory, run.world_size)
    owned = work.swap_flops / rates.exact_products + work.decomposed / rates.decompositions
    update = work.step_flops / rates.exact_products
    return StepSeconds(
        passes=run.gradient_accumulation_steps * micro,
        optimizer=update_seconds(run, memory, rates) + update,
        waiting=_waiting(run, messages, micro),
        swap=messages.swap + owned if run.method.swaps else 0.0,
        swap_every=run.config.spectral.steps_per_iteration if run.method.swaps else 0,
    )


@dataclass(frozen=True, kw_only=True)
class PassCosts:
    """What a micro-batch costs one rank in its forward and backward pass, before any rate."""

    products: tuple[tuple[float, float], ...]
    """FLOPs and bytes of every product of a matrix."""
    attention_flops: float
    exact_flops: float
    """FLOPs of weights that the method forms, in the precision of what trains."""
    moved_bytes: float
    """Bytes of elementwise operations, casts and sums."""
    launches: float
    """Operations that the host queues."""

    def seconds(self, rates: Rates) -> float:
        """Each product takes its arithmetic or its bytes, whichever is longer; the host may take
        longer than all of them."""
        products = sum(max(f / rates.products, b / rates.memory) for f, b in self.products)
        rest = self.attention_flops / rates.products + self.exact_flops / rates.exact_products
        device = products + rest + self.moved_bytes / rates.memory
        return max(device, self.launches * rates.launch_seconds)


def pass_costs(run: ResolvedRun, inventory: Inventory, *, blocks_alone: bool = False) -> PassCosts:
    """The costs of the run's micro-batch.

    Args:
        run: the resolved run.
        inventory: its parameters.
        blocks_alone: leave out embeddings, output layer and loss, as `bench step` does unless it
            measures the whole model.
    """
    config, a = run.config, run.architecture
    tokens = config.train.micro_batch_size * config.model.sequence_length
    recomputed, parts = config.model.activation_checkpointing, config.parallel.tensor_parallel
    passes = 4 / 3 if recomputed else 1
    size, _ = itemsizes(config)
    shard = rank_shard(config, inventory)
    products = []
    for product in shard.products:
        in_block = "layers." in product.fqn
        if in_block or not blocks_alone:
            flops, moved = _one_product(product, tokens, size, parts)
            times = product.times + (recomputed and in_block)
            products.append((times * flops, times * moved))
    attention = tokens * attention_flops_per_token(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        sequence_length=config.model.sequence_length,
    )
    work = method_work(config, inventory, run.world_size)
    return PassCosts(
        products=tuple(products),
        attention_flops=passes * attention / parts,
        exact_flops=work.micro_batch_flops / parts,
        moved_bytes=_moved_bytes(run, shard, passes=passes, blocks_alone=blocks_alone),
        launches=LAUNCHES * a.num_layers * passes,
    )


def _one_product(product: MatrixProduct, tokens: int, size: int, parts: int) -> tuple[float, float]:
    """FLOPs and bytes. The output layer's rows are divided over tensor-parallel ranks; other shapes
    are a rank's already."""
    rows, columns = product.shape
    rows = rows if product.fqn else rows // parts
    return 2 * tokens * rows * columns, size * (tokens * (rows + columns) + rows * columns)


def _moved_bytes(run: ResolvedRun, shard: Inventory, *, passes: float, blocks_alone: bool) -> float:
    """Bytes of elementwise operations, casts and sums in a micro-batch."""
    config = run.config
    model = replace(config.model, activation_checkpointing=False)
    kept = activation_bytes(replace(config, model=model), run.architecture, run.method)
    moved = MOVED * passes * (kept.blocks if blocks_alone else kept.total)
    trained = shard.numel(trainable=True, in_blocks=True if blocks_alone else None)
    half = itemsizes(config)[0] < master_itemsize(config)
    return moved + trained * (CAST_BYTES if half else SUM_BYTES)


def update_seconds(run: ResolvedRun, memory: Memory, rates: Rates) -> float:
    """Clipping reads gradients; the update reads them, reads and writes weights and moments.

    1,000 elements in fp32: 4,000 bytes of gradients twice, 8,000 of moments and 4,000 of weights
    twice each.
    """
    here = 3 * memory.optimizer + 2 * memory.gradients
    offloaded = 3 * memory.host if run.config.parallel.offload == "cpu" else 0
    return here / rates.memory + offloaded / HOST_RATE


def _waiting(run: ResolvedRun, messages: MessageSeconds, micro: float) -> float:
    late = messages.overlapped - hidden_seconds(run, micro)
    return messages.exposed + max(0.0, late)
