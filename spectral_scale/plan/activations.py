"""Bytes that a forward pass keeps for the backward pass: an estimate, with its assumptions.

Counted as in Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1), for this project's dtypes:
under bf16 autocast products are kept in bf16, the residual stream and the norms in fp32.
"""

from dataclasses import dataclass

from spectral_scale.config.families import family_of
from spectral_scale.config.methods import chosen_spec
from spectral_scale.config.methods.spec import MethodSpec
from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import RunConfig
from spectral_scale.models.loss_chunks import chunk_sizes

ASSUMPTIONS = (
    "activations: attention by SDPA's fused kernels (no score matrix kept) unless model.attention "
    "is eager, no dropout masks, "
    "one micro-batch in flight; logits are kept in the products' dtype and twice in fp32 (loss and "
    "its gradient), of a chunk of tokens at a time where that is possible and all would be large"
)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch on one rank."""

    blocks: int
    """Bytes kept by the transformer blocks."""
    logits: int
    """Bytes kept by the output layer, the loss and projections of embeddings."""

    @property
    def total(self) -> int:
        """Bytes of blocks and logits, which are alive together when the backward pass begins."""
        return self.blocks + self.logits


def activation_bytes(
    config: RunConfig, architecture: Architecture, method: MethodSpec | None = None
) -> Activations:
    """The estimate for the run's micro-batch, sequence length and precision."""
    tokens = config.train.micro_batch_size * config.model.sequence_length
    product, stream = itemsizes(config)
    parts, by_sequence = _cuts(config)
    block = round(tokens * _block_bytes_per_token(config, architecture, product, stream, method))
    if config.model.activation_checkpointing:
        inputs = tokens * architecture.hidden_size * stream // (parts if by_sequence else 1)
        kept = inputs * architecture.num_layers + block
    else:
        kept = block * architecture.num_layers
    logits = _logit_bytes(config, architecture, tokens=tokens)
    if architecture.embedding_size != architecture.hidden_size:  # projected, and projected back
        logits += 2 * tokens * architecture.embedding_size * stream
    return Activations(blocks=kept, logits=logits)


def _logit_bytes(config: RunConfig, architecture: Architecture, *, tokens: int) -> int:
    """Logits, loss and its gradient, as `models.loss` takes them.

    In chunks: the logits of one, and the gradients of the last hidden states and of the head's
    weight, which exist as soon as the loss does.
    """
    product, stream = itemsizes(config)
    parts, _ = _cuts(config)
    words = architecture.vocab_size // parts
    wide = max(4, stream)
    rows = tokens
    kept = 0
    if config.parallel.backend != "megatron" and parts == 1:
        rows = max(chunk_sizes(tokens, words))
        if rows < tokens:
            kept = architecture.embedding_size * (tokens * stream + words * wide)
    return rows * words * (product + 2 * wide) + kept


def itemsizes(config: RunConfig) -> tuple[int, int]:
    """Bytes of an element of a product, and of the residual stream and the norms."""
    precision = config.train.precision
    if precision == "fp64":
        return 8, 8
    if precision == "fp32":
        return 4, 4
    return 2, 2 if config.parallel.backend == "deepspeed" else 4


def master_itemsize(config: RunConfig) -> int:
    """Bytes of an element of what trains, of its moments and of triplets."""
    return 8 if config.train.precision == "fp64" else 4


def _cuts(config: RunConfig) -> tuple[int, bool]:
    """Number of tensor-parallel ranks, and whether sequences are sharded as well."""
    parallel = config.parallel
    return parallel.tensor_parallel, parallel.sequence_parallel and parallel.tensor_parallel > 1


def _block_bytes_per_token(
    config: RunConfig,
    architecture: Architecture,
    product: int,
    stream: int,
    method: MethodSpec | None,
) -> float:
    """Heads and features inside a block are divided by tensor parallelism, norms are only where
    ranks divide sequences; there the inputs of linears are gathered."""
    h, f = architecture.hidden_size, architecture.ffn_size
    kv = architecture.kv_size
    cast = product if product != stream else 0  # a norm's output, once more in the products' dtype
    family = family_of(architecture.family)
    parts, by_sequence = _cuts(config)
    norms = 2 * h * stream * (2 if family.norm == "RMSNorm" else 1) / (parts if by_sequence else 1)
    norms += 2 * h * (product if by_sequence else stream + cast)
    attention = (h + 2 * kv) * product + h * product  # q, k, v and the output
    if family.positions == "rotary":
        attention += (h + kv) * product  # q and k before the rotation
    if family.gated_mlp:
        mlp = 4 * f * product  # gate, up, silu(gate), their product
    else:
        mlp = f * product  # after ReLU, which needs no more for its own gradient
    if config.model.attention == "eager":
        scores = architecture.num_heads * config.model.sequence_length
        attention += scores * (max(4, product) + cast)  # of the softmax, and once more as a factor
    return norms + (attention + mlp) / parts + _factors(config, architecture, product, method)


def _factors(
    config: RunConfig, architecture: Architecture, product: int, method: MethodSpec | None
) -> int:
    """What the method keeps of each token beside a dense layer: x v of each SST matrix, x a."""
    spec = method or chosen_spec(config.spectral)
    matrices = len(family_of(architecture.family).linears)
    return matrices * spec.kept_per_token(config.spectral, architecture) * product
