"""Weights of eight bits with a scale for each row, and the products that read them in one copy.

A weight W (O, I) is kept as whole numbers Q in [-127, 127] and one scale a row:

    W ~ diag(a) Q          a_o = max_i |W_oi| / 127,  Q = round(W / a)

    W = [[ 0.5, -1.0],     a = [1.0 / 127, 0.2 / 127],     Q = [[64, -127],
         [ 0.2,  0.1]]                                          [127,  64]]

Both directions of a layer read the same Q, and sum whole numbers exactly:

    y  = x W^T    x is rounded row by row to s q;         y  = diag(s) (q Q^T) diag(a)
    dx = g W      the scales are folded into g first:     g diag(a) ~ diag(t) p,  dx = diag(t) (p Q)

The sums have 32 bits, which up to 133,000 summands of 127 x 127 cannot exceed. Every form of the
arithmetic here rounds at the same places, so that all of them give the same bits. A NaN or an
infinity in a row makes the row's scale one, and with it all of the row's results: whoever watches
losses and gradients sees it. Where there is a compiler, `ops.int8_kernels` takes the loops over
rows on the CPU; what is written here in torch is the oracle.

Shape suffixes: T tokens (rows), K what is summed over, N columns, O out_features, I in_features.
"""

import functools

import torch
from torch import Tensor

from spectral_scale.ops.int8_kernels import kernels_for

LARGEST = 127
"""The largest whole number; -128 is left out, so that rounding is symmetric."""
LEAST_SCALE = 1e-32
"""The scale of a row of zeros, or of numbers of its size."""
SCRATCH_BYTES = 16 * 2**20
"""The most memory that 32-bit sums take at a time: fresh pages cost more than a loop does."""
BLOCK_ROWS = 64
"""Rows that are rounded or scaled at a time, so that wide copies of them stay in the cache."""


@functools.cache
def processor_multiplies() -> bool:
    """Whether this processor has instructions that sum products of eight bits (AVX-512 VNNI).

    Without them `torch._int_mm` is fifty times slower than a product of floating numbers.
    """
    return torch.cpu._is_vnni_supported()


def quantise_rows(values_TK: Tensor, columns_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Whole numbers q (T, K), int8, and scales s (T,), float32: values diag(columns) ~ diag(s) q.

    Halves go to the even neighbour. Computed in float32 at least, whatever the values' precision.
    """
    q = torch.empty(values_TK.shape, dtype=torch.int8, device=values_TK.device)
    scale = torch.empty(values_TK.shape[0], dtype=torch.float32, device=values_TK.device)
    kernels = kernels_for(values_TK)
    if kernels is not None and _fp32(columns_K):
        values_TK = values_TK if values_TK.stride(1) == 1 else values_TK.contiguous()
        kernels.quantise_rows(values_TK, columns_K, q, scale, LARGEST * LEAST_SCALE)
        return q, scale
    wide = torch.promote_types(values_TK.dtype, torch.float32)
    for rows in _blocks(values_TK):
        block = values_TK[rows].to(wide)
        if columns_K is not None:
            block = block * columns_K
        largest = block.abs().amax(1).clamp_min(LARGEST * LEAST_SCALE)
        scale[rows] = largest / LARGEST
        q[rows] = (block * scale[rows].reciprocal().unsqueeze(1)).round_()
    return q, scale


def dequantise(q_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """diag(scale) Q in `dtype`, rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    if torch.compiler.is_compiling():
        return (q_OI * scale_O.to(wide).unsqueeze(1)).to(dtype)
    out = torch.empty(q_OI.shape, dtype=dtype, device=q_OI.device)
    return torch.mul(q_OI, scale_O.to(wide).unsqueeze(1), out=out)


def quantisation_error(values_OI: Tensor, q_OI: Tensor, scale_O: Tensor) -> float:
    """The relative error |diag(scale) Q - values| / |values| in the Frobenius norm; 0 for zeros."""
    error = total = values_OI.new_zeros(())
    for rows in _blocks(values_OI):
        block = values_OI[rows]
        off = block - dequantise(q_OI[rows], scale_O[rows], block.dtype)
        error, total = error + off.square().sum(), total + block.square().sum()
    return float((error / total) ** 0.5) if float(total) else 0.0


def linear(x_TI: Tensor, q_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + bias in x's dtype."""
    q_x, scale_x = quantise_rows(x_TI)
    return _scaled_product(q_x, scale_x, q_OI.t(), scale_O, bias_O, x_TI.dtype)


def input_gradient(g_TO: Tensor, q_OI: Tensor, scale_O: Tensor) -> Tensor:
    """g W in g's dtype."""
    q_g, scale_g = quantise_rows(g_TO, scale_O)
    return _scaled_product(q_g, scale_g, q_OI, None, None, g_TO.dtype)


def _scaled_product(
    q_TK: Tensor,
    scale_T: Tensor,
    weight_KN: Tensor,
    columns_N: Tensor | None,
    bias_N: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """diag(scale) (q weight) diag(columns) + bias, through one scratch for the sums."""
    tokens, width = q_TK.shape[0], weight_KN.shape[1]
    out = torch.empty((tokens, width), dtype=dtype, device=q_TK.device)
    at_a_time = min(tokens, max(BLOCK_ROWS, SCRATCH_BYTES // (4 * width)))
    scratch = torch.empty((at_a_time, width), dtype=torch.int32, device=q_TK.device)
    for first in range(0, tokens, max(at_a_time, 1)):
        rows = slice(first, min(first + at_a_time, tokens))
        sums = scratch[: rows.stop - rows.start]
        torch._int_mm(q_TK[rows], weight_KN, out=sums)
        _scale_sums(sums, scale_T[rows], columns_N, bias_N, out[rows])
    return out


def _scale_sums(
    sums_TN: Tensor,
    scale_T: Tensor,
    columns_N: Tensor | None,
    bias_N: Tensor | None,
    out_TN: Tensor,
) -> None:
    """out = diag(scale) sums diag(columns) + bias, in float32 at least, rounded once at the end."""
    kernels = kernels_for(out_TN)
    if kernels is not None and _fp32(columns_N):
        bias = None if bias_N is None else bias_N.detach().float()
        kernels.scale_sums(sums_TN, scale_T, columns_N, bias, out_TN)
        return
    wide = torch.promote_types(out_TN.dtype, torch.float32)
    for rows in _blocks(sums_TN):
        block = sums_TN[rows].to(wide) * scale_T[rows].unsqueeze(1)
        if columns_N is not None:
            block *= columns_N
        if bias_N is not None:
            block += bias_N.to(wide)
        out_TN[rows] = block


def _fp32(columns: Tensor | None) -> bool:
    """Whether the compiled loops take these factors of columns."""
    return columns is None or (columns.dtype == torch.float32 and columns.is_contiguous())


def _blocks(rows_TK: Tensor) -> list[slice]:
    """Blocks of rows; all of them at once on a GPU, which gains nothing from blocks."""
    count = rows_TK.shape[0]
    step = BLOCK_ROWS if rows_TK.device.type == "cpu" else max(count, 1)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]
