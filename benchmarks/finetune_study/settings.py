"""What the fine-tuning study compares and with which settings: declared data, nothing else."""

from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]
"""Configuration values by dotted key, as `spectral-scale finetune` takes them."""

AUTHOR = "Geoffrey Chaucer"
"""Held out of pretraining; fine-tuned on."""
PRETRAIN_CHARACTERS = 150_000
"""Of each other book, at most."""
VALIDATION_SHARE = 0.2
"""Of the author's text, from its end."""
VOCABULARY = 2048
EXAMPLES = 256
"""Sequences of the author that training sees."""
FEW_EXAMPLES = (32,)
"""Fewer of them, for the methods alone, at the rates tuned with EXAMPLES."""
SEEDS = (0, 1, 2)
"""Of data order and examples; learning rates are tuned with the first."""
WIDER = 2
"""Learning rates beyond those declared that are tried while the best lies at an end."""
STEPS = 100
TOKENS_PER_STEP = 8 * 128

SHAPE: Settings = {
    "model.name": "opt-tiny",
    "model.num_layers": 4,
    "model.hidden_size": 128,
    "model.num_heads": 4,
    "model.sequence_length": 128,
}
PRETRAIN: Settings = SHAPE | {
    "spectral.method": "full",
    "optimizer.lr": 3.0e-3,
    "optimizer.schedule": "wsd",
    "optimizer.warmup_steps": 100,
    "train.steps": 1_500,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 8,
    "train.eval_interval": 500,
    "data.validation_sequences": 96,
    "checkpoint.interval": 500,
    "checkpoint.keep_last": 1,
    "metrics.tensorboard": False,
    "metrics.progress": False,
}
"""The model that all fine-tuning starts from."""
COMMON: Settings = {
    "model.name": None,
    "model.sequence_length": 128,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 10,
    "data.examples": EXAMPLES,
    "data.validation_sequences": 96,
    "train.steps": STEPS,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 8,
    "train.eval_interval": 25,
    "checkpoint.interval": 1_000,
    "checkpoint.keep_last": 1,
    "metrics.tensorboard": False,
    "metrics.progress": False,
    "metrics.log_interval": 25,
}
"""Of every fine-tuning run; what is not named here or below is the product's default."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to fine-tune."""

    name: str
    """In the names of its runs."""
    title: str
    """In tables and plots."""
    rate_key: str = "optimizer.spectral_lr"
    """The learning rate that is tuned."""
    first_rate: float
    """The first one tried."""
    nodes: str = "layers"
    """What the filter can work on."""
    settings: Settings = field(default_factory=dict)
    """What makes it this method."""


METHODS: tuple[Method, ...] = (
    Method(
        name="full",
        title="full",
        rate_key="optimizer.lr",
        first_rate=1e-3,
        settings={"spectral.method": "full"},
    ),
    Method(
        name="lora",
        title="LoRA, r = 8",
        first_rate=4e-3,
        nodes="block_gains",
        settings={
            "spectral.method": "lora",
            "spectral.spectral_rank": 8,
            "spectral.train_dense": False,
        },
    ),
    Method(
        name="sst",
        title="SST, r = 16",
        first_rate=4e-3,
        settings={
            "spectral.method": "sst",
            "spectral.spectral_rank": 16,
            "spectral.steps_per_iteration": 40,
            "spectral.iteration_warmup_steps": 5,
            "spectral.train_dense": False,
        },
    ),
    Method(
        name="frod",
        title="FRoD, s = 0.02",
        first_rate=4e-3,
        settings={
            "spectral.method": "frod",
            "spectral.sparsity": 0.02,
            "spectral.train_dense": False,
        },
    ),
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to use the filter."""

    name: str
    """In the names of its runs."""
    title: str
    """In tables and plots."""
    settings: Settings = field(default_factory=dict)
    """Of the `filter` section; `filter.nodes` is the method's."""
    tuned: tuple[float, ...] = (1.0, 0.5, 2.0)
    """Factors on the learning rate of the method alone that are tried, or values of `key`."""
    control: bool = False
    """Whether it runs at the filter's learning rate, so that nothing else differs from that."""
    key: str | None = None
    """A setting that is tuned instead of the learning rate."""


NONE = Variant(name="none", title="no filter", tuned=(1.0, 2.0, 0.5, 4.0, 0.25))
FILTER = Variant(name="filter", title="filter", settings={"filter.kind": "rational"})
VARIANTS: tuple[Variant, ...] = (
    NONE,
    FILTER,
    Variant(
        name="matched",
        title="filter, norm-matched",
        settings={"filter.kind": "rational", "filter.norm_matched": True},
        tuned=(1.0,),
        control=True,
    ),
    Variant(
        name="permuted",
        title="filter, permuted graph",
        settings={"filter.kind": "rational", "filter.permute_nodes": True},
        tuned=(1.0,),
        control=True,
    ),
    Variant(
        name="regulariser",
        title="regulariser only",
        key="filter.joint_loss_mu",
        tuned=(0.01, 0.1, 1.0),
    ),
)
"""In the order in which they are run and shown."""


def possible(method: Method, variant: Variant) -> bool:
    """Whether the product runs it: the joint loss compares entries, and LoRA's factors of two
    layers lie in bases of their own."""
    return not (variant.key == "filter.joint_loss_mu" and method.nodes == "block_gains")
