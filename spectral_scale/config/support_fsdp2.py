"""What FSDP2 and HSDP (fully_shard over all ranks, or inside groups of them) can do."""

from spectral_scale.config.support import NOT_EIGHT_BITS, No, Support, Yes

_FOLDER = "tests/distributed/"
_EQUAL = f"{_FOLDER}test_equivalence_fsdp2.py::test_equals_one_process"
_SINGLE = f"{_FOLDER}test_equivalence_fsdp2.py::test_losses_equal_in_single_precision"
_OTHERS = f"{_FOLDER}test_equivalence_fsdp2.py::test_methods_and_models_equal_one_process"
_BF16 = f"{_FOLDER}test_equivalence_fsdp2.py::test_bf16_trains_the_numbers_of_plain_torch"
_FROD = f"{_FOLDER}test_frod_backends.py::"
_SAME = f"{_FOLDER}test_fsdp2_resume.py::test_same_ranks_resume_bit_exactly"
_ELSEWHERE = f"{_FOLDER}test_fsdp2_resume.py::test_resume_elsewhere"
_TANGENT = Yes("tests/distributed/test_tangent_backends.py::test_equals_one_process")
_FILTER = Yes("tests/distributed/test_filter_equivalence.py::test_equals_one_process")

_BOTH: dict[str, Support] = {
    "method=full": Yes(_OTHERS),
    "method=sst": Yes(_EQUAL),
    "form=tangent": _TANGENT,
    "basis=random": _TANGENT,
    "basis=svd": _TANGENT,
    "method=lora": Yes(_OTHERS),
    "method=relora": Yes(_OTHERS),
    "method=galore": Yes(f"{_FOLDER}test_galore_backends.py::test_fsdp2_equals_one_process"),
    "method=frod": Yes(f"{_FROD}test_fsdp2_equals_one_process"),
    "muon=factors": Yes(f"{_FOLDER}test_muon_backends.py::test_factors_equal_one_process"),
    "muon=matrices": No(
        "torch.optim.Muon would gather each matrix from its shards in every step; set "
        "parallel.backend=torch, or train factors (spectral.form=tangent)"
    ),
    "dense=frozen": Yes(f"{_FROD}test_fsdp2_equals_one_process"),
    "storage=residual": Yes(_EQUAL),
    "storage=factored": Yes(_EQUAL),
    "residual_dtype=int8": Yes(f"{_FOLDER}test_int8_backends.py::test_ranks_equal_one_process"),
    "extra_sigma": Yes(_OTHERS),
    "moments=kept": Yes(_OTHERS),
    "filter=layers": _FILTER,
    "filter=rows": _FILTER,
    "filter=heads": _FILTER,
    "filter=block_gains": _FILTER,
    "joint_loss": _FILTER,
    "precision=fp32": Yes(_SINGLE),
    "precision=bf16": Yes(_BF16),
    "precision=fp16": No("only DeepSpeed scales the loss; set train.precision=bf16"),
    "precision=fp64": Yes(_EQUAL),
    "residual=replicated": Yes(_EQUAL),
    "residual=sharded": Yes(_EQUAL),
    "accumulation": Yes(_EQUAL),
    "clipping": Yes(_EQUAL),
    "dropout": Yes(_SAME),
    "activation_checkpointing": Yes(_OTHERS),
    "compile": Yes(f"{_FOLDER}test_compiled_blocks.py::test_equals_plain_blocks"),
    "resume": Yes(_SAME),
    "reshard": Yes(_ELSEWHERE),
    "migrate": Yes(_ELSEWHERE),
}

_TP_TESTS = f"{_FOLDER}test_tensor_parallel.py::"
_TP_EQUAL = Yes(f"{_TP_TESTS}test_equals_one_process")
_TP_FILTER = Yes(f"{_FOLDER}test_filter_tensor_parallel.py::test_equals_one_process")
_TP_STATE = Yes(f"{_TP_TESTS}test_state_moves_between_backends")
_TP_TANGENT = Yes(f"{_FOLDER}test_tangent_tensor_parallel.py::test_equals_one_process")
_TP_NO_MUON = No("no test has shown it yet; leave parallel.tensor_parallel out")

FSDP2: dict[str, Support] = _BOTH
HSDP: dict[str, Support] = dict(_BOTH)

FSDP2_TP: dict[str, Support] = {
    "method=full": _TP_EQUAL,
    "method=sst": _TP_EQUAL,
    "method=frod": _TP_EQUAL,
    "dense=frozen": _TP_EQUAL,
    "method=galore": No(
        "its owners exchange rows of matrices, and tensor parallelism also shards columns; "
        "leave parallel.tensor_parallel out"
    ),
    "form=tangent": _TP_TANGENT,
    "basis=random": _TP_TANGENT,
    "basis=svd": _TP_TANGENT,
    "muon=factors": _TP_NO_MUON,
    "muon=matrices": _TP_NO_MUON,
    "storage=residual": _TP_EQUAL,
    "storage=factored": _TP_EQUAL,
    "residual_dtype=int8": NOT_EIGHT_BITS,
    "extra_sigma": _TP_EQUAL,
    "moments=kept": _TP_EQUAL,
    "filter=layers": _TP_FILTER,
    "filter=rows": _TP_FILTER,
    "filter=heads": _TP_FILTER,
    "filter=block_gains": _TP_FILTER,
    "joint_loss": _TP_FILTER,
    "precision=fp32": _TP_EQUAL,
    "precision=bf16": Yes(f"{_TP_TESTS}test_bf16_and_dropout"),
    "precision=fp64": _TP_EQUAL,
    "residual=replicated": _TP_EQUAL,
    "residual=sharded": _TP_EQUAL,
    "accumulation": _TP_EQUAL,
    "clipping": _TP_EQUAL,
    "dropout": Yes(f"{_TP_TESTS}test_bf16_and_dropout"),
    "activation_checkpointing": _TP_EQUAL,
    "compile": No(
        "collectives of tensor parallelism inside a compiled block were not tried; set "
        "model.compile=false"
    ),
    "resume": _TP_STATE,
    "reshard": _TP_STATE,
    "migrate": _TP_STATE,
}
