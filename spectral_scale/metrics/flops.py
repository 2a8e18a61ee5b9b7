"""FLOPs of a model and the peak of a device, for the model-FLOPs utilisation (MFU). No torch.

A multiply-add counts as two; attention is counted over the full square, masked or not, and
recomputed activations are not counted: the conventions of PaLM (arXiv 2204.02311, appendix B).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

Storage = Literal["residual", "factored"]


def dense_linear_flops(m: int, n: int, tokens: int) -> int:
    """FLOPs, forward and backward, of a trained dense m x n matrix on `tokens` tokens: 6 m n T."""
    return 6 * m * n * tokens


def sst_linear_flops(m: int, n: int, r: int, tokens: int, storage: Storage) -> int:
    """FLOPs, forward and backward, of an m x n SST layer with r active triplets.

    residual: [4 m n + 6 r (m + n)] T. The frozen residual has no weight gradient.
    factored: [4 k (m + n) + 2 r (m + n)] T with k = min(m, n): all directions multiply forward
    and backward, the active ones have a weight gradient too.

    Swaps and re-decompositions are not included; they are measured (`spectral/boundary_seconds`).

    Raises:
        ValueError: r outside 0..min(m, n), or an unknown storage.
    """
    k = min(m, n)
    if not 0 <= r <= k:
        raise ValueError(f"r = {r} given, 0 to min(m, n) = {k} required")
    if storage == "residual":
        return (4 * m * n + 6 * r * (m + n)) * tokens
    if storage == "factored":
        return (4 * k + 2 * r) * (m + n) * tokens
    raise ValueError(f"storage {storage!r} given, 'residual' or 'factored' required")


def attention_flops_per_token(*, num_layers: int, hidden_size: int, sequence_length: int) -> int:
    """FLOPs a token, forward and backward, of the products QK^T and PV: 12 L h s."""
    return 12 * num_layers * hidden_size * sequence_length


class Shaped(Protocol):
    """A parameter as `parallel.table.ParameterInfo` describes it."""

    @property
    def fqn(self) -> str:
        """Dotted name in the model."""
        ...

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape before any sharding."""
        ...

    @property
    def role(self) -> str:
        """Part that it plays in its layer."""
        ...

    @property
    def layer(self) -> str | None:
        """The converted layer it belongs to; None for dense weights."""
        ...

    @property
    def trainable(self) -> bool:
        """Whether the optimizer trains it."""
        ...


@dataclass(frozen=True, kw_only=True)
class MatrixProduct:
    """The products of one matrix with every token, in a forward and a backward pass."""

    fqn: str
    """Name of the matrix; empty for the output layer."""
    shape: tuple[int, int]
    """Logical shape of the matrix."""
    times: int
    """Products: forward, gradient of the input, and the matrix's own gradient if it is needed."""
    converted: bool
    """Whether a method put the matrix in the place of a dense one."""

    @property
    def flops_per_token(self) -> int:
        """2 FLOPs for each entry of the matrix in each product."""
        return 2 * self.times * self.shape[0] * self.shape[1]


def matrix_products(
    parameters: Iterable[Shaped], *, vocab_size: int, embedding_size: int
) -> Iterator[MatrixProduct]:
    """Every matrix of a model that multiplies activations, converted by any method, and the output
    layer, which comes first and once: an embedding that is only looked up multiplies nothing.

    A frozen matrix needs no gradient of its own; FRoD needs that of its frozen weight as well.
    """
    yield MatrixProduct(fqn="", shape=(vocab_size, embedding_size), times=3, converted=False)
    for p in parameters:
        converted = p.layer is not None
        dense = p.role == "matrix" and "embed" not in p.fqn and "lm_head" not in p.fqn
        if len(p.global_shape) == 2 and (converted or dense):
            needed = not converted or p.trainable or p.role == "mixed"
            shape = (p.global_shape[0], p.global_shape[1])
            times = 3 if needed else 2
            yield MatrixProduct(fqn=p.fqn, shape=shape, times=times, converted=converted)


def model_flops_per_token(
    products: Iterable[MatrixProduct], *, num_layers: int, hidden_size: int, sequence_length: int
) -> int:
    """FLOPs a token of one training step: the products of matrices, and attention."""
    return sum(product.flops_per_token for product in products) + attention_flops_per_token(
        num_layers=num_layers, hidden_size=hidden_size, sequence_length=sequence_length
    )


def model_flops_utilization(
    *, flops_per_token: float, tokens_per_second: float, peak_flops_per_second: float | None
) -> float | None:
    """MFU as a fraction; None when the peak is not known.

    Args:
        flops_per_token: `model_flops_per_token`.
        tokens_per_second: over all devices.
        peak_flops_per_second: `peak_flops` times the number of devices.
    """
    if peak_flops_per_second is None:
        return None
    return flops_per_token * tokens_per_second / peak_flops_per_second


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense (no sparsity) matrix-product peak of one device in FLOP/s, from its data sheet.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        precision: fp64, fp32 (TF32 off), tf32, bf16 or fp16; products accumulate in fp32.

    Returns:
        None when the device, or the precision on it, is not in the table, or the device is a
        slice of one (MIG): an MFU is then not reported, never guessed.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, teraflops in _PEAK_TERAFLOPS:
        if re.search(pattern, device_name, re.IGNORECASE):
            peak = teraflops.get(precision)
            return None if peak is None else peak * 1e12
    return None


def _half(value: float, **others: float) -> dict[str, float]:
    return {"bf16": value, "fp16": value, **others}


_HOPPER_SXM = _half(989.0, tf32=494.0, fp32=67.0, fp64=67.0)
_HOPPER_NVL = _half(835.0, tf32=417.0, fp32=60.0, fp64=60.0)

# First match wins. A name that does not tell which board it is (a bare "H100") has no row.
_PEAK_TERAFLOPS: list[tuple[str, dict[str, float]]] = [
    (r"\bB200\b", _half(2250.0)),
    (r"\bGH200\b", _HOPPER_SXM),
    (r"\bH[12]00 NVL\b", _HOPPER_NVL),
    (r"\bH200\b", _HOPPER_SXM),
    (r"\bH100 PCIe\b", _half(756.0, tf32=378.0, fp32=51.0, fp64=51.0)),
    (r"\bH100\b.*(HBM3|SXM)", _HOPPER_SXM),
    (r"\bH800\b.*(HBM3|SXM)", _half(989.0, tf32=494.0, fp32=67.0)),
    (r"\bA[18]00\b", _half(312.0, tf32=156.0, fp32=19.5, fp64=19.5)),
    (r"\bA40\b", _half(149.7, tf32=74.8, fp32=37.4)),
    (r"\bA30\b", _half(165.0, tf32=82.0, fp32=10.3, fp64=10.3)),
    (r"\bA10G\b", _half(70.0, tf32=35.0, fp32=35.0)),
    (r"\bA10\b", _half(125.0, tf32=62.5, fp32=31.2)),
    (r"\bRTX A6000\b", _half(154.8, tf32=77.4, fp32=38.7)),
    (r"\bL40S\b", _half(362.0, tf32=183.0, fp32=91.6)),
    (r"\bL40\b", _half(181.0, tf32=90.5, fp32=90.5)),
    (r"\bL4\b", _half(121.0, tf32=60.0, fp32=30.3)),
    (r"\bV100-SXM[23]\b", {"fp16": 125.0, "fp32": 15.7, "fp64": 7.8}),
    (r"\bV100-PCIE\b", {"fp16": 112.0, "fp32": 14.0, "fp64": 7.0}),
    (r"\bT4\b", {"fp16": 65.0, "fp32": 8.1}),
    (r"\bRTX 4090$", _half(165.2, tf32=82.6, fp32=82.6)),
    (r"\bRTX 3090$", _half(71.0, tf32=35.6, fp32=35.6)),
    (r"\bMI3(00|25)X\b", _half(1307.4, tf32=653.7, fp32=163.4, fp64=163.4)),
    # torch shows each of the two dies of an MI250 as a device of its own.
    (r"\bMI250X\b", _half(191.5, fp32=47.9, fp64=47.9)),
    (r"\bMI250\b", _half(181.0, fp32=45.3, fp64=45.3)),
]
