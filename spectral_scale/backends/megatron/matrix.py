"""One logical matrix of a Megatron layer, as one tensor-parallel rank holds it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from spectral_scale.config.methods.sst import trains_all_sigma
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import ConfigError
from spectral_scale.methods.sst.layer import SpectralLinear
from spectral_scale.methods.sst.product import Bottleneck
from spectral_scale.parallel.tensor_parallel_regions import start_all_reduce
from spectral_scale.parallel.tensor_parallel_table import factor_sharded_dim

Completion = Literal["bottleneck", "per_step"]
"""When gradients of factors that all ranks hold whole are summed over tensor-parallel ranks."""
PARTIAL = "tensor_parallel_partial"
"""Attribute of parameters whose gradient is one rank's summand until the step sums it."""


@dataclass(frozen=True, kw_only=True)
class MatrixSettings:
    """The settings of all spectral layers of a model."""

    spectral: SpectralConfig
    """Rank, storage and gradient form."""
    completion: Completion = "bottleneck"
    """bottleneck: in every backward pass, T x r elements a matrix; per_step: once a step, by
    `sum_partial_gradients`, the factor's own n x r."""
    frozen_dtype: torch.dtype | None = None
    """Dtype of frozen weights; None: that of the model's parameters."""


class SpectralMatrix(SpectralLinear):
    """A SpectralLinear of which this rank holds a shard; logical sizes are those of the whole.

    Column-parallel: u (out / t, r), residual (out / t, in), bias (out / t); v and sigma whole.
    Row-parallel: v (in / t, r), residual (out, in / t); u, sigma and bias whole.

    Args:
        in_features: of the whole matrix.
        out_features: of the whole matrix.
        kind: whether its outputs or its inputs are sharded over the ranks of `group`.
        bias: whether it has one.
        device: of the parameters.
        dtype: of trained parameters.

    Raises:
        ConfigError: r exceeds the matrix, or the ranks do not divide it.
    """

    merged_by = "spectral_scale.megatron.merge_gpt"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        settings: MatrixSettings,
        *,
        kind: Literal["column", "row"],
        group: dist.ProcessGroup,
        bias: bool,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        spectral = settings.spectral
        if spectral.spectral_rank > min(in_features, out_features):
            raise ConfigError(
                f"a matrix of {out_features} x {in_features} has no {spectral.spectral_rank} "
                f"triplets; lower spectral_rank to {min(in_features, out_features)} or less"
            )
        super().__init__(
            in_features,
            out_features,
            spectral.spectral_rank,
            storage=spectral.storage,
            residual_dtype=spectral.residual_dtype,
            extra_sigma=spectral.extra_sigma,
            enhanced=spectral.gradient == "enhanced",
            active_sigma_only=not trains_all_sigma(spectral) and not spectral.extra_sigma,
            bias=bias,
            frozen_dtype=settings.frozen_dtype or dtype,
            device="meta",
            dtype=dtype,
        )
        self.kind, self.group = kind, group
        self._take_shard(torch.device(device))
        self.bottleneck = self._bottleneck(settings.completion)
        self.initial_shard: Tensor | None = None
        """This rank's shard of the dense weight, until a controller has decomposed the whole."""

    def _take_shard(self, device: torch.device) -> None:
        """Allocate this rank's shard of every parameter, marked as Megatron marks its own."""
        ranks = self.group.size()
        for leaf, whole in list(self.named_parameters(recurse=False)):
            dim, shape = factor_sharded_dim(self.kind, leaf), list(whole.shape)
            if dim is not None:
                if shape[dim] % ranks:
                    raise ConfigError(
                        f"{shape[dim]} features cannot be sharded over {ranks} tensor-parallel "
                        "ranks; change the model's size or the tensor-parallel size"
                    )
                shape[dim] //= ranks
            shard = nn.Parameter(
                torch.zeros(shape, device=device, dtype=whole.dtype),
                requires_grad=whole.requires_grad,
            )
            if dim is not None:
                set_tensor_model_parallel_attributes(shard, True, dim, 1)
            self.register_parameter(leaf, shard)

    def _bottleneck(self, completion: Completion) -> Bottleneck | None:
        if self.group.size() == 1:
            return None
        if completion == "per_step":
            for leaf in ("v", "sigma") if self.kind == "column" else ("u", "sigma"):
                setattr(getattr(self, leaf), PARTIAL, True)
            return None
        return Bottleneck(
            "column_parallel" if self.kind == "column" else "row_parallel", self._start_sum
        )

    def _start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        return start_all_reduce(tensor, self.group)

    def forward(self, x: Tensor, *, add_bias: bool = True) -> Tensor:
        """Column-parallel: (..., in) -> this rank's outputs; row-parallel: its inputs -> a summand,
        to which no bias may be added.

        Gradients are as `SpectralProduct` says.
        """
        factors = self.factors()
        return self.product(
            x, factors if add_bias else replace(factors, bias=None), self.bottleneck
        )
