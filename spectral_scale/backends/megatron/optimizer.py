"""Megatron's optimizers around a torch AdamW, and where they keep masters and moments."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from torch import Tensor, nn

from spectral_scale.errors import ConfigError
from spectral_scale.optim.groups import param_groups


def spectral_optimizer(
    model: DistributedDataParallel,
    *,
    lr: float,
    spectral_lr: float,
    weight_decay: float = 0.0,
    clip_grad: float = 1.0,
    **adamw: Any,
) -> MegatronOptimizer:
    """AdamW with groups for triplets, as one of Megatron's optimizers; its sharded one if the
    model's `use_distributed_optimizer` is set. Under Megatron's OptimizerParamScheduler groups keep
    their own peak learning rates, and only dense matrices are decayed.

    Args:
        model: holds spectral layers.
        lr: of dense parameters.
        spectral_lr: of directions and singular values, which are never decayed.
        weight_decay: of dense matrices.
        clip_grad: largest norm of the gradient of all parameters together; 0: never clip.
        adamw: further arguments of torch.optim.AdamW (betas, eps).
    """
    groups = param_groups(model.module, lr=lr, spectral_lr=spectral_lr, weight_decay=weight_decay)
    for group in groups:  # what Megatron's OptimizerParamScheduler reads, and would else assume
        group |= {"max_lr": group["lr"], "wd_mult": float(group["name"] == "dense")}
    return wrap_adamw(torch.optim.AdamW(groups, lr=lr, **adamw), model, clip_grad=clip_grad)


def wrap_adamw(
    adamw: torch.optim.AdamW, model: DistributedDataParallel, *, clip_grad: float
) -> MegatronOptimizer:
    """`adamw` inside Megatron's FP32Optimizer, or its DistributedOptimizer where that is set."""
    distributed = model.ddp_config.use_distributed_optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=adamw.defaults["lr"],
        clip_grad=clip_grad,
        use_distributed_optimizer=distributed,
        params_dtype=torch.float32,
    )
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    wrapped: Any
    if distributed:
        wrapped = DistributedOptimizer(
            adamw,
            config,
            None,
            None,
            model_chunks=[model],
            per_model_buffers={0: model.buffers},
            data_parallel_group=parallel_state.get_data_parallel_group(),
            data_parallel_group_gloo=None,
            data_parallel_group_idx=tensor_group.rank(),
            distributed_optimizer_instance_id=0,
        )
        # Gradient statistics add up over shards and tensor-parallel ranks.
        wrapped.grad_stats_parallel_group = torch.distributed.group.WORLD
    else:
        wrapped = FP32Optimizer(adamw, config, None)
        wrapped.grad_stats_parallel_group = parallel_state.get_model_parallel_group()
    wrapped.tp_group = tensor_group
    optimizer: MegatronOptimizer = wrapped
    return optimizer


class Masters:
    """Which elements of a parameter this rank's optimizer steps, and its state of them.

    Args:
        optimizer: a torch AdamW, or a Megatron optimizer around one (or several, chained).

    Raises:
        ConfigError: the optimizer keeps masters of another precision, or is not torch's AdamW.
    """

    def __init__(self, optimizer: Any) -> None:
        self._parts = [_Part(o) for o in _unchained(optimizer)]

    def stepped(self, parameter: nn.Parameter) -> tuple[Tensor, int, dict[str, Tensor]] | None:
        """The elements (1-D, or the parameter itself), where they begin in it, and their state
        (exp_avg, exp_avg_sq of their shape, step of none); None if others step all of it."""
        for part in self._parts:
            found = part.stepped(parameter)
            if found is not None:
                return found
        return None

    @property
    def sharded(self) -> bool:
        """Whether data-parallel ranks step different elements."""
        return any(part.sharded is not None for part in self._parts)


class _Part:
    """One torch optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.sharded = optimizer if isinstance(optimizer, DistributedOptimizer) else None
        self.inner = optimizer
        if isinstance(optimizer, FP32Optimizer | DistributedOptimizer):
            self.inner = optimizer.optimizer
        if not isinstance(self.inner, torch.optim.Adam | torch.optim.AdamW):
            raise ConfigError(
                f"{type(optimizer).__name__} around {type(self.inner).__name__} is not supported: "
                "moments are reset in torch's Adam or AdamW with fp32 parameters only; make the "
                "optimizer with spectral_scale.megatron.spectral_optimizer"
            )
        self._own = {id(p) for g in self.inner.param_groups for p in g["params"]}

    def stepped(self, parameter: nn.Parameter) -> tuple[Tensor, int, dict[str, Tensor]] | None:
        if self.sharded is None:
            if id(parameter) not in self._own:
                return None
            return parameter, 0, self.inner.state[parameter]
        place = self.sharded.model_param_group_index_map.get(parameter)
        if place is None:
            return None
        group, order = place
        main = self.inner.param_groups[group]["params"][order]
        start = self.sharded._get_model_param_range_map(parameter)["param"].start
        return main, start, self.inner.state[main]


def _unchained(optimizer: Any) -> Iterator[Any]:
    if isinstance(optimizer, ChainedOptimizer):
        for part in optimizer.chained_optimizers:
            yield from _unchained(part)
    elif not getattr(optimizer, "is_stub_optimizer", False):
        yield optimizer
