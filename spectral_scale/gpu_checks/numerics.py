"""Numbers of SST layers and of the bank on the device, against plain arithmetic on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_scale.gpu_checks.findings import CheckFinding, Figure, at_most, recorded
from spectral_scale.gpu_checks.place import Place
from spectral_scale.methods.sst.bank import SpectralBank
from spectral_scale.methods.sst.layer import SpectralLinear
from spectral_scale.ops.decomposition import orthogonality_error

SINGLE_LIMIT = 1e-5
"""Largest error of an fp32 layer, relative to the largest entry of each result."""
HALF_FACTOR, HALF_FLOOR = 2.0, 1e-3
"""bf16 on the device may err twice as much as bf16 on the CPU, and this much in any case."""
REBUILD_LIMIT = 1e-6
"""Largest entry of a rebuilt weight's error, relative to the largest singular value."""
REDECOMPOSITIONS = 5

Outcome = dict[str, Tensor]
"""The output and the gradients of a layer, by name, in double precision on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer to compare."""

    shape: tuple[int, int]
    """Shape of the layer's weight: (out, in)."""
    storage: str = "residual"
    extra_sigma: int = 0

    @property
    def name(self) -> str:
        """Name of the case on the page of results."""
        extra = f" + {self.extra_sigma} sigma" if self.extra_sigma else ""
        return f"{self.shape[0]} x {self.shape[1]} {self.storage}{extra}"


def check_layers(place: Place) -> CheckFinding:
    """Output and gradients in fp32 and bf16, for square, tall and wide layers of every storage."""
    n = place.choose(768, 48)
    tokens, r = place.choose((4096, 64), (128, 8))
    cases = [
        Case(shape=(n, n)),
        Case(shape=(4 * n, n)),
        Case(shape=(n, 4 * n)),
        Case(shape=(n, n), storage="factored"),
        Case(shape=(n, n), extra_sigma=r),
    ]
    figures: list[Figure] = []
    for number, case in enumerate(cases):
        figures += compare_layer(case, place.device, tokens=tokens, r=r, seed=number)
    return CheckFinding(figures=figures)


def compare_layer(
    case: Case, device: torch.device, *, tokens: int, r: int, seed: int
) -> list[Figure]:
    """The errors of one layer on the device, with their limits."""
    generator = torch.Generator().manual_seed(seed)
    layer = random_layer(case, r=r, generator=generator)
    x, g = (torch.randn(tokens, k, generator=generator, dtype=torch.float64)
            for k in (case.shape[1], case.shape[0]))  # fmt: skip
    expected = oracle(layer, x, g)
    single = worst(run_layer(case, layer, x, g, device, torch.float32), expected)
    half = worst(run_layer(case, layer, x, g, device, torch.bfloat16), expected)
    on_cpu = worst(run_layer(case, layer, x, g, torch.device("cpu"), torch.bfloat16), expected)
    limit = max(HALF_FACTOR * on_cpu, HALF_FLOOR)
    return [
        at_most(f"{case.name}, fp32 error", single, SINGLE_LIMIT),
        at_most(f"{case.name}, bf16 error", half, limit),
    ]


def random_layer(case: Case, *, r: int, generator: torch.Generator) -> SpectralLinear:
    """A layer in double precision on the CPU with orthonormal directions and a bias."""
    out, in_ = case.shape
    layer = SpectralLinear(
        in_, out, r, storage=case.storage, extra_sigma=case.extra_sigma, dtype=torch.float64
    )
    k = min(out, in_)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, v = (torch.linalg.qr(random(rows, k)).Q for rows in (out, in_))
    sigma = torch.rand(k, generator=generator, dtype=torch.float64) + 0.1
    held = layer.sigma.numel()
    with torch.no_grad():
        layer.u.copy_(u[:, :r])
        layer.v.copy_(v[:, :r])
        layer.sigma.copy_(sigma[:held])
        if layer.bias is not None:
            layer.bias.copy_(random(out))
        if layer.u_fixed is not None and layer.v_fixed is not None:
            layer.u_fixed.copy_(u[:, r:held])
            layer.v_fixed.copy_(v[:, r:held])
        if layer.residual is not None:
            layer.residual.copy_((u[:, held:] * sigma[held:]) @ v[:, held:].mT)
    layer.ready = True
    return layer


@torch.no_grad()
def oracle(layer: SpectralLinear, x: Tensor, g: Tensor) -> Outcome:
    """The layer as a dense matrix, and the gradients of its factors in the plainest words.

    Directions get the gradient that leaves their singular value out (`gradient: enhanced`).
    """
    weight = layer.effective_weight()
    z, h = x @ layer.v, g @ layer.u
    d_sigma = (h * z).sum(0)
    if layer.u_fixed is not None and layer.v_fixed is not None:
        d_sigma = torch.cat([d_sigma, ((g @ layer.u_fixed) * (x @ layer.v_fixed)).sum(0)])
    return {
        "output": x @ weight.mT + (0 if layer.bias is None else layer.bias),
        "d_input": g @ weight,
        "d_u": g.mT @ z,
        "d_v": x.mT @ h,
        "d_sigma": d_sigma,
        "d_bias": g.sum(0),
    }


def run_layer(
    case: Case,
    reference: SpectralLinear,
    x: Tensor,
    g: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> Outcome:
    """The product's own output and gradients, with trained factors in fp32 as in a run."""
    layer = SpectralLinear(
        case.shape[1],
        case.shape[0],
        reference.spectral_rank,
        storage=case.storage,
        extra_sigma=case.extra_sigma,
        frozen_dtype=dtype,
        dtype=torch.float32,
        device=device,
    )
    layer.load_state_dict(reference.state_dict())
    layer.ready = True
    given = x.to(device, torch.float32).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = layer(given)
    output.backward(g.to(device, output.dtype))
    found = {
        "output": output,
        "d_input": given.grad,
        "d_u": layer.u.grad,
        "d_v": layer.v.grad,
        "d_sigma": layer.sigma.grad,
        "d_bias": None if layer.bias is None else layer.bias.grad,
    }
    return {name: t.detach().to("cpu", torch.float64) for name, t in found.items()
            if t is not None}  # fmt: skip


def worst(found: Outcome, expected: Outcome) -> float:
    """The largest error of any result, relative to that result's largest entry."""
    if found.keys() != expected.keys():
        return float("inf")
    errors = [relative_error(found[name], expected[name]) for name in expected]
    return float(torch.tensor(errors).max())


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry; NaN if anything is NaN."""
    return float((found - expected).abs().max() / expected.abs().max())


# -- TF32 ------------------------------------------------------------------------------------


def check_tf32(place: Place) -> CheckFinding:
    """Decompose and rebuild a weight while a careless script has TF32 switched on.

    TF32 keeps 10 bits of a product's operands: an error of 1e-3 that would enter the bank, and
    with it every later weight, for good.
    """
    shape = place.choose((2048, 1536), (96, 64))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    with tf32_forced_on():
        figures = rebuild_errors(weight, place.device)
    return CheckFinding(figures=figures)


def rebuild_errors(weight: Tensor, device: torch.device) -> list[Figure]:
    """The errors of a weight (m, n) that went through the bank again and again."""
    bank = SpectralBank(device=device, compute_device=device, dtype=torch.float32)
    bank.decompose("w", weight.float())
    scale = float(torch.linalg.matrix_norm(weight, 2))
    first = _rebuilt_error(bank, weight) / scale
    for _ in range(REDECOMPOSITIONS):
        bank.redecompose("w")
    last = _rebuilt_error(bank, weight) / scale
    entry = bank["w"]
    orthogonality = max(orthogonality_error(f.double()) for f in (entry.u, entry.v))
    return [
        at_most("error of a rebuilt weight", first, REBUILD_LIMIT),
        at_most(
            f"the same after {REDECOMPOSITIONS} re-decompositions",
            last,
            (1 + REDECOMPOSITIONS) * REBUILD_LIMIT,
        ),
        recorded("orthogonality error of the directions", orthogonality),
    ]


def _rebuilt_error(bank: SpectralBank, weight: Tensor) -> float:
    rebuilt = bank.frozen_values("w", factored=False)["residual"]
    return float((rebuilt.to("cpu", torch.float64) - weight).abs().max())


@contextmanager
def tf32_forced_on() -> Iterator[None]:
    """Inside, torch may use TF32 for products wherever nothing forbids it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
