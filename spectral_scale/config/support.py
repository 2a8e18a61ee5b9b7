"""The features of the capability table, and the form of its answers. No torch here."""

from dataclasses import dataclass

from spectral_scale.config.methods import METHOD_SPECS


@dataclass(frozen=True)
class Yes:
    """A feature that works."""

    test: str
    """The test that proves it, as pytest names it from the root of the repository."""


@dataclass(frozen=True)
class No:
    """A feature that is refused."""

    reason: str
    """Why, and what to do instead."""


Support = Yes | No

NOT_EIGHT_BITS = No(
    "no test has shown it yet; leave spectral.residual_dtype out, or set parallel.backend=torch"
)
"""The answer of a backend that might cast or flatten whole numbers."""
FEATURES: dict[str, str] = {
    **{spec.feature: spec.title for spec in METHOD_SPECS.values()},
    "basis=random": "tangent form, random bases",
    "basis=svd": "tangent form, bases of singular vectors",
    "storage=residual": "SST, residual storage",
    "storage=factored": "SST, factored storage",
    "residual_dtype=int8": "SST, residual of eight bits",
    "extra_sigma": "SST, extra trained singular values",
    "moments=kept": "SST, moments that survive a swap",
    "muon=factors": "Muon for trained factors",
    "muon=matrices": "Muon for dense matrices",
    "scale=matrices": "SCALE for dense matrices",
    "dense=frozen": "frozen embeddings, norms and other linears",
    "filter=layers": "spectral filter over layers",
    "filter=rows": "spectral filter over rows",
    "filter=heads": "spectral filter over heads",
    "filter=block_gains": "spectral filter of block gains",
    "joint_loss": "joint loss over the filter's graph",
    "precision=fp32": "fp32",
    "precision=bf16": "bf16",
    "precision=fp16": "fp16, dynamic loss scale",
    "precision=fp64": "fp64 (tests)",
    "residual=replicated": "frozen weights replicated",
    "residual=sharded": "frozen weights sharded",
    "accumulation": "gradient accumulation",
    "clipping": "gradient clipping by kind of group",
    "dropout": "dropout",
    "activation_checkpointing": "activation checkpointing",
    "compile": "compiled blocks",
    "resume": "bit-exact resume",
    "reshard": "resume at another world size",
    "migrate": "resume from another backend",
}
"""Feature -> its name for a person. One with a setting is `key=value`, else a switch or a habit."""
