"""How megatron-core fuses the weights of several logical matrices into one."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from spectral_scale.errors import ConfigError

Fused = Literal["none", "qkv", "gated"]
"""none: one matrix; qkv: query, key and value, interleaved by query group; gated: gate and up."""


@dataclass(frozen=True)
class FusedLayout:
    """The rows of one fused weight, by matrix.

    Raises ConfigError if query, key and value do not fill it, or ranks do not divide their groups.
    """

    kind: Fused
    """What is fused."""
    config: Any
    """The model's TransformerConfig."""
    output_size: int
    """Rows of the whole fused weight."""
    num_ranks: int
    """Tensor-parallel ranks."""

    def __post_init__(self) -> None:
        if self.kind != "qkv":
            return
        if sum(self.sizes().values()) != self.output_size:
            raise ConfigError(
                f"{self.output_size} outputs are not {self.config.num_attention_heads} queries and "
                f"2 x {self._groups} keys and values of {self.config.kv_channels}; an output gate "
                "is not supported"
            )
        if self._groups % self.num_ranks:
            raise ConfigError(
                f"{self._groups} key and value heads cannot be sharded over {self.num_ranks} "
                "tensor-parallel ranks; lower the tensor-parallel size"
            )

    def sizes(self) -> dict[str, int]:
        """Rows of each whole matrix, by name."""
        if self.kind == "none":
            return {"matrix": self.output_size}
        if self.kind == "gated":
            return {"gate_proj": self.output_size // 2, "up_proj": self.output_size // 2}
        head = self.config.kv_channels
        queries, keys = self.config.num_attention_heads * head, self._groups * head
        return {"q_proj": queries, "k_proj": keys, "v_proj": keys}

    def fuse(self, outputs: list[Tensor]) -> Tensor:
        """A rank's outputs or biases of the matrices, along the last dimension."""
        if self.kind != "qkv":
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        by_group = [p.unflatten(-1, (self._groups // self.num_ranks, -1)) for p in outputs]
        return torch.cat(by_group, dim=-1).flatten(-2)

    def split(self, fused: Tensor) -> dict[str, Tensor]:
        """A rank's rows (dimension 0) of a fused weight or bias, by matrix."""
        names = list(self.sizes())
        if self.kind != "qkv":
            return dict(zip(names, fused.chunk(len(names)), strict=True))
        head, groups = self.config.kv_channels, self._groups // self.num_ranks
        queries = self.config.num_attention_heads // self._groups * head
        rows = fused.unflatten(0, (groups, -1)).split([queries, head, head], dim=1)
        return {n: p.flatten(0, 1) for n, p in zip(names, rows, strict=True)}

    @property
    def _groups(self) -> int:
        return int(self.config.num_query_groups or self.config.num_attention_heads)
