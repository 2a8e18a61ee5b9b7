"""FLOP formulas against torch's own counter, and the table of peaks."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spectral_scale.methods.sst.layer import SpectralLinear
from spectral_scale.metrics.flops import (
    MatrixProduct,
    attention_flops_per_token,
    dense_linear_flops,
    model_flops_per_token,
    model_flops_utilization,
    peak_flops,
    sst_linear_flops,
)

M, N, R, TOKENS = 24, 16, 3, 10


def in_place_addmm(added, left, right, **_):
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: in_place_addmm}  # torch's counter leaves it out


def counted(*products):
    """FLOPs of products given as (rows, inner, columns)."""
    with FlopCounterMode(display=False) as counter:
        for rows, inner, columns in products:
            torch.empty(rows, inner, device="meta") @ torch.empty(inner, columns, device="meta")
    return counter.get_total_flops()


def test_dense_flops_are_three_products():
    assert dense_linear_flops(M, N, TOKENS) == counted(
        (TOKENS, N, M), (TOKENS, M, N), (M, TOKENS, N)
    )


@pytest.mark.parametrize("storage", ["residual", "factored"])
@pytest.mark.parametrize("m, n", [(M, N), (N, M), (M, M)])
def test_sst_flops_are_those_of_the_layer(storage, m, n):
    layer = SpectralLinear(n, m, R, storage=storage)
    layer.ready = True
    x = torch.zeros(TOKENS, n, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        layer(x).sum().backward()
    assert sst_linear_flops(m, n, R, TOKENS, storage) == counter.get_total_flops()


@pytest.mark.parametrize(
    "m, n, r, storage, ratio",
    [
        (4096, 4096, 128, "residual", 0.73),
        (4096, 4096, 128, "factored", 1.35),
        (11008, 4096, 128, "residual", 0.71),
        (11008, 4096, 128, "factored", 0.93),
        (28672, 8192, 256, "factored", 0.87),
    ],
)
def test_ratios_to_dense(m, n, r, storage, ratio):
    measured = sst_linear_flops(m, n, r, 1, storage) / dense_linear_flops(m, n, 1)
    assert measured == pytest.approx(ratio, abs=0.006)


def test_impossible_ranks_and_storages_are_refused():
    with pytest.raises(ValueError, match="min\\(m, n\\) = 16"):
        sst_linear_flops(M, N, 17, TOKENS, "residual")
    with pytest.raises(ValueError, match="'residual' or 'factored'"):
        sst_linear_flops(M, N, R, TOKENS, "merged")


def test_model_flops_of_opt_125m_agree_with_the_published_convention():
    dense = 12 * 12 * 768**2 + 50272 * 768
    shape, head = (12 * 12 * 768, 768), (50272, 768)
    products = [MatrixProduct(fqn=str(s), shape=s, times=3, converted=False) for s in (shape, head)]
    total = model_flops_per_token(products, num_layers=12, hidden_size=768, sequence_length=2048)
    attention = attention_flops_per_token(num_layers=12, hidden_size=768, sequence_length=2048)
    assert total == 6 * dense + attention == 6 * dense + 12 * 12 * 768 * 2048


def test_utilization_is_a_fraction_or_unknown():
    flops = {"flops_per_token": 1e9, "tokens_per_second": 1e5}
    assert model_flops_utilization(**flops, peak_flops_per_second=1e15) == pytest.approx(0.1)
    assert model_flops_utilization(**flops, peak_flops_per_second=None) is None


@pytest.mark.parametrize(
    "name, precision, teraflops",
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA H200 NVL", "bf16", 835),
        ("NVIDIA GH200 480GB", "bf16", 989),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI250X", "bf16", 191.5),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_known_peaks(name, precision, teraflops):
    assert peak_flops(name, precision) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "name, precision",
    [
        ("cpu", "bf16"),
        ("", "fp32"),
        ("Intel(R) Xeon(R) Platinum 8480+", "bf16"),
        ("Tesla V100-SXM2-32GB", "bf16"),
        ("NVIDIA H100", "bf16"),
        ("NVIDIA H200", "fp8"),
        ("NVIDIA H200 MIG 1g.18gb", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
    ],
)
def test_unknown_peaks_are_never_guessed(name, precision):
    assert peak_flops(name, precision) is None
