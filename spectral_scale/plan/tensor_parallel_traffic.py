"""What tensor parallelism changes in a plan: what a rank holds and what it sends to its group.

Activations travel between ranks in every pass (Shoeybi et al., arXiv 1909.08053, section 3; by
sequences: Korthikanti et al., arXiv 2205.05198, section 4.2). T tokens, h features below.
"""

from dataclasses import dataclass, replace

from spectral_scale.config.families import family_of
from spectral_scale.config.presets import Architecture
from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.config.schema import RunConfig
from spectral_scale.parallel.tensor_parallel_table import sharded_dimension
from spectral_scale.plan.activations import itemsizes
from spectral_scale.plan.inventory import Inventory, Item
from spectral_scale.plan.method_needs import method_traffic
from spectral_scale.plan.payload import Payload

_LOSS_VALUES = 3
"""fp32 values of a token that are summed where no rank sees all logits: the largest logit, the
label's, and the sum of exponentials."""


def rank_shard(config: RunConfig, inventory: Inventory) -> Inventory:
    """The parameters as one tensor-parallel rank holds them; matrices stay logical."""
    ranks = config.parallel.tensor_parallel
    if ranks == 1:
        return inventory
    if ranks not in inventory.shards:
        items = tuple(_part(item, ranks) for item in inventory.items)
        inventory.shards[ranks] = replace(inventory, items=items)
    return inventory.shards[ranks]


def _part(item: Item, ranks: int) -> Item:
    dim = sharded_dimension(item.fqn)
    if dim is None:
        return item
    shape = tuple(size // ranks if d == dim else size for d, size in enumerate(item.shape))
    return replace(item, shape=shape, numel=item.numel // ranks)


def tensor_parallel_payload(run: ResolvedRun, inventory: Inventory) -> Payload:
    """What the tensor-parallel ranks of one replica send each other in an optimizer step."""
    config = run.config
    if config.parallel.tensor_parallel == 1:
        return Payload()
    passes = _Passes.of(config, run.architecture, inventory)
    if config.parallel.backend == "megatron":
        by_sequence = config.parallel.sequence_parallel
        sent = passes.by_sequence() if by_sequence else passes.by_sums(passes.activation)
    else:
        sent = passes.by_sums(passes.stream)
    per_step = config.parallel.factor_gradients == "per_step"
    if not per_step:
        sent += Payload(all_reduce=method_traffic(config, inventory, run.world_size).completed)
    sent *= run.gradient_accumulation_steps
    once = _of_parts_of_sequences(config, inventory)
    once += _whole_factors(inventory) if per_step else 0
    return sent + Payload(all_reduce=once)


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """Sizes of one micro-batch's messages."""

    activation: int
    """T h elements in the products' precision."""
    stream: int
    """An embedding of T tokens in the residual stream's precision."""
    tokens: int
    """Tokens of a micro-batch, T."""
    product: int
    """Bytes of an element of a product."""
    inputs: int
    """Gradients of the inputs of linears whose outputs are sharded, in all blocks: one for the
    converted ones that share an input, one for each dense one, in the stream's precision."""
    row: int
    """Linears whose inputs are sharded, in all blocks."""
    blocks: int
    """Transformer blocks."""
    learned_positions: bool
    """True if position embeddings are parameters."""
    recomputed: bool
    """Whether blocks are computed again in the backward pass; that of a block ends with the last
    thing that it keeps, before the sum over ranks that is its output."""

    @staticmethod
    def of(config: RunConfig, architecture: Architecture, inventory: Inventory) -> "_Passes":
        tokens = config.train.micro_batch_size * config.model.sequence_length
        product, stream = itemsizes(config)
        family = family_of(architecture.family)
        column = {linear.name: linear for linear in family.linears if linear.kind == "column"}
        converted = column.keys() & {name.rpartition(".")[2] for name in inventory.matrices}
        inputs = {column[name].reads for name in converted}
        sizes = product * len(inputs) + stream * len(column.keys() - converted)
        elements, blocks = tokens * architecture.hidden_size, architecture.num_layers
        return _Passes(
            activation=product * elements,
            stream=stream * tokens * architecture.embedding_size,
            tokens=tokens,
            product=product,
            inputs=blocks * sizes * elements,
            row=blocks * (len(family.linears) - len(column)),
            blocks=blocks,
            learned_positions=family.positions == "learned",
            recomputed=config.model.activation_checkpointing,
        )

    @property
    def again(self) -> int:
        """Row-parallel linears whose outputs are summed again in the backward pass."""
        return self.row - self.blocks if self.recomputed else 0

    def by_sums(self, of_logits: int) -> Payload:
        """Sums of outputs forward and of inputs' gradients backward, `of_logits` of the output
        layer's among them, of embeddings and of the loss."""
        summed = self.stream + (self.row + self.again) * self.activation + self.inputs + of_logits
        return Payload(all_reduce=summed + 4 * _LOSS_VALUES * self.tokens)

    def by_sequence(self) -> Payload:
        """Gathers and scatters in the place of sums; inputs of linears are kept whole, that of the
        output layer is gathered again."""
        forward, backward = self.inputs + self.activation, (self.row + 1) * self.activation
        recomputed = self.inputs if self.recomputed else 0
        # Where positions are learned, embeddings are summed whole before sequences are split.
        embedded = 0 if self.learned_positions else self.stream
        return Payload(
            all_gather=forward + backward + recomputed + self.stream,
            reduce_scatter=(self.row + self.again) * self.activation + forward + embedded,
            all_reduce=self.stream - embedded + 4 * _LOSS_VALUES * self.tokens,
        )


def _whole_factors(inventory: Inventory) -> int:
    """Factors and singular values that every rank holds whole."""
    return sum(
        item.numel * item.itemsize
        for item in inventory.items
        if item.fqn.rpartition(".")[2] in ("u", "v", "sigma")
        and sharded_dimension(item.fqn) is None
    )


def _of_parts_of_sequences(config: RunConfig, inventory: Inventory) -> int:
    """Norms, and biases of sums: under sequence parallelism each rank has its tokens' gradients."""
    if not config.parallel.sequence_parallel:
        return 0
    return sum(
        item.numel * item.itemsize
        for item in inventory.items
        if item.fqn.endswith((".weight", ".bias"))
        and item.trainable
        and sharded_dimension(item.fqn) is None
        and "embed_positions" not in item.fqn
    )
