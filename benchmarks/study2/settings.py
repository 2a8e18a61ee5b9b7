"""What the second study compares and with which settings: declared data, nothing is computed."""

from dataclasses import dataclass, field

from study.settings import Settings, Variant

VOCABULARY = 128
"""Symbols: the most frequent characters of the training text, and two for the rest."""
LAYERS, HEADS, SEQUENCE = 2, 4, 64
BATCH = 32
TOKENS_PER_STEP = BATCH * SEQUENCE
WIDTH, SMALL, LARGE = 128, 64, 256
"""The width that is studied, and those that show how rates transfer and what bytes buy."""
RANK_FRACTION = 16
"""d / r."""
TUNE_STEPS, FINAL_STEPS = 1_000, 3_000
MOST_RATES = 7
"""Learning rates tried at most for a variant: the first three, then beyond an edge."""
SEEDS = (0, 1, 2)
T3, RAMP = 30, 6
"""Steps of an iteration, 16 of which are a round: 6.25 rounds in a final run; ramp after a swap."""
BASELINE_PERIOD = 200
"""Steps between merges of ReLoRA* and renewals of GaLore, as published for GaLore."""


def common(width: int) -> Settings:
    """Settings of every run; what is not named here or below is the product's default."""
    return {
        "model.name": "opt-tiny",
        "model.num_layers": LAYERS,
        "model.num_heads": HEADS,
        "model.hidden_size": width,
        "model.sequence_length": SEQUENCE,
        "model.max_positions": SEQUENCE,
        "optimizer.schedule": "wsd",
        "optimizer.warmup_steps": 100,
        "data.validation_sequences": 1024,
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": BATCH,
        "train.precision": "fp32",
        "checkpoint.interval": 250,
        "checkpoint.keep_last": 1,
        "metrics.tensorboard": False,
        "metrics.progress": False,
        "metrics.log_interval": 25,
    }


TUNE: Settings = {"optimizer.decay_steps": 3 * TUNE_STEPS // 20, "train.eval_interval": TUNE_STEPS}
"""Of tuning runs: the last 15 % decay."""
FINAL: Settings = {"optimizer.decay_steps": 3 * FINAL_STEPS // 20, "train.eval_interval": 150}
"""Of all others."""

FULL, LORA, SST = "full", "lora", "sst_residual"
"""What others are held against."""
_TANGENT = {"spectral.form": "tangent"}
_MUON = {"optimizer.name": "muon"}
_FACTOR_MUON = _MUON | {"optimizer.muon_momentum": 0.9}
_SST = {"spectral.steps_per_iteration": T3, "spectral.iteration_warmup_steps": RAMP}
_LONG = _SST | {"spectral.steps_per_iteration": 2 * T3}
_METHODS: dict[str, tuple[str, float, Settings]] = {
    FULL: ("dense, AdamW", 2e-3, {"spectral.method": "full"}),
    "tangent_muon_t60": ("tangent, Muon, T3 = 60", 2e-2, _TANGENT | _FACTOR_MUON | _LONG),
    "tangent_adam_t60": ("tangent, AdamW, T3 = 60", 8e-3, _TANGENT | _LONG),
    SST: ("SST residual", 4e-3, {"spectral.storage": "residual"} | _SST),
    LORA: ("LoRA", 4e-3, {"spectral.method": "lora"}),
    "full_muon": ("dense, Muon", 8e-3, {"spectral.method": "full"} | _MUON),
    "full_scale": (
        "dense, SCALE",
        1e-2,
        {"spectral.method": "full", "optimizer.name": "scale"},
    ),
    "tangent_muon": ("tangent, Muon", 2e-2, _TANGENT | _FACTOR_MUON | _SST),
    "tangent_adam": ("tangent, AdamW", 8e-3, _TANGENT | _SST),
    "sst_factored": ("SST factored", 4e-3, {"spectral.storage": "factored"} | _SST),
    "relora": (
        "ReLoRA*",
        4e-3,
        {
            "spectral.method": "relora",
            "spectral.steps_per_iteration": BASELINE_PERIOD,
            "spectral.iteration_warmup_steps": RAMP,
        },
    ),
    # Its update is scaled by optimizer.galore_scale = 0.25.
    "galore": (
        "GaLore",
        1.6e-2,
        {"spectral.method": "galore", "spectral.steps_per_iteration": BASELINE_PERIOD},
    ),
}
"""Name -> title, the first rate tried at width 128, settings; the most telling first."""
DENSE = (FULL, "full_muon", "full_scale")
CORE = (FULL, "tangent_muon_t60", "tangent_adam_t60", SST, LORA, "full_muon")
"""Run first, and at the smallest width as well."""
FINALISTS = (FULL, "full_muon", "tangent_muon_t60")
"""Run at the largest width as well."""


def variant(name: str, width: int) -> Variant:
    """One way to train a model of a width; rates that are tried begin lower where it is wider."""
    title, rate, settings = _METHODS[name]
    rank = None if name in DENSE else width // RANK_FRACTION
    return Variant(
        name=f"w{width}_{name}",
        title=title,
        rate_key="optimizer.lr" if name == FULL else "optimizer.spectral_lr",
        first_rate=rate * {SMALL: 2, WIDTH: 1, LARGE: 0.5}[width],
        rank=rank,
        settings=settings if rank is None else settings | {"spectral.spectral_rank": rank},
        seeds=SEEDS if width != LARGE else SEEDS[:1],
    )


NAMES = {WIDTH: tuple(_METHODS), SMALL: CORE, LARGE: FINALISTS}
"""Width -> what is tuned and run to the end there."""
VARIANTS = {width: [variant(name, width) for name in names] for width, names in NAMES.items()}
"""By width, in the order in which they are run and shown."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A final run at width 128 and at a tuned rate, with something changed."""

    name: str
    """In the name of its run."""
    of: str
    """The variant that is changed."""
    title: str
    """The change, in a table."""
    settings: Settings = field(default_factory=dict)
    """The change."""
    seeds: tuple[int, ...] = SEEDS[:1]

    def run(self, seed: int) -> str:
        """The name of its run."""
        return f"{self.name}-{self.of}-seed_{seed}"


RANKS = (32, 16, 4)
"""Ranks besides 8: r/d of 1/4, 1/8 and 1/32."""
RANKED = ("tangent_adam", "tangent_muon", SST, LORA)
RANK_CHANGES = tuple(
    Change(
        name=f"rank_{rank}",
        of=name,
        title=f"r = {rank}",
        settings={"spectral.spectral_rank": rank},
        seeds=SEEDS if rank == max(RANKS) and name in RANKED[:2] else SEEDS[:1],
    )
    for rank in RANKS
    for name in RANKED
)
_T3_KEY = "spectral.steps_per_iteration"
ABLATIONS = (
    Change(
        name="basis_svd",
        of="tangent_adam",
        title="`basis: svd` (the paper's draw)",
        settings={"spectral.basis": "svd"},
    ),
    Change(name="t3_15", of="tangent_muon", title=f"T3 = {T3 // 2}", settings={_T3_KEY: T3 // 2}),
    Change(name="t3_120", of="tangent_muon", title=f"T3 = {4 * T3}", settings={_T3_KEY: 4 * T3}),
    Change(
        name="momentum_0.95",
        of="tangent_muon",
        title="`muon_momentum: 0.95`",
        settings={"optimizer.muon_momentum": 0.95},
    ),
)

SECONDS_PER_STEP = {SMALL: 0.1, WIDTH: 0.2, LARGE: 0.5}
"""On one slow core, where nothing has been measured yet."""
