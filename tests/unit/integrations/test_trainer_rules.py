"""What `attach` refuses of a trainer that nobody has to start: each by its name."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from spectral_scale import FilterConfig, SpectralConfig
from spectral_scale.errors import ConfigError
from spectral_scale.integrations.trainer_rules import refuse, run_config

ARGUMENTS: dict[str, Any] = {
    "learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-6,
    "weight_decay": 0.1, "seed": 5, "bf16": True, "fp16": False, "n_gpu": 1,
    "bf16_full_eval": False, "fp16_full_eval": False, "auto_find_batch_size": False,
    "optim": "adamw_torch", "max_grad_norm": 1.0,
}  # fmt: skip


def trainer(**changes: Any) -> Any:
    """A trainer's attributes; those of its arguments and its own may be changed."""
    arguments = SimpleNamespace(**ARGUMENTS | {k: v for k, v in changes.items() if k in ARGUMENTS})
    own = {
        "is_deepspeed_enabled": False, "is_fsdp_enabled": False, "model_init": None,
        "optimizer": None, "optimizer_cls_and_kwargs": None, "model": nn.Linear(2, 2),
    }  # fmt: skip
    return SimpleNamespace(args=arguments, **own | {k: changes[k] for k in own.keys() & changes})


def check(given: Any, filter_config: FilterConfig | None = None) -> None:
    refuse(given, run_config(given.args, SpectralConfig(), filter_config, None))


def test_arguments_become_settings() -> None:
    config = run_config(trainer().args, SpectralConfig(), None, 2e-3)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.spectral_lr) == (1e-3, 2e-3)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.99), 1e-6, 0.1)
    assert (config.train.seed, config.train.precision) == (5, "bf16")
    check(trainer())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"is_deepspeed_enabled": True}, "DeepSpeed"),
        ({"is_fsdp_enabled": True}, "FSDP"),
        ({"n_gpu": 2}, "DataParallel"),
        ({"fp16": True}, "fp16=True"),
        ({"fp16_full_eval": True}, "fp16_full_eval"),
        ({"model": nn.Linear(2, 2, dtype=torch.bfloat16)}, "less than 32 bits"),
        ({"model_init": nn.Identity}, "model_init"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"optim": "adafactor"}, "optim=adafactor"),
        ({"optimizer": object()}, "an optimizer of your own"),
    ],
)
def test_each_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check(trainer(**changes))


def test_a_filter_needs_unclipped_gradients() -> None:
    config = FilterConfig(kind="heat")
    with pytest.raises(ConfigError, match="max_grad_norm=0"):
        check(trainer(), config)
    check(trainer(max_grad_norm=0.0), config)
