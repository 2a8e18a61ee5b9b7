"""Settings of torch that silently lower the precision of products, and how they are kept out.

Three of them round what a caller believes to be float32: TF32 (10 bits of mantissa, switched on
by `torch.set_float32_matmul_precision`, `torch.backends` or TORCH_ALLOW_TF32_CUBLAS_OVERRIDE),
autocast around the call, and cuBLAS's reduced-precision reductions, which sum parts of a bf16 or
fp16 product in that type. A training step may use the first two by choice. The bank must never
meet them, since it is the truth that every later weight is built from.
"""

import contextlib
import os
from collections.abc import Iterator

import torch

DETERMINISTIC_CUBLAS = ":4096:8"
"""Workspace with which cuBLAS repeats its results; torch refuses deterministic products without."""


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Compute products in the dtype of their operands: no TF32, no bf16 on CPUs, no autocast.

    The settings that were found are put back. They are process-wide, so nothing else should
    compute products in other threads meanwhile; where they are exact already, nothing is touched.
    """
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        if _float32_is_exact():
            yield
            return
        overall, cuda, cpu = _overall_precision(), *_float32_precisions()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if overall is not None:
                torch.set_float32_matmul_precision(overall)
            torch.backends.cuda.matmul.fp32_precision = cuda
            torch.backends.mkldnn.matmul.fp32_precision = cpu  # type: ignore[attr-defined]


def set_product_precision(*, tf32: bool) -> None:
    """Settings of a whole run: TF32 for float32 products only if asked for, and sums in float32.

    The gradients of u and v are sums over all tokens of a batch, which cuBLAS may split into
    parts and add up in bf16 unless it is told not to.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def set_determinism(*, on_cuda: bool) -> None:
    """Bit-reproducible kernels: an error where a GPU has none, a warning on the CPU."""
    if on_cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", DETERMINISTIC_CUBLAS)
    torch.use_deterministic_algorithms(True, warn_only=not on_cuda)


def describe_precision() -> str:
    """The settings in force, as one line for the log."""
    matmul = torch.backends.cuda.matmul
    reductions = {
        "bf16": matmul.allow_bf16_reduced_precision_reduction,
        "fp16": matmul.allow_fp16_reduced_precision_reduction,
    }
    reduced = [name for name, allowed in reductions.items() if allowed]
    cuda, cpu = ("ieee" if found == "none" else found for found in _float32_precisions())
    return (
        f"float32 products {cuda} on GPUs and {cpu} on CPUs, "
        f"reduced-precision sums {' and '.join(reduced) or 'off'}, deterministic kernels "
        f"{'on' if torch.are_deterministic_algorithms_enabled() else 'off'}"
    )


def _float32_precisions() -> tuple[str, str]:
    """The precision of float32 products on GPUs and on CPUs: `ieee`, `tf32`, `bf16` or `none`.

    `none` is torch's default, which computes as `ieee` does.
    """
    cpu: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return torch.backends.cuda.matmul.fp32_precision, cpu


def _float32_is_exact() -> bool:
    return set(_float32_precisions()) <= {"ieee", "none"}


def _overall_precision() -> str | None:
    """`highest`, `high` or `medium`; None where torch's older and newer switches disagree."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
