"""Bytes of persistent training state by formula, from shapes alone. No torch here.

Trained elements cost 16 bytes (weight, gradient, two moments, all fp32), frozen ones those of their
dtype (a residual of eight bits 1 byte, and 4 for the scale of each row), the bank 4 bytes an
element of u (m, k), sigma (k,) and v (n, k), k = min(m, n). The tangent form keeps the weight
(m, n) in the place of the bank.
"""

from collections.abc import Iterable

from spectral_scale.bench.settings import Variant

FP32_BYTES = 4


def state_formula(
    variant: Variant,
    matrices: Iterable[tuple[int, int]],
    *,
    other_elements: int,
    spectral_rank: int,
    frozen_bytes: int,
) -> dict[str, int]:
    """Bytes of persistent state by use: weights, gradients, moments, bank.

    Args:
        variant: the method and its storage.
        matrices: (m, n) of each converted matrix.
        other_elements: trained elements besides them (biases, norms, embeddings).
        spectral_rank: r.
        frozen_bytes: bytes of one frozen element.
    """
    r, trained, frozen, banked, eight_bits = spectral_rank, other_elements, 0, 0, 0
    for m, n in matrices:
        k = min(m, n)
        if variant == "dense":
            trained += m * n
            continue
        if variant == "tangent":
            trained += r * (m + n)
            frozen += m * n + r * (m + n)
            banked += m * n
            continue
        banked += k * (m + n) + k
        if variant in ("sst residual", "sst int8"):
            trained += r * (m + n) + r
            if variant == "sst int8":
                eight_bits += m * n + FP32_BYTES * m
            else:
                frozen += m * n
        else:
            trained += r * (m + n) + k
            frozen += (k - r) * (m + n)
    return {
        "weights": FP32_BYTES * trained + frozen_bytes * frozen + eight_bits,
        "gradients": FP32_BYTES * trained,
        "moments": 2 * FP32_BYTES * trained,
        "bank": FP32_BYTES * banked,
    }
