"""The workload of a step: a stack of real transformer blocks, or a whole language model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectral_scale.bench.settings import StepSettings, model_config, num_blocks
from spectral_scale.config.presets import Architecture
from spectral_scale.models.build import build_model, materialise
from spectral_scale.models.loss import token_loss_sum


class BlockStack(nn.Module):
    """Transformer blocks alone: hidden states in, hidden states out, causal attention."""

    def __init__(self, layers: nn.ModuleList, rotary: nn.Module | None) -> None:
        super().__init__()
        self.layers, self.rotary = layers, rotary

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, sequence, hidden) -> the same shape."""
        extra: dict[str, Any] = {}
        if self.rotary is not None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)
            extra["position_embeddings"] = self.rotary(hidden, positions[None])
        for layer in self.layers:
            hidden = layer(hidden, **extra)
        return hidden


def build_on_meta(
    settings: StepSettings, architecture: Architecture
) -> PreTrainedModel | BlockStack:
    """The model of `settings` with parameters on the meta device."""
    model = build_model(architecture, model_config(settings), eos_token_id=None)
    parent, name = _block_list(model)
    layers = getattr(parent, name)[: num_blocks(settings, architecture)]
    setattr(parent, name, layers)
    if settings.whole_model:
        return model
    rotary = getattr(parent, "rotary_emb", None)
    return BlockStack(layers, None if rotary is None else type(rotary)(config=model.config))


def give_memory(model: PreTrainedModel | BlockStack, device: torch.device) -> None:
    """Move a meta model to `device`, trained parameters in fp32, values undefined."""
    if not isinstance(model, BlockStack):
        materialise(model, device=device, dtype=torch.float32)
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.layers.to_empty(device=device)
    if model.rotary is not None:
        model.rotary.to(device)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One batch of inputs, and the gradient that a block stack's output receives."""

    inputs: Tensor
    """Hidden states (batch, sequence, hidden), or token ids (batch, sequence) of a whole model."""
    given: Tensor
    """dL/d output, shaped like it, or the labels of a whole model."""

    def forward(self, model: nn.Module) -> Tensor:
        """Hidden states, or the mean token loss of a whole model."""
        if self.inputs.is_floating_point():
            self.inputs.grad = None
            output: Tensor = model(self.inputs)
            return output
        return token_loss_sum(model, self.inputs, self.given) / self.inputs.numel()

    def backward(self, output: Tensor) -> None:
        """Leave gradients on the parameters and, as inside a model, on hidden inputs."""
        output.backward(self.given if output.ndim else None)


def make_workload(
    settings: StepSettings, architecture: Architecture, device: torch.device
) -> Workload:
    """Random inputs, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    shape = settings.batch_size, settings.sequence_length
    if settings.whole_model:
        ids = torch.randint(architecture.vocab_size, shape, generator=generator).to(device)
        return Workload(inputs=ids, given=ids.roll(-1, dims=1))
    hidden = *shape, architecture.hidden_size
    inputs, given = (torch.randn(hidden, generator=generator).to(device) for _ in range(2))
    return Workload(inputs=inputs.requires_grad_(), given=given)


def _block_list(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the blocks, and the attribute's name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            parent, _, child = name.rpartition(".")
            return model.get_submodule(parent), child
    raise TypeError(f"{type(model).__name__} holds no list of blocks")
