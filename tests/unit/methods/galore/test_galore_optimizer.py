"""GaLoreAdamW against a plain statement of the method, and its state."""

import io
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.galore import optimizer as galore
from spectral_scale.methods.galore.optimizer import GaLoreAdamW, leading_subspace, subspace_overlap

SHAPES = [(9, 6), (6, 9), (7, 7)]
ADAM = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def gradients(shape: tuple[int, int], steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(shape[0])
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def parameter(shape: tuple[int, ...]) -> nn.Parameter:
    generator = torch.Generator().manual_seed(7)
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))


def projected(parameters, rank: int, interval: int = 3, scale: float = 0.25, **more) -> dict:
    sizes = {"galore_rank": rank, "update_interval": interval, "scale": scale}
    return {"params": list(parameters), **sizes, **more}


def run(optimizer: GaLoreAdamW, weight: nn.Parameter, given: list[Tensor]) -> None:
    for gradient in given:
        weight.grad = gradient.clone()
        optimizer.step()


def reference(
    weight: Tensor, given: list[Tensor], *, rank: int, interval: int, scale: float, decay: float
) -> Tensor:
    """Algorithm 2 of the paper, written out: project, Adam, project back, scale."""
    w = weight.clone()
    (beta1, beta2), lr, eps = ADAM["betas"], ADAM["lr"], ADAM["eps"]
    right = w.shape[0] >= w.shape[1]
    m = v = torch.zeros(())
    for t, g in enumerate(given):
        if t % interval == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            p = vh[:rank].T if right else u[:, :rank]
        r = g @ p if right else p.T @ g
        m = beta1 * m + (1 - beta1) * r
        v = beta2 * v + (1 - beta2) * r * r
        step = (m / (1 - beta1 ** (t + 1))) / ((v / (1 - beta2 ** (t + 1))).sqrt() + eps)
        back = step @ p.T if right else p @ step
        w = w * (1 - lr * decay) - lr * scale * back
    return w


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_several_steps_with_renewals_equal_the_plain_statement(
    shape: tuple[int, int], decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def like_torch(gradient: Tensor, rank: int) -> Tensor:
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        return (vh[:rank].T if shape[0] >= shape[1] else u[:, :rank]).contiguous()

    given = gradients(shape, 8)
    for gradient in given[::3]:  # ours spans the same subspace; only its signs are fixed otherwise
        ours, theirs = leading_subspace(gradient, 3), like_torch(gradient, 3)
        torch.testing.assert_close((ours.T @ theirs).abs(), torch.eye(3, dtype=torch.float64))
    monkeypatch.setattr(galore, "leading_subspace", like_torch)
    weight = parameter(shape)
    expected = reference(weight.detach(), given, rank=3, interval=3, scale=0.25, decay=decay)
    run(GaLoreAdamW([projected([weight], 3)], **ADAM, weight_decay=decay), weight, given)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_the_projector_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: a projector that is never renewed gives other weights."""
    weight, given = parameter((6, 9)), gradients((6, 9), 8)
    expected = reference(weight.detach(), given, rank=3, interval=3, scale=0.25, decay=0.0)
    run(GaLoreAdamW([projected([weight], 3, interval=100)], **ADAM), weight, given)
    assert (weight.detach() - expected).norm() > 1e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_adamw_in_rotated_coordinates(shape: tuple[int, int]) -> None:
    """With all k directions and scale 1 the projector is a rotation Q of the shorter side."""
    k, right = min(shape), shape[0] >= shape[1]
    weight, given = parameter(shape), gradients(shape, 5)
    optimizer = GaLoreAdamW([projected([weight], k, interval=100, scale=1.0)], **ADAM)
    start = weight.detach().clone()
    run(optimizer, weight, given)
    q = optimizer.state[weight]["projector"]
    torch.testing.assert_close(q @ q.T, torch.eye(k, dtype=torch.float64))

    def rotate(matrix: Tensor) -> Tensor:
        return matrix @ q if right else q.T @ matrix

    rotated = nn.Parameter(rotate(start))
    plain = torch.optim.AdamW([rotated], **ADAM, weight_decay=0.0)
    for gradient in given:
        rotated.grad = rotate(gradient)
        plain.step()
    torch.testing.assert_close(rotate(weight.detach()), rotated.detach(), rtol=1e-10, atol=1e-12)


def test_with_an_identity_projector_it_is_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(galore, "leading_subspace", lambda g, r: torch.eye(r, dtype=g.dtype))
    weight, given = parameter((9, 6)), gradients((9, 6), 6)
    plain = nn.Parameter(weight.detach().clone())
    adamw = torch.optim.AdamW([plain], **ADAM, weight_decay=0.1)
    for gradient in given:
        plain.grad = gradient.clone()
        adamw.step()
    optimizer = GaLoreAdamW([projected([weight], 6, scale=1.0)], **ADAM, weight_decay=0.1)
    run(optimizer, weight, given)
    torch.testing.assert_close(weight, plain, rtol=1e-12, atol=1e-14)


def test_other_groups_are_torchs_adamw_bit_for_bit() -> None:
    values = [torch.randn(5, 4), torch.randn(4)]
    ours, theirs = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    matrix = nn.Parameter(torch.randn(4, 4))
    optimizer = GaLoreAdamW([{"params": ours}, projected([matrix], 2)], **ADAM, weight_decay=0.01)
    adamw = torch.optim.AdamW(theirs, **ADAM, weight_decay=0.01, fused=True)
    for _ in range(4):
        matrix.grad = torch.randn(4, 4)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        adamw.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_state_exists_from_the_start_and_holds_its_own_memory(shape: tuple[int, int]) -> None:
    weight = parameter(shape)
    optimizer = GaLoreAdamW([projected([weight], 2)], **ADAM)
    long, short = max(shape), min(shape)
    moments = (long, 2) if shape[0] >= shape[1] else (2, long)
    before = {k: tuple(t.shape) for k, t in optimizer.state[weight].items()}
    wanted = {"step": (), "exp_avg": moments, "exp_avg_sq": moments, "projector": (short, 2)}
    assert before == wanted
    run(optimizer, weight, gradients(shape, 4))
    state = optimizer.state[weight]
    assert {k: tuple(t.shape) for k, t in state.items()} == wanted
    for tensor in state.values():  # a slice of the SVD would keep all of it alive
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("stop", [4, 6])  # inside an interval, and just before a renewal
def test_resume_into_a_fresh_optimizer_is_exact(stop: int) -> None:
    given = gradients((6, 9), 9)
    straight = parameter((6, 9))
    run(GaLoreAdamW([projected([straight], 3)], **ADAM), straight, given)

    weight = parameter((6, 9))
    optimizer = GaLoreAdamW([projected([weight], 3)], **ADAM)
    run(optimizer, weight, given[:stop])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = nn.Parameter(weight.detach().clone())
    fresh = GaLoreAdamW([projected([resumed], 3)], **ADAM)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    run(fresh, resumed, given[stop:])
    assert torch.equal(resumed, straight)


def test_renewals_and_overlaps_are_counted() -> None:
    weights = [parameter(shape) for shape in SHAPES]
    optimizer = GaLoreAdamW([projected(weights, 2, interval=2)], **ADAM)
    seen = []
    for _ in range(4):
        for weight in weights:
            weight.grad = gradients(tuple(weight.shape), 1)[0]
        optimizer.step()
        stats = optimizer.stats
        seen.append((stats.projected, stats.renewed, [round(float(o), 6) for o in stats.overlaps]))
    assert seen == [(3, 3, []), (3, 0, []), (3, 3, [1.0, 1.0, 1.0]), (3, 0, [])]


def test_subspace_overlap() -> None:
    axes = torch.eye(6, dtype=torch.float64)
    half = torch.stack([axes[0], axes[3]], dim=1)
    assert float(subspace_overlap(axes[:, :2], axes[:, :2])) == 1.0
    assert float(subspace_overlap(axes[:, :2], axes[:, 2:4])) == 0.0
    assert float(subspace_overlap(axes[:, :2], half)) == 0.5
    turned = (
        axes[:, :2]
        @ torch.tensor([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]]).double()
    )
    assert float(subspace_overlap(axes[:, :2], turned)) == pytest.approx(1.0)


def test_a_missing_gradient_is_an_error_before_anything_moves() -> None:
    with_gradient, without = parameter((6, 9)), parameter((9, 6))
    optimizer = GaLoreAdamW([projected([with_gradient, without], 2)], **ADAM)
    with_gradient.grad = torch.ones(6, 9, dtype=torch.float64)
    before = with_gradient.detach().clone()
    with pytest.raises(SpectralError, match="1 of 2 projected matrices have no gradient"):
        optimizer.step()
    assert torch.equal(with_gradient, before)


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    weight = parameter((6, 9))
    optimizer = GaLoreAdamW([projected([weight], 2)], **ADAM)
    weight.grad = torch.full((6, 9), float("nan"), dtype=torch.float64)
    with pytest.raises(SpectralError, match=r"GaLore projection: gradient of shape \(6, 9\)"):
        optimizer.step()


@pytest.mark.parametrize(("shape", "rank"), [((6,), 2), ((6, 9), 7), ((6, 9), 0), ((2, 3, 4), 1)])
def test_parameters_that_cannot_be_projected_are_refused(shape: tuple[int, ...], rank: int) -> None:
    with pytest.raises(ConfigError, match="does not fit a parameter of shape"):
        GaLoreAdamW([projected([parameter(shape)], rank)], **ADAM)


def test_an_incomplete_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs 'update_interval'"):
        GaLoreAdamW([{"params": [parameter((4, 4))], "galore_rank": 2}], **ADAM)


class Operators(TorchDispatchMode):
    """Counts operators that are no views, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.found[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def operators(matrices: int) -> Counter[str]:
    """What the second step of so many equal matrices asks of a device."""
    weights = [parameter((9, 6)) for _ in range(matrices)]
    optimizer = GaLoreAdamW([projected(weights, 2)], **ADAM)
    for given in gradients((9, 6), 2):
        for weight in weights:
            weight.grad = given.clone()
        with Operators() as seen:
            optimizer.step()
    return seen.found


HOST = ("_local_scalar_dense", "detach")
"""Step counts lie on the host: reading them waits for nothing."""


@pytest.mark.parametrize("together", [True, False])
def test_a_matrix_costs_two_products_and_nothing_else(
    together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin updates one matrix at a time."""
    if not together:
        monkeypatch.setattr(galore, "alike", lambda moments: [[i] for i in range(len(moments))])
    more = operators(5) - operators(2)
    for name in HOST:
        del more[name]
    assert (dict(more) == {"mm": 3, "addmm_": 3}) is together, more
