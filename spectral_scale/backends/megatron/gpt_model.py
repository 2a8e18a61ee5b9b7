"""megatron-core's GPTModel for OPT and LLaMA; the parallel state must have been initialized.

megatron-core is imported when a model is built, and is no requirement of anything else here.
"""

from typing import Any

import torch
from torch import Tensor, nn

from spectral_scale.backends.megatron.gpt_config import MegatronSettings
from spectral_scale.config.families import family_of


class OffsetEmbedding(nn.Embedding):
    """Learned positions of which the first `offset` rows belong to no position, as OPT has them."""

    offset = 0

    def forward(self, position_ids: Tensor) -> Tensor:
        """Position ids (any shape, int64, from 0) -> (..., features)."""
        return super().forward(position_ids + self.offset)


def build_gpt_model(settings: MegatronSettings, layer_spec: Any | None = None) -> nn.Module:
    """The GPTModel of `settings`; parameters are allocated, and hold no values yet.

    Fill them with `load_weights`. It takes position ids from 0 on, for OPT too, and gives logits
    of this rank's rows of the vocabulary, those of padding as low as the dtype goes.

    Args:
        settings: what `megatron_settings` returns.
        layer_spec: megatron-core's ModuleSpec of a layer; None: its local spec, without
            Transformer Engine and without sequence parallelism.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(**settings.transformer)
    if layer_spec is None:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        layer_spec = get_gpt_layer_local_spec(normalization=config.normalization)
    model: nn.Module = GPTModel(config=config, transformer_layer_spec=layer_spec, **settings.gpt)
    _offset_positions(model, family_of(settings.architecture.family).position_offset)
    if settings.padded_vocab_size > settings.architecture.vocab_size:
        _mask_padding(model, settings)
    return model


def _offset_positions(model: nn.Module, offset: int) -> None:
    if not offset:
        return
    embedding: Any = model.embedding
    old = embedding.position_embeddings
    new = OffsetEmbedding(old.num_embeddings, old.embedding_dim, device="meta")
    new.offset, new.weight = offset, old.weight
    embedding.position_embeddings = new


def _mask_padding(model: nn.Module, settings: MegatronSettings) -> None:
    """Logits of rows that are no token take part in no softmax."""
    padded, tokens = settings.padded_vocab_size, settings.architecture.vocab_size

    def mask(layer: Any, inputs: Any, outputs: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = outputs
        width = logits.shape[-1]
        start = 0 if width == padded else layer.tp_group.rank() * width
        real = min(max(tokens - start, 0), width)
        if real == width:
            return outputs
        lowest = logits.new_full((), torch.finfo(logits.dtype).min)
        padding = torch.arange(width, device=logits.device) >= real
        return torch.where(padding, lowest, logits), bias

    output_layer: Any = model.output_layer
    output_layer.register_forward_hook(mask)
