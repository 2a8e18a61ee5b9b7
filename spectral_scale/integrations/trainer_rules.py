"""A trainer's arguments in the words of a run, and what of a trainer is refused."""

from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from spectral_scale.config.schema import (
    FilterConfig,
    OptimizerConfig,
    RunConfig,
    SpectralConfig,
    TrainConfig,
)
from spectral_scale.errors import ConfigError

_ADAMW = ("adamw_torch", "adamw_torch_fused")
"""`optim` of TrainingArguments that the method's own AdamW may stand for."""


def run_config(
    args: TrainingArguments,
    spectral: SpectralConfig,
    filter_config: FilterConfig | None,
    spectral_lr: float | None,
) -> RunConfig:
    """The trainer's arguments in the words of a run."""
    optimizer = OptimizerConfig(
        lr=args.learning_rate,
        spectral_lr=args.learning_rate if spectral_lr is None else spectral_lr,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )
    return RunConfig(
        spectral=spectral,
        filter=filter_config or FilterConfig(),
        optimizer=optimizer,
        train=TrainConfig(seed=args.seed, precision="bf16" if args.bf16 else "fp32"),
    )


def refuse(trainer: Trainer, config: RunConfig) -> None:
    """Raise ConfigError for what the callback cannot follow, naming it."""
    args = trainer.args
    model: Any = trainer.model
    optim = str(getattr(args.optim, "value", args.optim))
    refused = {
        "DeepSpeed": (
            trainer.is_deepspeed_enabled,
            "use spectral-scale train, or ZeroStore in your own loop",
        ),
        "FSDP": (
            trainer.is_fsdp_enabled,
            "use spectral-scale train, or FSDP2Store in your own loop",
        ),
        "a model that is sharded or tensor-parallel when it is loaded": (
            getattr(model, "is_distributed_loading_by_transformers", False),
            "load it whole",
        ),
        "DataParallel over several GPUs of one process": (
            args.n_gpu > 1,
            "start one process a GPU with torchrun",
        ),
        "fp16=True": (args.fp16, "use bf16=True"),
        "bf16_full_eval or fp16_full_eval": (
            args.bf16_full_eval or args.fp16_full_eval,
            "evaluate in the precision of training",
        ),
        "trained parameters in less than 32 bits": (
            any(p.requires_grad and p.dtype != torch.float32 for p in model.parameters()),
            "load the model with dtype=torch.float32; bf16=True computes products in bf16",
        ),
        "model_init": (trainer.model_init is not None, "give model="),
        "auto_find_batch_size": (args.auto_find_batch_size, "set the batch size"),
        f"optim={optim}": (
            optim not in _ADAMW,
            f"the method brings its AdamW; leave optim out, or give one of {_ADAMW}",
        ),
        "an optimizer of your own": (
            trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None,
            "leave optimizers= out: attach() builds the method's",
        ),
        "a filter with max_grad_norm": (
            config.filter.enabled and args.max_grad_norm > 0,
            "the trainer clips before a callback can filter; set max_grad_norm=0",
        ),
    }
    for what, (given, advice) in refused.items():
        if given:
            raise ConfigError(f"the trainer has {what}, which attach() does not support; {advice}")
