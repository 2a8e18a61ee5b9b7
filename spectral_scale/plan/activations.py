"""Bytes that a forward pass keeps for the backward pass: an estimate, with its assumptions.

Counted as in Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1), for this project's dtypes:
under bf16 autocast products are kept in bf16, the residual stream and the norms in fp32.
"""

from dataclasses import dataclass

from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import RunConfig

ASSUMPTIONS = (
    "activations: attention by SDPA's fused kernels (no score matrix kept) unless model.attention "
    "is eager, no dropout masks, "
    "one micro-batch in flight; logits are kept in the products' dtype and twice in fp32 (loss and "
    "its gradient)"
)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch on one rank."""

    blocks: int
    """Kept by the transformer blocks."""
    logits: int
    """Output layer and loss."""

    @property
    def total(self) -> int:
        """Both: they are alive together when the backward pass begins."""
        return self.blocks + self.logits


def activation_bytes(config: RunConfig, architecture: Architecture) -> Activations:
    """The estimate for the run's micro-batch, sequence length and precision."""
    tokens = config.train.micro_batch_size * config.model.sequence_length
    product, stream = _itemsizes(config)
    block = tokens * _block_bytes_per_token(config, architecture, product, stream)
    if config.model.activation_checkpointing:
        kept = tokens * architecture.hidden_size * stream * architecture.num_layers + block
    else:
        kept = block * architecture.num_layers
    logits = tokens * architecture.vocab_size * (product + 2 * max(4, stream))
    return Activations(blocks=kept, logits=logits)


def _itemsizes(config: RunConfig) -> tuple[int, int]:
    """Bytes of an element of a product, and of the residual stream and the norms."""
    precision = config.train.precision
    if precision == "fp64":
        return 8, 8
    if precision == "fp32":
        return 4, 4
    return 2, 2 if config.parallel.backend == "deepspeed" else 4


def _block_bytes_per_token(
    config: RunConfig, architecture: Architecture, product: int, stream: int
) -> int:
    h, f = architecture.hidden_size, architecture.ffn_size
    kv = architecture.num_kv_heads * architecture.head_size
    cast = product if product != stream else 0  # a norm's output, once more in the products' dtype
    llama = architecture.family == "llama"
    norms = 2 * h * (stream + stream * (1 if llama else 0) + stream + cast)
    attention = (h + 2 * kv) * product + h * product  # q, k, v and the output
    if llama:
        attention += (h + kv) * product  # q and k before the rotation
        mlp = 4 * f * product  # gate, up, silu(gate), their product
    else:
        mlp = f * product  # after ReLU, which needs no more for its own gradient
    if config.model.attention == "eager":
        scores = architecture.num_heads * config.model.sequence_length
        attention += scores * (max(4, product) + cast)  # of the softmax, and once more as a factor
    return norms + attention + mlp + _factors(config, architecture, product)


def _factors(config: RunConfig, architecture: Architecture, product: int) -> int:
    """x v and (x v) sigma of each SST matrix, or x a of a low-rank one."""
    method, r = config.spectral.method, config.spectral.spectral_rank
    matrices = 7 if architecture.family == "llama" else 6
    if method == "sst" and config.spectral.storage == "factored":
        smaller = min(architecture.hidden_size, architecture.ffn_size)
        return 2 * matrices * smaller * product
    kept = {"sst": 2, "lora": 1, "relora": 1}.get(method, 0)
    return kept * matrices * r * product
