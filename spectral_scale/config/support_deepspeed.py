"""What DeepSpeed's ZeRO stages can do, with and without offload to the CPU."""

from spectral_scale.config.support import FEATURES, NOT_EIGHT_BITS, No, Support, Yes

_TESTS = "tests/distributed/test_equivalence_deepspeed.py::"
_EQUAL = Yes(f"{_TESTS}test_equals_one_process")
_FP16 = "tests/distributed/test_deepspeed_fp16.py::"
_FEATURES = "tests/distributed/test_deepspeed_features.py::"
_FROD = "tests/distributed/test_frod_backends.py::"
_GALORE = "tests/distributed/test_galore_backends.py::"
_STATE = "tests/distributed/test_deepspeed_state.py::"
_TANGENT = Yes("tests/distributed/test_tangent_backends.py::test_equals_one_process")
_FILTER = Yes("tests/distributed/test_filter_equivalence.py::test_equals_one_process")


def _refused(reason: str) -> dict[str, Support]:
    return dict.fromkeys(FEATURES, No(reason))


_NO_MUON = No(
    "its flat partitions cut matrices anywhere; set parallel.backend=torch or (factors only) fsdp2"
)

_COMMON: dict[str, Support] = {
    "method=full": Yes(f"{_TESTS}test_methods"),
    "method=sst": _EQUAL,
    "form=tangent": _TANGENT,
    "basis=random": _TANGENT,
    "basis=svd": _TANGENT,
    "method=lora": Yes(f"{_TESTS}test_methods"),
    "method=relora": Yes(f"{_TESTS}test_methods"),
    "method=galore": Yes(f"{_GALORE}test_zero_equals_one_process"),
    "method=frod": Yes(f"{_FROD}test_zero_equals_one_process"),
    "muon=factors": _NO_MUON,
    "muon=matrices": _NO_MUON,
    "dense=frozen": Yes(f"{_FROD}test_zero_equals_one_process"),
    "storage=residual": _EQUAL,
    "storage=factored": _EQUAL,
    "residual_dtype=int8": NOT_EIGHT_BITS,
    "filter=layers": _FILTER,
    "filter=rows": _FILTER,
    "filter=heads": _FILTER,
    "filter=block_gains": _FILTER,
    "joint_loss": _FILTER,
    "precision=fp32": _EQUAL,
    "precision=bf16": Yes(f"{_TESTS}test_bf16_trains_fp32_masters"),
    "precision=fp16": Yes(f"{_FP16}test_equals_one_process"),
    "precision=fp64": No("masters are fp32; set parallel.backend=torch"),
    "residual=replicated": _EQUAL,
    "residual=sharded": No("ZeRO below stage 3 keeps weights whole; set parallel.zero_stage=3"),
    "accumulation": _EQUAL,
    "clipping": _EQUAL,
    "dropout": Yes(f"{_FEATURES}test_dropout_and_recomputation_equal_ddp"),
    "activation_checkpointing": Yes(f"{_FEATURES}test_dropout_and_recomputation_equal_ddp"),
    "compile": Yes("tests/distributed/test_compiled_blocks.py::test_equals_plain_blocks"),
    "resume": Yes(f"{_STATE}test_resume_is_bit_exact"),
    "reshard": Yes(f"{_STATE}test_reshard_and_migrate"),
    "migrate": Yes(f"{_STATE}test_reshard_and_migrate"),
}
_HIDDEN_STEP = No(
    "DeepSpeed takes a hidden optimizer step when it starts stage 0 in half precision; "
    "set parallel.zero_stage=1"
)
_ZERO0: dict[str, Support] = _COMMON | {
    "precision=bf16": _HIDDEN_STEP,
    "precision=fp16": _HIDDEN_STEP,
    "compile": No("no test has shown it; set parallel.zero_stage=1"),
}
_NOT_COMPILED: dict[str, Support] = {
    "compile": No("no test has shown it with offload; set parallel.offload=none"),
}
_ZERO3: dict[str, Support] = _COMMON | {
    "residual=replicated": No("ZeRO-3 shards frozen weights, too; set parallel.zero_stage=2"),
    "residual=sharded": _EQUAL,
}

DEEPSPEED: dict[str, dict[str, Support]] = {
    "zero0": _ZERO0,
    "zero1": _COMMON,
    "zero2": _COMMON,
    "zero3": _ZERO3,
    "zero0+offload": _refused("stage 0 shards nothing to offload; set parallel.zero_stage=2"),
    "zero1+offload": _refused("no test has shown it; set parallel.zero_stage=2"),
    "zero2+offload": _COMMON | _NOT_COMPILED,
    "zero3+offload": _ZERO3 | _NOT_COMPILED,
}
"""Row of the capability table, a stage with or without offload (see `capability.variant`) ->
feature -> support."""
