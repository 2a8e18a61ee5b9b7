"""LayerNorm and RMSNorm that run on a shard of the sequence."""

from typing import Any

from torch import nn

from spectral_scale.errors import ConfigError

_KINDS = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}


class SequenceParallelNorm:
    """Makes torch's norm for a layer spec, with weights that sequence parallelism knows of.

    A norm acts on each token alone, so it needs no other rank's tokens; its weights' gradients are
    then sums over this rank's tokens, and the mark `sequence_parallel` lets megatron-core's
    `finalize_model_grads` add those of the other ranks (its own torch norm refuses instead).
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """Build the norm, with the arguments that megatron-core's layer specs give.

        Raises ConfigError for a normalization that is neither LayerNorm nor RMSNorm.
        """
        if config.normalization not in _KINDS:
            raise ConfigError(
                f"normalization={config.normalization}: only {' and '.join(_KINDS)} are supported"
            )
        for option in ("layernorm_zero_centered_gamma", "persist_layer_norm"):
            if getattr(config, option):
                raise ConfigError(f"{option}=True is not supported by torch's norms; set it False")
        norm = _KINDS[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
