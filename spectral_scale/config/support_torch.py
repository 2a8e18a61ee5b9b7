"""What plain torch, alone or under DistributedDataParallel, can do."""

from spectral_scale.config.support import No, Support, Yes

_RESUME = "tests/integration/test_resume.py::"
_DDP = "tests/distributed/test_ddp.py::test_ddp_equals_one_process"
_METHODS = "tests/unit/methods/test_methods_runs.py"
_FROD = "tests/distributed/test_frod_backends.py::"
_TANGENT = "tests/distributed/test_tangent_backends.py::"
_MUON = "tests/distributed/test_muon_backends.py::"
_FILTER = Yes("tests/distributed/test_filter_equivalence.py::test_equals_one_process")

TORCH: dict[str, Support] = {
    "method=full": Yes(f"{_RESUME}test_resume_is_bit_exact[dense training]"),
    "method=sst": Yes(_DDP),
    "form=tangent": Yes(f"{_TANGENT}test_equals_one_process"),
    "basis=random": Yes(f"{_TANGENT}test_equals_one_process"),
    "basis=svd": Yes(f"{_TANGENT}test_equals_one_process"),
    "method=lora": Yes(_METHODS),
    "method=relora": Yes(_METHODS),
    "method=galore": Yes(_METHODS),
    "method=frod": Yes(f"{_FROD}test_ddp_equals_one_process"),
    "muon=factors": Yes(f"{_MUON}test_factors_equal_one_process"),
    "muon=matrices": Yes(f"{_MUON}test_ddp_of_dense_matrices"),
    "scale=matrices": Yes(f"{_MUON}test_ddp_of_scale"),
    "dense=frozen": Yes(f"{_FROD}test_ddp_equals_one_process"),
    "storage=residual": Yes(_DDP),
    "storage=factored": Yes(f"{_RESUME}test_resume_is_bit_exact[factored storage]"),
    "residual_dtype=int8": Yes(
        "tests/distributed/test_int8_backends.py::test_ranks_equal_one_process"
    ),
    "extra_sigma": Yes(f"{_RESUME}test_resume_is_bit_exact[extra sigma, kept moments]"),
    "moments=kept": Yes("tests/distributed/test_ddp_kept_moments.py"),
    "filter=layers": _FILTER,
    "filter=rows": _FILTER,
    "filter=heads": _FILTER,
    "filter=block_gains": _FILTER,
    "joint_loss": _FILTER,
    "precision=fp32": Yes(_DDP),
    "precision=bf16": Yes(f"{_RESUME}test_resume_is_bit_exact[bf16]"),
    "precision=fp16": No("only DeepSpeed scales the loss; set train.precision=bf16"),
    "precision=fp64": Yes("tests/unit/methods/sst/test_sst_theory.py"),
    "residual=replicated": Yes(_DDP),
    "residual=sharded": No("every rank holds the whole model; set parallel.backend=fsdp2"),
    "accumulation": Yes(_DDP),
    "clipping": Yes(_DDP),
    "dropout": Yes(f"{_RESUME}test_resume_is_bit_exact[dropout]"),
    "activation_checkpointing": Yes("tests/unit/models/test_build_materialise.py"),
    "compile": Yes("tests/distributed/test_compiled_blocks.py::test_equals_plain_blocks"),
    "resume": Yes(f"{_RESUME}test_ddp_resume_is_bit_exact"),
    "reshard": Yes(f"{_RESUME}test_resume_at_another_world_size"),
    "migrate": No("not shown yet"),
}
