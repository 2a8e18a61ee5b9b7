"""Settings of `tiny_config` that tests of several ranks combine."""

BINDING = 0.1
"""A limit below every group's gradient norm but that of sigma."""
CLIPPED = {"optimizer__clip_grad_norm": BINDING}
UNCLIPPED = {"optimizer__clip_grad_norm": 0}
FACTORED = {"spectral__storage": "factored"}
RECOMPUTED = {"model__activation_checkpointing": True}
DOUBLE = {"train__precision": "fp64"}
BF16 = {"train__precision": "bf16"}
DEEPSPEED = {"parallel__backend": "deepspeed"}
OFFLOADED = {"parallel__offload": "cpu"}
PLAIN_ADAM = {"parallel__distributed_optimizer": False}
