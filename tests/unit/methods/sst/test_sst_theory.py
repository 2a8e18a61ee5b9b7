"""The statements that make SST what it is, in float64, each with a broken twin that must fail.

G = dL/dW (out, in) is the gradient the dense layer would have; u, v, sigma are W's triplets.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spectral_scale.methods.sst.product import SpectralProduct
from spectral_scale.ops.decomposition import compose, svd

SHAPES = [(6, 9), (9, 6), (7, 7)]
TOKENS = 11


def make(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (T, in), dL/dy (T, out) and the thin SVD of a random W."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    x = torch.randn(TOKENS, n, generator=generator, dtype=torch.float64)
    g = torch.randn(TOKENS, m, generator=generator, dtype=torch.float64)
    return x, g, *svd(weight)


def gradients(
    x: Tensor, g: Tensor, u: Tensor, sigma: Tensor, v: Tensor, *, r: int, enhanced: bool
) -> dict[str, Tensor]:
    """Gradients of the residual layer with the first r triplets trained."""
    residual = compose(u[:, r:], sigma[r:], v[:, r:])
    leaves = {"x": x, "u": u[:, :r], "v": v[:, :r], "sigma": sigma[:r]}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    y = SpectralProduct.apply(
        leaves["x"], residual, leaves["u"], leaves["v"], None, None, leaves["sigma"], None,
        enhanced, False,
    )  # fmt: skip
    y.backward(g)
    return {name: leaf.grad for name, leaf in leaves.items()}


def dense_gradient(x: Tensor, g: Tensor) -> Tensor:
    return g.t() @ x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", ["residual", "factored"])
def test_default_gradients_are_the_partials(shape: tuple[int, int], storage: str) -> None:
    """Finite differences of every input (T1)."""
    assert _gradcheck(shape, storage, enhanced=False)


def test_finite_differences_refuse_the_enhanced_gradients() -> None:
    """The twin: enhanced gradients are no partial derivatives, and the check above sees it."""
    assert not _gradcheck((6, 9), "residual", enhanced=True)


def _gradcheck(shape: tuple[int, int], storage: str, *, enhanced: bool) -> bool:
    x, _, u, sigma, v = make(shape)
    r = 3
    bias = torch.randn(shape[0], dtype=torch.float64)
    factored = storage == "factored"
    residual = None if factored else compose(u[:, r:], sigma[r:], v[:, r:])
    u_fixed, v_fixed = (u[:, r:], v[:, r:]) if factored else (None, None)
    trained = sigma if factored else sigma[:r]

    def layer(x: Tensor, u_a: Tensor, v_a: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return SpectralProduct.apply(x, residual, u_a, v_a, u_fixed, v_fixed, s, b, enhanced, False)

    inputs = [t.clone().requires_grad_() for t in (x, u[:, :r], v[:, :r], trained, bias)]
    return torch.autograd.gradcheck(layer, inputs, raise_exception=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_enhanced_is_default_without_sigma(shape: tuple[int, int]) -> None:
    x, g, u, sigma, v = make(shape)
    plain = gradients(x, g, u, sigma, v, r=4, enhanced=False)
    enhanced = gradients(x, g, u, sigma, v, r=4, enhanced=True)
    for leaf in ("u", "v"):
        torch.testing.assert_close(plain[leaf], enhanced[leaf] * sigma[:4], atol=1e-12, rtol=0)
    for leaf in ("x", "sigma"):
        assert torch.equal(plain[leaf], enhanced[leaf])


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_dense_layer(shape: tuple[int, int]) -> None:
    """y = x W^T and dL/dx = g W, whatever is active."""
    x, g, u, sigma, v = make(shape)
    weight = compose(u, sigma, v)
    for r in (1, min(shape)):
        found = gradients(x, g, u, sigma, v, r=r, enhanced=True)
        torch.testing.assert_close(found["x"], g @ weight, atol=1e-12, rtol=0)


def _recovers(u: Tensor, x: Tensor, g: Tensor, sigma: Tensor, v: Tensor) -> float:
    """Largest entry of |U (dV)^T - G| with every triplet active."""
    d_v = gradients(x, g, u, sigma, v, r=sigma.numel(), enhanced=True)["v"]
    return float((u @ d_v.t() - dense_gradient(x, g)).abs().max())


@pytest.mark.parametrize("shape", [(6, 9), (7, 7)])
def test_enhanced_v_gradient_carries_the_whole_gradient(shape: tuple[int, int]) -> None:
    """G = U (dV)^T exactly for orthonormal U with m <= n (T2, T3)."""
    x, g, u, sigma, v = make(shape)
    assert _recovers(u, x, g, sigma, v) < 1e-12


def test_whole_gradient_needs_orthonormal_columns() -> None:
    """The twin: unit but not orthogonal columns lose the identity by O(1)."""
    x, g, u, sigma, v = make((6, 9))
    skewed = torch.nn.functional.normalize(u + 0.3 * torch.roll(u, 1, dims=1), dim=0)
    assert _recovers(skewed, x, g, sigma, v) > 0.1


def test_active_set_projects_the_gradient() -> None:
    """sum over active i of u_i dV_i^T = U_a U_a^T G."""
    x, g, u, sigma, v = make((6, 9))
    r = 2
    d_v = gradients(x, g, u, sigma, v, r=r, enhanced=True)["v"]
    u_a = u[:, :r]
    expected = u_a @ u_a.t() @ dense_gradient(x, g)
    torch.testing.assert_close(u_a @ d_v.t(), expected, atol=1e-12, rtol=0)


def _radial_error(shape: tuple[int, int], *, enhanced: bool) -> float:
    x, g, u, sigma, v = make(shape)
    found = gradients(x, g, u, sigma, v, r=4, enhanced=enhanced)
    errors = [
        (torch.einsum("ij,ij->j", factor[:, :4], found[leaf]) - found["sigma"]).abs().max()
        for leaf, factor in (("u", u), ("v", v))
    ]
    return float(max(errors))


@pytest.mark.parametrize("shape", SHAPES)
def test_retraction_removes_what_sigma_carries(shape: tuple[int, int]) -> None:
    """diag(U^T dU) = diag(V^T dV) = dsigma: no double counting (T6)."""
    assert _radial_error(shape, enhanced=True) < 1e-12


def test_default_gradients_break_the_radial_identity() -> None:
    """The twin: with sigma in the direction gradients the two differ."""
    assert _radial_error((6, 9), enhanced=False) > 1e-2


def _update_cosine(sigma: Tensor, *, enhanced: bool) -> float:
    """Cosine between -dW of one small retracted step on U, sigma, V, and -G (isotropic G)."""
    m, n = 24, 48
    generator = torch.Generator().manual_seed(3)
    u, _, v = svd(torch.randn(m, n, generator=generator, dtype=torch.float64))
    big_g = torch.randn(m, n, generator=generator, dtype=torch.float64)
    scale = torch.ones_like(sigma) if enhanced else sigma
    d_u, d_v = big_g @ v * scale, big_g.t() @ u * scale
    d_u = d_u - u * (u * d_u).sum(0)
    d_v = d_v - v * (v * d_v).sum(0)
    d_sigma = ((u.t() @ big_g) * v.t()).sum(1)
    d_w = (d_u * sigma) @ v.t() + (u * d_sigma) @ v.t() + (u * sigma) @ d_v.t()
    return float((d_w * big_g).sum() / (d_w.norm() * big_g.norm()))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_enhanced_updates_lie_closer_to_the_gradient(power: float) -> None:
    """T5: for decaying spectra the enhanced update points more along G than the default one."""
    sigma = torch.arange(1, 25, dtype=torch.float64) ** -power
    assert _update_cosine(sigma, enhanced=True) > _update_cosine(sigma, enhanced=False)


def test_flat_spectrum_makes_no_difference() -> None:
    """The twin: without decay there is nothing to gain, so the comparison above can fail."""
    sigma = torch.ones(24, dtype=torch.float64)
    gain = _update_cosine(sigma, enhanced=True) - _update_cosine(sigma, enhanced=False)
    assert abs(gain) < 1e-12


@pytest.mark.parametrize("storage", ["residual", "factored"])
def test_no_dense_weight_gradient_is_formed(storage: str) -> None:
    """No tensor of the weight's shape is made in forward or backward."""
    x, g, u, sigma, v = make((6, 9))
    shapes = _shapes_made(lambda: _run_once(x, g, u, sigma, v, storage))
    assert shapes and (6, 9) not in shapes and (9, 6) not in shapes


def test_dense_gradient_would_be_seen() -> None:
    """The twin: a plain product does make it."""
    x, g, u, sigma, v = make((6, 9))
    weight = compose(u, sigma, v).requires_grad_()
    shapes = _shapes_made(lambda: (x @ weight.t()).backward(g))
    assert (6, 9) in shapes or (9, 6) in shapes


def _run_once(x: Tensor, g: Tensor, u: Tensor, sigma: Tensor, v: Tensor, storage: str) -> None:
    r = 2
    residual = compose(u[:, r:], sigma[r:], v[:, r:]) if storage == "residual" else None
    fixed = (None, None) if storage == "residual" else (u[:, r:], v[:, r:])
    trained = (sigma[:r] if storage == "residual" else sigma).clone().requires_grad_()
    u_a, v_a = u[:, :r].clone().requires_grad_(), v[:, :r].clone().requires_grad_()
    _made.clear()  # what was set up above does not count
    y = SpectralProduct.apply(x, residual, u_a, v_a, *fixed, trained, None, True, False)
    y.backward(g)


_made: set[tuple[int, ...]] = set()


def _shapes_made(action: Callable[[], object]) -> set[tuple[int, ...]]:
    """Shapes of all newly allocated tensors while `action` runs (views left out)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            held = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in held:
                _made.add(tuple(out.shape))
            return out

    _made.clear()
    with Watch():
        action()
    return set(_made)
