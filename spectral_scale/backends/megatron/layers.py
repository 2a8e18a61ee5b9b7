"""megatron-core's parallel linears with their weight held as trained triplets and a frozen rest.

What enters and leaves a layer, and in which parallel state, is the base layer's; so are its
collectives. Fused weights are several logical matrices, each with triplets of its own.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from spectral_scale.backends.megatron.fused import Fused, FusedLayout
from spectral_scale.backends.megatron.matrix import MatrixSettings, SpectralMatrix
from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.layer import in_product_dtype
from spectral_scale.parallel.tensor_parallel_table import factor_sharded_dim


class SpectralColumnParallelLinear(ColumnParallelLinear):
    """A ColumnParallelLinear of one or more spectral matrices, children by name.

    Arguments and results are the base's. `settings` and `fused` are bound by `bound`; without,
    creation raises ConfigError. Its outputs are fused as the base's weight would fuse them.
    """

    settings: ClassVar[MatrixSettings | None] = None
    fused: ClassVar[Fused] = "none"

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ModelParallelConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool = True,
        **options: Any,
    ) -> None:
        _refuse(type(self).__name__, options)
        if options.pop("stride", 1) not in (1, 2 if self.fused == "gated" else 1):
            raise ConfigError("stride is given by what the weight fuses; leave it out")
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            bias=False,
            skip_weight_param_allocation=True,
            **options,
        )
        settings = _required(self.settings)
        self.init_method = init_method
        self.layout = FusedLayout(self.fused, config, output_size, self.tp_group.size())
        self.matrix_names = tuple(self.layout.sizes())
        for name, rows in self.layout.sizes().items():
            matrix = SpectralMatrix(
                input_size,
                rows,
                settings,
                kind="column",
                group=self.tp_group,
                bias=bias,
                device=_device(config),
                dtype=config.params_dtype,
            )
            self.add_module(name, matrix)

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, in] (a shard of s under sequence parallelism) -> output and bias, as the base."""
        if weight is not None:
            raise SpectralError("a spectral layer takes no weight from outside")
        x = in_product_dtype(input_)
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group)
        else:
            x = copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        matrices = [self.get_submodule(name) for name in self.matrix_names]
        output = self.layout.fuse([m(x, add_bias=not self.skip_bias_add) for m in matrices])
        gather = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if gather:
            output = gather_from_tensor_model_parallel_region(output, group=self.tp_group)
        if not self.skip_bias_add or matrices[0].bias is None:
            return output, None
        return output, self.layout.fuse([_tensor(m.bias) for m in matrices])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Every factor with the axis along which it is sharded, for megatron-core's checkpoints."""
        return _sharded_state(self, "column", prefix, sharded_offsets, metadata)


class SpectralRowParallelLinear(RowParallelLinear):
    """A RowParallelLinear of one spectral matrix, child `matrix`, whose bias is whole on each rank.

    Arguments and results are the base's. `settings` is bound by `bound`.
    """

    settings: ClassVar[MatrixSettings | None] = None
    matrix_names: tuple[str, ...] = ("matrix",)

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ModelParallelConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        **options: Any,
    ) -> None:
        _refuse(type(self).__name__, options)
        settings = _required(self.settings)
        plain = copy.copy(config)
        plain.perform_initialization = False  # the weight it allocates is dropped
        super().__init__(
            input_size, output_size, config=plain, init_method=init_method, bias=False, **options
        )
        self.config, self.init_method = config, init_method
        del self.weight
        self.register_parameter("weight", None)
        self.matrix = SpectralMatrix(
            input_size,
            output_size,
            settings,
            kind="row",
            group=self.tp_group,
            bias=bias,
            device=_device(config),
            dtype=config.params_dtype,
        )
        if self.matrix.bias is not None:
            # Added to a shard of the sequence: finalize_model_grads sums its gradient.
            _mark(self.matrix.bias, sequence_parallel=self.sequence_parallel)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, this rank's shard of in, or in] -> output and bias, as the base; under autocast an
        output with its bias added keeps the product's dtype, as that of `nn.Linear` does."""
        x = in_product_dtype(input_)
        if not self.input_is_parallel:
            x = scatter_to_tensor_model_parallel_region(x, group=self.tp_group)
        y = self.matrix(x, add_bias=False)
        if self.sequence_parallel:
            y = reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
        else:
            y = reduce_from_tensor_model_parallel_region(y, group=self.tp_group)
        bias = self.matrix.bias
        if self.skip_bias_add:
            return y, bias
        return (y if bias is None else y + bias.to(y.dtype)), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Every factor with the axis along which it is sharded, for megatron-core's checkpoints."""
        return _sharded_state(self, "row", prefix, sharded_offsets, metadata)


SpectralParallelLinear = SpectralColumnParallelLinear | SpectralRowParallelLinear


def bound(base: type, settings: MatrixSettings, fused: Fused = "none") -> type:
    """A class as megatron-core's layer specs want it: `base` with settings of its own."""
    return type(base.__name__, (base,), {"settings": settings, "fused": fused})


def _refuse(what: str, options: Mapping[str, Any]) -> None:
    for option in (
        "is_expert",
        "keep_master_weight_for_test",
        "disable_grad_reduce",
        "skip_weight_param_allocation",
    ):
        if options.get(option):
            raise ConfigError(f"{what} does not support {option}=True; use the dense layer there")


def _required(settings: MatrixSettings | None) -> MatrixSettings:
    if settings is None:
        raise ConfigError("a spectral layer needs settings; make its class with layers.bound()")
    return settings


def _device(config: Any) -> torch.device:
    return torch.device("cpu" if config.use_cpu_initialization else torch.cuda.current_device())


def _mark(tensor: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(tensor, name, value)


def _tensor(value: Tensor | None) -> Tensor:
    if value is None:
        raise SpectralError("the matrices of a fused layer must all have a bias, or none")
    return value


def _sharded_state(
    layer: Any, kind: Literal["column", "row"], prefix: str, offsets: Any, metadata: Any
) -> Any:
    axes: dict[str, int] = {}
    state = {k: v for k, v in layer.state_dict(keep_vars=True).items() if v is not None}
    for key in state:
        child, _, leaf = key.rpartition(".")
        dim = factor_sharded_dim(kind, leaf) if child in layer.matrix_names else None
        if dim is not None:
            axes[key] = dim
    return make_sharded_tensors_for_checkpoint(
        state,
        prefix,
        axes,
        offsets,
        tp_group=layer.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
