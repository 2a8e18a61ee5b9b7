"""The joint decomposition: exact, the same on any number of ranks, defined where singular."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from spectral_scale.methods.frod.joint_decomposition import (
    JointBasis,
    column_lengths,
    gram,
    inverse_lengths,
    joint_basis,
)

RIDGE = 1e-3
WIDTH = 12
COUNT = 4


def matrices(rows: int = 9, count: int = COUNT, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) for _ in range(count)
    ]
    return [w * (1 + i) for i, w in enumerate(drawn)]


def decompose(weights: list[Tensor], **changes: object) -> JointBasis:
    largest = max(float(w.square().sum()) for w in weights)
    settings = {"largest": largest, "count": len(weights), "width": WIDTH} | changes
    return joint_basis([lambda w=w: w for w in weights], RIDGE, **settings)


def by_qr(weights: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """V, tau and Q_i from the thin QR of the stack, as the paper has it."""
    q, r = torch.linalg.qr(torch.cat(weights))
    parts = list(q.split([len(w) for w in weights]))
    eye = torch.eye(WIDTH, dtype=torch.float64)
    mean = sum(torch.linalg.inv(p.t() @ p + RIDGE * eye) for p in parts) / len(parts)
    tau, z = torch.linalg.eigh(mean)
    return r.t() @ z, tau, parts


def same_up_to_signs(found: Tensor, expected: Tensor) -> float:
    signs = (found * expected).sum(0).sign()
    return float((found - expected * signs).norm() / expected.norm())


def test_gram_matrices_give_what_the_qr_gives() -> None:
    weights = matrices()
    v, _, _ = by_qr(weights)
    assert same_up_to_signs(decompose(weights).v, v) < 1e-10


def test_every_matrix_is_reconstructed_exactly() -> None:
    weights = matrices()
    basis = decompose(weights)
    total = torch.zeros(WIDTH, dtype=torch.float64)
    for weight in weights:
        lengths = column_lengths(weight, basis.v_inverse_t)
        u = weight @ basis.v_inverse_t * inverse_lengths(lengths)
        torch.testing.assert_close(u.norm(dim=0), torch.ones(WIDTH, dtype=torch.float64))
        torch.testing.assert_close((u * lengths) @ basis.v.t(), weight, rtol=0, atol=1e-12)
        total += lengths.square()
    torch.testing.assert_close(total, torch.ones_like(total))  # the scale lies in V alone


def test_eigenvalues_lie_in_their_bounds() -> None:
    _, tau, _ = by_qr(matrices())
    n = COUNT
    assert n / (1 + n * RIDGE) <= float(tau.min())
    assert float(tau.max()) <= ((n - 1) / RIDGE + 1 / (1 + RIDGE)) / n


def in_shares(weights: list[Tensor], world: int) -> list[JointBasis]:
    """What each of several ranks finds, one thread each."""
    mine: list[Tensor] = [torch.zeros(())] * world
    meet = Barrier(world)
    largest = max(float(w.square().sum()) for w in weights)

    def run(rank: int) -> JointBasis:
        def add_up(share: Tensor) -> Tensor:
            mine[rank] = share.clone()
            meet.wait()
            total = torch.stack(mine[::-1]).sum(0)
            meet.wait()
            return total

        return joint_basis(
            [lambda w=w: w for w in weights[rank::world]],
            RIDGE,
            sum_over_ranks=add_up,
            largest=largest,
            count=len(weights),
            width=WIDTH,
        )

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_ranks_finds_the_same_bits(world: int) -> None:
    """Five ranks, four matrices: one rank has none."""
    weights = matrices()
    alone = decompose(weights)
    for basis in in_shares(weights, world):
        assert torch.equal(basis.v, alone.v)
        assert torch.equal(basis.v_inverse_t, alone.v_inverse_t)


def test_sums_in_floating_point_would_differ() -> None:
    """Why they are integers: another order of the same matrices rounds differently."""
    weights = matrices(rows=30)
    grams = [gram(w) for w in weights]
    assert not torch.equal(sum(grams[1:], grams[0]), sum(reversed(grams[:-1]), grams[-1]))
    assert torch.equal(decompose(weights).v, decompose(weights[::-1]).v)


def test_pieces_of_rows_add_up_to_the_matrix() -> None:
    weight = matrices(rows=20)[0]
    torch.testing.assert_close(
        gram(weight[:7]) + gram(weight[7:]), gram(weight), rtol=0, atol=1e-12
    )


def test_signs_are_fixed() -> None:
    basis = decompose(matrices())
    peaks = basis.v.gather(0, basis.v.abs().argmax(0, keepdim=True))
    assert bool((peaks > 0).all())


@pytest.mark.parametrize("case", ["short", "repeated", "ill-conditioned"])
def test_a_singular_stack_gets_an_orthogonal_basis(case: str) -> None:
    """As the right singular vectors: every matrix is still reconstructed."""
    weights = matrices(rows=2) if case == "short" else matrices()
    if case == "repeated":
        weights = [w.index_copy(1, torch.tensor([3]), w[:, 5:6]) for w in weights]
    if case == "ill-conditioned":
        weights = [w * torch.logspace(0, -9, WIDTH, dtype=torch.float64) for w in weights]
    basis = decompose(weights)
    assert basis.singular
    eye = torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(basis.v.t() @ basis.v_inverse_t, eye)
    for weight in weights:
        lengths = column_lengths(weight, basis.v_inverse_t)
        alive = inverse_lengths(lengths)
        u = weight @ basis.v_inverse_t * alive
        error = (u * lengths) @ basis.v.t() - weight
        assert float(error.norm() / weight.norm()) < 1e-6  # what is dead is below DEAD
        assert bool((alive == 0).any())


@pytest.mark.parametrize(("value", "message"), [(0.0, "zero"), (float("nan"), "NaN or infinity")])
def test_matrices_of_nothing_are_refused(value: float, message: str) -> None:
    weights = [torch.full((4, WIDTH), value, dtype=torch.float64)] * 2
    with pytest.raises(ValueError, match=message):
        decompose(weights)
