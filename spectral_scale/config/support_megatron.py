"""What megatron-core can do: tensor parallelism within groups of ranks, data parallelism across."""

from spectral_scale.config.support import NOT_EIGHT_BITS, No, Support, Yes

_TRAIN = "tests/distributed/test_megatron_train.py::"
_EQUAL = Yes(f"{_TRAIN}test_equals_one_process")
_RESUME = Yes(f"{_TRAIN}test_checkpoints_move_between_layouts_and_backends")
_FILTER = Yes("tests/distributed/test_megatron_filter.py::test_equals_one_process")
_NO_MATRIX = No(
    "all linears of its blocks are converted, so that no dense matrix trains; set "
    "filter.nodes=layers, or parallel.backend=fsdp2"
)

MEGATRON: dict[str, Support] = {
    "method=full": No("Megatron trains dense models by itself; set parallel.backend=fsdp2"),
    "method=sst": _EQUAL,
    "form=tangent": No(
        "it has no form of Megatron's fused weights; set parallel.backend=fsdp2, with "
        "parallel.tensor_parallel if wanted"
    ),
    "method=lora": No("its layers have no tensor-parallel form; set parallel.backend=fsdp2"),
    "method=relora": No("its layers have no tensor-parallel form; set parallel.backend=fsdp2"),
    "method=galore": No(
        "its owners step matrices themselves, and Megatron's optimizers step all that they hold; "
        "set parallel.backend=fsdp2"
    ),
    "method=frod": No(
        "it has no form of Megatron's fused weights, which hold matrices of several categories; "
        "set parallel.backend=fsdp2, with parallel.tensor_parallel if wanted"
    ),
    "filter=layers": _FILTER,
    "filter=rows": _NO_MATRIX,
    "filter=heads": _NO_MATRIX,
    "filter=block_gains": _FILTER,
    "joint_loss": _FILTER,
    "storage=residual": _EQUAL,
    "storage=factored": _EQUAL,
    "residual_dtype=int8": NOT_EIGHT_BITS,
    "extra_sigma": _EQUAL,
    "moments=kept": No(
        "moments cannot follow their triplets through Megatron's shards; leave "
        "spectral.boundary_moments out"
    ),
    "precision=fp32": _EQUAL,
    "precision=bf16": Yes(f"{_TRAIN}test_bf16_products_train_as_on_one_process"),
    "precision=fp64": No("Megatron's optimizers and losses are fp32; set parallel.backend=torch"),
    "residual=replicated": _EQUAL,
    "residual=sharded": No(
        "frozen weights are sharded by tensor parallelism only; leave parallel.residual out"
    ),
    "accumulation": _EQUAL,
    "clipping": _EQUAL,
    "dropout": No(
        "megatron-core drops embeddings, too, which OPT does not, and under sequence parallelism "
        "draws masks from a generator of each rank that no checkpoint holds; set model.dropout=0, "
        "or parallel.backend=fsdp2"
    ),
    "activation_checkpointing": _EQUAL,
    "compile": No("compiled blocks were not tried with megatron-core; set model.compile=false"),
    "resume": _RESUME,
    "reshard": _RESUME,
    "migrate": _RESUME,
}
