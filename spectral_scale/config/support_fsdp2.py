"""What FSDP2 and HSDP (fully_shard over all ranks, or inside groups of them) can do."""

from spectral_scale.config.support import No, Support, Yes

_FILE = "tests/distributed/test_equivalence_fsdp2.py::"
_EQUAL = f"{_FILE}test_equals_one_process"

FSDP2: dict[str, Support] = {
    "method=sst": Yes(_EQUAL),
    "method=galore": No("its projectors need whole gradients on every rank; use backend=torch"),
    "storage=residual": Yes(_EQUAL),
    "storage=factored": Yes(_EQUAL),
    "precision=fp32": Yes(f"{_FILE}test_losses_equal_in_single_precision"),
    "precision=fp64": Yes(_EQUAL),
    "residual=sharded": Yes(_EQUAL),
    "residual=replicated": Yes(_EQUAL),
    "accumulation": Yes(_EQUAL),
    "clipping": Yes(_EQUAL),
}
HSDP: dict[str, Support] = dict(FSDP2)
