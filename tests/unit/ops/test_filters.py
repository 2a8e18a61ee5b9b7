"""Laplacians and filters against closed forms; Chebyshev polynomials against eigenvectors."""

import math

import pytest
import torch
from torch import Tensor

from spectral_scale.errors import ConfigError
from spectral_scale.ops.chebyshev import apply_polynomial, coefficients, scaled_laplacian
from spectral_scale.ops.filters import filter_matrix, response
from spectral_scale.ops.graphs import complete_graph, knn_graph, path_graph, permuted, ring_graph
from spectral_scale.ops.laplacian import (
    dense_laplacian,
    eigenbasis,
    quadratic_form,
    sparse_laplacian,
    spectral_bound,
)

KINDS = ["combinatorial", "normalized"]
NODES, WIDTH = 120, 24
RANDOM = torch.Generator().manual_seed(1)
LATENT = torch.randn(NODES, 6, generator=RANDOM, dtype=torch.float64)
FEATURES = LATENT @ torch.randn(6, WIDTH, generator=RANDOM, dtype=torch.float64)
GRAPH = knn_graph(FEATURES, 6)
SIGNAL = torch.randn(NODES, 512, generator=RANDOM, dtype=torch.float64)


def filtered(kind: str, strength: float, laplacian: Tensor, signal: Tensor = SIGNAL) -> Tensor:
    return filter_matrix(eigenbasis(laplacian), response(kind, strength)) @ signal


@pytest.mark.parametrize("kind", KINDS)
def test_quadratic_form(kind: str) -> None:
    """Tr(X^T L X) by frequencies and, for D - A, by edges; its gradient is 2 L X."""
    laplacian = dense_laplacian(GRAPH, kind)
    basis = eigenbasis(laplacian)
    signal = SIGNAL.clone().requires_grad_()
    form = quadratic_form(laplacian, signal)
    by_frequency = (basis.values[:, None] * (basis.vectors.t() @ SIGNAL).square()).sum()
    assert form.item() == pytest.approx(float(by_frequency), rel=1e-12)
    scale = GRAPH.degrees().rsqrt()[:, None] if kind == "normalized" else 1.0
    by_edge = (GRAPH.adjacency() * torch.cdist(scale * SIGNAL, scale * SIGNAL).square()).sum() / 2
    assert form.item() == pytest.approx(float(by_edge), rel=1e-9)
    form.backward()
    assert torch.allclose(signal.grad, 2 * laplacian @ SIGNAL, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_and_dense_laplacian_agree(kind: str) -> None:
    dense = dense_laplacian(GRAPH, kind)
    assert torch.equal(dense, dense.t())
    assert torch.allclose(sparse_laplacian(GRAPH, kind).to_dense(), dense, atol=1e-14)
    values = eigenbasis(dense).values
    assert float(values[0]) == pytest.approx(0.0, abs=1e-12)
    assert float(values[-1]) <= spectral_bound(GRAPH, kind) + 1e-12


@pytest.mark.parametrize(
    ("kind", "strength"), [("identity", 3.0), ("rational", 0.0), ("heat", 0.0), ("ideal", 2.0)]
)
def test_h_of_one_is_the_identity(kind: str, strength: float) -> None:
    matrix = filter_matrix(
        eigenbasis(dense_laplacian(GRAPH, "normalized")), response(kind, strength)
    )
    assert torch.allclose(matrix, torch.eye(NODES, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("laplacian_kind", KINDS)
def test_rational_filter_solves_its_system(strength: float, laplacian_kind: str) -> None:
    laplacian = dense_laplacian(GRAPH, laplacian_kind)
    system = torch.eye(NODES, dtype=torch.float64) + strength * laplacian
    expected = torch.linalg.solve(system, SIGNAL)
    assert torch.allclose(filtered("rational", strength, laplacian), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("strength", "norm", "energy", "rayleigh"),
    [(0.1, 0.91, 0.81, 0.98), (1.0, 0.52, 0.24, 0.88), (10.0, 0.17, 0.0089, 0.33)],
)
def test_energies_of_a_white_signal(
    strength: float, norm: float, energy: float, rayleigh: float
) -> None:
    """What is left of |G|, of Tr(G^T L G), and of their quotient: as the spectrum of L predicts,
    and roughly as measured on this graph (6 nearest neighbours, normalised)."""
    laplacian = dense_laplacian(GRAPH, "normalized")
    values = eigenbasis(laplacian).values
    white = torch.linalg.qr(torch.randn(NODES, NODES, generator=RANDOM, dtype=torch.float64)).Q
    kept = filtered("rational", strength, laplacian, white)
    left = kept.square().sum() / white.square().sum()
    dirichlet = quadratic_form(laplacian, kept) / quadratic_form(laplacian, white)
    squared = (1 + strength * values) ** -2
    assert float(left) == pytest.approx(float(squared.mean()), rel=1e-10)
    predicted = (values * squared).sum() / values.sum()
    assert float(dirichlet) == pytest.approx(float(predicted), rel=1e-10)
    assert math.sqrt(float(left)) == pytest.approx(norm, rel=0.1)
    assert float(dirichlet) == pytest.approx(energy, rel=0.1)
    assert float(dirichlet / left) == pytest.approx(rayleigh, rel=0.1)
    cosine = (kept * white).sum() / (kept.norm() * white.norm())
    assert 0 < float(cosine) <= 1


def test_combinatorial_filter_keeps_the_mean_and_the_normalised_one_does_not() -> None:
    for kind, keeps in (("combinatorial", True), ("normalized", False)):
        kept = filtered("heat", 1.0, dense_laplacian(GRAPH, kind))
        assert torch.allclose(kept.mean(0), SIGNAL.mean(0), atol=1e-12) is keeps


def test_ring_is_laplacian_smoothing() -> None:
    """Osher et al. (1806.06317): g / (1 + 4 s sin^2(pi k / N)) in Fourier space."""
    n, strength = 101, 2.0
    gradient = torch.randn(n, 1, generator=RANDOM, dtype=torch.float64)
    waves = 4 * torch.sin(math.pi * torch.arange(n, dtype=torch.float64) / n).square()
    expected = torch.fft.ifft(torch.fft.fft(gradient[:, 0]) / (1 + strength * waves)).real
    laplacian = dense_laplacian(ring_graph(n), "combinatorial")
    found = filtered("rational", strength, laplacian, gradient)
    assert torch.allclose(found[:, 0], expected, atol=1e-13)


def test_descent_on_the_joint_loss_decays_by_frequency() -> None:
    """x <- x - 2 eta mu L x leaves (1 - 2 eta mu lambda)^t of each mode."""
    laplacian = dense_laplacian(GRAPH, "normalized")
    basis, rate, steps = eigenbasis(laplacian), 2 * 0.5 * 0.3, 50
    x = SIGNAL.clone()
    for _ in range(steps):
        x = x - rate * laplacian @ x
    left = (1 - rate * basis.values) ** steps
    expected = basis.vectors @ (left[:, None] * (basis.vectors.t() @ SIGNAL))
    assert torch.allclose(x, expected, atol=1e-12)


def test_proximal_step_on_the_joint_loss_is_the_rational_filter() -> None:
    """argmin |x - z|^2 / (2 eta) + mu Tr(x^T L x) is the filter of strength 2 eta mu: a regulariser
    and a filter are one operator, taken implicitly or explicitly."""
    eta, mu = 0.3, 0.7
    laplacian = dense_laplacian(GRAPH, "normalized")
    proximal = filtered("rational", 2 * eta * mu, laplacian)
    x = proximal.clone().requires_grad_()
    objective = (x - SIGNAL).square().sum() / (2 * eta) + mu * quadratic_form(laplacian, x)
    objective.backward()
    assert float(x.grad.norm() / SIGNAL.norm()) < 1e-12
    explicit = SIGNAL - eta * 2 * mu * (laplacian @ SIGNAL)  # the same to first order
    for scale in (1.0, 0.1):
        step = scale * eta
        gap = filtered("rational", 2 * step * mu, laplacian) - (
            SIGNAL + (explicit - SIGNAL) * scale
        )
        assert float(gap.norm() / SIGNAL.norm()) < 3 * (2 * step * mu) ** 2


def test_complete_graph_pulls_to_the_mean_and_permutation_permutes() -> None:
    laplacian = dense_laplacian(complete_graph(NODES), "combinatorial")
    strength = 0.5 / NODES
    mean = SIGNAL.mean(0, keepdim=True)
    expected = mean + (SIGNAL - mean) / 1.5
    assert torch.allclose(filtered("rational", strength, laplacian), expected, atol=1e-12)
    order = torch.randperm(NODES, generator=torch.Generator().manual_seed(3))
    moved = torch.empty_like(SIGNAL).index_copy_(0, order, SIGNAL)
    graph = permuted(GRAPH, order)
    assert torch.allclose(
        eigenbasis(dense_laplacian(graph, "normalized")).values,
        eigenbasis(dense_laplacian(GRAPH, "normalized")).values,
        atol=1e-12,
    )
    found = filtered("heat", 1.0, dense_laplacian(graph, "normalized"), moved)
    plain = filtered("heat", 1.0, dense_laplacian(GRAPH, "normalized"))
    assert torch.allclose(found[order], plain, atol=1e-12)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_isolated_nodes_pass_unchanged() -> None:
    features = torch.eye(4, dtype=torch.float64)
    features[1] = features[0]
    graph = knn_graph(features, 1)
    signal = torch.randn(4, 3, generator=RANDOM, dtype=torch.float64)
    for kind in KINDS:
        kept = filtered("rational", 5.0, dense_laplacian(graph, kind), signal)
        assert torch.allclose(kept[2:], signal[2:], atol=1e-14)
        assert not torch.allclose(kept[:2], signal[:2], atol=1e-3)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize(
    ("kind", "strength"), [("rational", 0.1), ("rational", 1.0), ("rational", 10.0), ("heat", 3.0)]
)
def test_chebyshev_error(kind: str, strength: float, tolerance: float) -> None:
    """The polynomial is within the tolerance of the exact filter, by degree no more than needed."""
    laplacian = dense_laplacian(GRAPH, "normalized")
    weights = coefficients(response(kind, strength), 2.0, tolerance)
    scaled = scaled_laplacian(sparse_laplacian(GRAPH, "normalized"), 2.0)
    error = apply_polynomial(scaled, weights, SIGNAL) - filtered(kind, strength, laplacian)
    assert float(torch.linalg.matrix_norm(error, 2)) <= tolerance * float(
        torch.linalg.matrix_norm(SIGNAL, 2)
    )
    less = apply_polynomial(scaled, weights[: len(weights) // 2], SIGNAL)
    assert float((less - filtered(kind, strength, laplacian)).norm()) > float(error.norm())


def test_chebyshev_of_a_constant_and_of_a_combinatorial_laplacian() -> None:
    assert len(coefficients(response("identity", 1.0), 2.0)) == 1
    bound = spectral_bound(GRAPH, "combinatorial")
    weights = coefficients(response("rational", 0.3), bound, 1e-5)
    scaled = scaled_laplacian(sparse_laplacian(GRAPH, "combinatorial"), bound)
    expected = filtered("rational", 0.3, dense_laplacian(GRAPH, "combinatorial"))
    found = apply_polynomial(scaled, weights, SIGNAL)
    assert float((found - expected).norm() / SIGNAL.norm()) < 1e-5


def test_what_no_polynomial_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match="rational or heat instead of ideal"):
        coefficients(response("ideal", 1.0), 2.0)
    with pytest.raises(ConfigError, match="strength -1"):
        response("heat", -1.0)
    with pytest.raises(ConfigError, match="use one of rational, heat, ideal, identity"):
        response("band", 1.0)


def test_ideal_filter_cuts_exactly() -> None:
    laplacian = dense_laplacian(path_graph(12), "normalized")
    basis = eigenbasis(laplacian)
    coefficients_kept = basis.vectors.t() @ filtered("ideal", 1.0, laplacian, SIGNAL[:12])
    low = basis.values <= 1.0
    assert torch.allclose(coefficients_kept[low], (basis.vectors.t() @ SIGNAL[:12])[low])
    assert float(coefficients_kept[~low].abs().max()) < 1e-12
