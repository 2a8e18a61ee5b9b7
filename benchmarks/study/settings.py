"""What the study compares and with which settings: declared data, nothing is computed here."""

from dataclasses import dataclass, field, replace
from typing import Any

Settings = dict[str, Any]
"""Configuration values by dotted key, as `spectral-scale train` takes them."""

TUNE_STEPS = 1_000
ABLATION_STEPS = 1_500
FINAL_STEPS = 8_000
DIP_STEPS = 300
TUNING_RUNS = 3
"""Learning rates tried for each variant; the same number for all of them."""
SEEDS = (0, 1)
"""Of the final runs; tuning and ablations use the first."""
RANK, SMALL_RANK, WIDTH = 12, 6, 192
"""r/d of 6.25 % and 3.1 %."""

COMMON: Settings = {
    "model.name": "opt-tiny",
    "model.num_layers": 4,
    "model.hidden_size": WIDTH,
    "model.sequence_length": 128,
    "optimizer.eps": 1e-8,
    "optimizer.schedule": "wsd",
    "optimizer.warmup_steps": 100,
    "data.validation_sequences": 512,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 8,
    "train.precision": "bf16",
    "train.eval_interval": 500,
    "checkpoint.interval": 250,
    "checkpoint.keep_last": 1,
    "metrics.tensorboard": False,
    "metrics.progress": False,
    "metrics.log_interval": 25,
}
"""Of every run; what is not named here or below is the product's default."""
TOKENS_PER_STEP = 8 * 128
VOCABULARY = 8192


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train that is tuned and then run to the end."""

    name: str
    """In the names of its runs."""
    title: str
    """In tables and plots."""
    rate_key: str = "optimizer.spectral_lr"
    """The learning rate that is tuned."""
    first_rate: float
    """The first one tried."""
    rank: int | None = None
    """Triplets, or rank of the factors or of the projection; None for dense training."""
    settings: Settings = field(default_factory=dict)
    """What makes it this variant."""
    seeds: tuple[int, ...] = SEEDS
    """Of its final runs."""
    tuned_as: str | None = None
    """Another variant whose learning rate it takes; None: it is tuned itself."""

    @property
    def epsilon(self) -> float:
        """Adam's."""
        return float((COMMON | self.settings)["optimizer.eps"])


def _ranked(name: str, title: str, rank: int, first_rate: float, **spectral: str) -> Variant:
    values: Settings = {f"spectral.{key}": value for key, value in spectral.items()}
    return Variant(
        name=f"{name}_r{rank}",
        title=f"{title}, r = {rank}",
        first_rate=first_rate,
        rank=rank,
        settings=values | {"spectral.spectral_rank": rank},
    )


def _sst_residual(rank: int) -> Variant:
    return _ranked("sst_residual", "SST residual", rank, 2e-3, method="sst", storage="residual")


def _sst_factored(rank: int) -> Variant:
    return _ranked("sst_factored", "SST factored", rank, 2e-3, method="sst", storage="factored")


def _lora(rank: int) -> Variant:
    return _ranked("lora", "LoRA", rank, 2e-3, method="lora")


def _with_epsilon(variant: Variant, epsilon: float) -> Variant:
    """Another epsilon of Adam's at the rate tuned with 1e-8."""
    method, *rank = variant.title.split(",")
    return replace(
        variant,
        name=f"{variant.name}_eps_{epsilon}",
        title=",".join([method, f" eps {epsilon:.0e}", *rank]).replace("e-0", "e-"),
        settings=variant.settings | {"optimizer.eps": epsilon},
        tuned_as=variant.name,
    )


FULL = Variant(
    name="full",
    title="full rank",
    rate_key="optimizer.lr",
    first_rate=2e-3,
    settings={"spectral.method": "full"},
)
SST, FACTORED, LORA = _sst_residual(RANK), _sst_factored(RANK), _lora(RANK)
RELORA = _ranked("relora", "ReLoRA*", RANK, 2e-3, method="relora")

VARIANTS: tuple[Variant, ...] = (
    FULL,
    SST,
    LORA,
    FACTORED,
    RELORA,
    # Its update is scaled by optimizer.galore_scale = 0.25, hence four times the others' rate.
    _ranked("galore", "GaLore", RANK, 8e-3, method="galore"),
    _ranked(
        "sst_default",
        "SST residual, default gradients",
        RANK,
        2e-3,
        method="sst",
        storage="residual",
        gradient="default",
    ),
    _sst_residual(SMALL_RANK),
    _lora(SMALL_RANK),
    replace(_sst_factored(SMALL_RANK), seeds=()),
    *(_with_epsilon(variant, 1e-6) for variant in (SST, FACTORED)),
    *(
        replace(_with_epsilon(variant, 1e-4), seeds=SEEDS[:1])
        for variant in (FULL, SST, LORA, FACTORED)
    ),
)
"""In the order in which they are run and shown."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """One change to a tuned run."""

    name: str
    """In the name of its run."""
    question: str
    """What it asks; ablations of one question stand together in the table."""
    title: str
    """The setting, in a table."""
    settings: Settings = field(default_factory=dict)
    """The change."""
    rate_factor: float = 1.0
    """On the tuned learning rate."""
    of: Variant = SST
    """Whose run is changed."""

    def run(self, seed: int) -> str:
        """The name of its run."""
        return f"ablation-{self.name}" + (f"-seed_{seed}" if seed else "")


def _change(question: str, key: str, value: Any, *, rate_factor: float = 1.0) -> Ablation:
    leaf = key.rpartition(".")[2]
    factor = "" if rate_factor == 1.0 else f", learning rate x {rate_factor:g}"
    return Ablation(
        name=f"{leaf}_{value}" + (f"-rate_x{rate_factor:g}" if factor else ""),
        question=question,
        title=f"`{leaf}: {value}`{factor}",
        settings={key: value},
        rate_factor=rate_factor,
    )


def _rate(factor: float) -> Ablation:
    title = f"learning rate x {factor:g}"
    return Ablation(
        name=f"rate_x{factor:g}", question="learning rate", title=title, rate_factor=factor
    )


EPSILONS = (1e-6, 1e-5, 1e-4, 1e-3)


def _epsilon_of(name: str, title: str, variant: Variant, epsilon: float) -> Ablation:
    return Ablation(
        name=f"{name}_eps_{epsilon}",
        question=_EPS,
        title=f"{title}, `eps: {epsilon}`",
        settings={"optimizer.eps": epsilon},
        of=variant,
    )


_LENGTH, _WARMUP = "steps between swaps (T3)", "warm-up after a swap"
_WIDTH, _DRAW, _EPS = "learning rate by width", "how triplets are drawn", "Adam's epsilon"
_SIGMA, _MOMENTS = "which sigma train", "moments at a swap"
_SCALING = "spectral.direction_lr_scaling"

BASE = Ablation(name="base", question="-", title="as tuned (the run the others are held against)")
FULL_BASE = Ablation(name="full_base", question="-", title="full rank as tuned", of=FULL)
LORA_BASE = Ablation(name="lora_base", question="-", title="LoRA as tuned", of=LORA)
BASES = {base.of.name: base for base in (BASE, FULL_BASE, LORA_BASE)}
"""Variant -> its unchanged run."""
ABLATIONS: tuple[Ablation, ...] = (
    BASE,
    *(_change(_LENGTH, "spectral.steps_per_iteration", t3) for t3 in (50, 400)),
    *(_change(_WARMUP, "spectral.iteration_warmup_steps", n) for n in (0, 50)),
    _change(_DRAW, "spectral.sampling", "partitioned"),
    *(_change(_MOMENTS, "spectral.boundary_moments", m) for m in ("keep_sigma", "keep_redrawn")),
    *(_change(_SIGMA, "spectral.extra_sigma", s) for s in (RANK, 4 * RANK)),
    _rate(0.5),
    _rate(2.0),
    _change(_WIDTH, _SCALING, "width"),
    _change(_WIDTH, _SCALING, "width", rate_factor=0.5),
    *(_change(_EPS, "optimizer.eps", eps) for eps in (1e-12, *EPSILONS)),
    FULL_BASE,
    *(_epsilon_of("full", "full rank", FULL, eps) for eps in EPSILONS),
    LORA_BASE,
    *(_epsilon_of("lora", "LoRA", LORA, eps) for eps in EPSILONS),
)
"""In the order in which they are run."""
CONFIRMED = ("base", "steps_per_iteration_400", "eps_1e-06")
"""Run with the other seed, too: the largest gains of the first, and what they are held against."""

FINAL: Settings = {"train.eval_interval": 1000}
"""Of the final runs."""

DIP: Settings = {
    "optimizer.lr": 2e-3,
    "optimizer.spectral_lr": 2e-3,
    "optimizer.schedule": "constant",
    "spectral.steps_per_iteration": 50,
    "metrics.log_interval": 1,
}
"""Of the short runs that show the gradient norm around boundaries; nothing in them is tuned."""
DIP_VARIANTS = (SST, RELORA)
