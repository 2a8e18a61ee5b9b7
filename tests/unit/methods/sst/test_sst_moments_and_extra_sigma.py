"""Moments follow their triplets; extra singular values train in residual storage."""

import pytest
import torch
from torch import Tensor, nn

from spectral_scale import SpectralConfig, SpectralController, convert, param_groups
from spectral_scale.config.check import check_config
from spectral_scale.config.schema import ModelConfig, RunConfig
from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.sst.layer import spectral_layers
from spectral_scale.methods.sst.moments import positions
from spectral_scale.parallel.store import TorchStore

MOMENTS = ("exp_avg", "exp_avg_sq")
K, STEPS = 16, 6


class Small:
    """Two spectral layers in float64, Adam, and a regression that never ends."""

    def __init__(self, **changes: object) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(40, K, generator=generator, dtype=torch.float64)
        self.y = torch.randn(40, K, generator=generator, dtype=torch.float64)
        self.model = nn.Sequential(nn.Linear(K, 24), nn.Tanh(), nn.Linear(24, K)).double()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(0, 0.3, generator=generator)
        settings = {
            "spectral_rank": 8,
            "steps_per_iteration": STEPS,
            "iterations_per_round": 3,
            "iteration_warmup_steps": 2,
        }
        self.config = SpectralConfig(**(settings | changes))
        convert(self.model, self.config)
        groups = param_groups(self.model, lr=1e-2, spectral_lr=1e-2)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.controller = SpectralController(
            self.model, self.optimizer, self.config, seed=1, bank_dtype=torch.float64
        )
        self.layers = spectral_layers(self.model)

    def step(self) -> None:
        """One optimizer step, without what follows it."""
        self.optimizer.zero_grad()
        (self.model(self.x) - self.y).square().mean().backward()
        self.optimizer.step()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
            self.controller.after_step()

    def before_boundary(self) -> None:
        """Up to the last step of an iteration; `after_step()` then brings the swap."""
        self.run(STEPS - 1)
        self.step()

    def state(self, leaf: str) -> dict[str, Tensor]:
        found = self.optimizer.state[getattr(self.layers["2"], leaf)]
        return {name: value.clone() for name, value in found.items()}

    def order(self, leaf: str) -> list[int]:
        """The triplet behind each column of the second layer's u and v, or behind each sigma."""
        entry = self.controller.bank["2"]
        if leaf != "sigma":
            return entry.active.tolist()
        return entry.held_sigma(all_sigma=self.layers["2"].residual is None).tolist()


def by_triplet(state: dict[str, Tensor], order: list[int], name: str) -> dict[int, Tensor]:
    return {triplet: state[name][..., column] for column, triplet in enumerate(order)}


def swap(small: Small, leaf: str) -> tuple[dict, dict, list[int], list[int]]:
    """State of one leaf and the triplets behind it, before and after the swap."""
    small.before_boundary()
    before, order = small.state(leaf), small.order(leaf)
    report = small.controller.after_step()
    assert report is not None
    total = sum(2 * p.numel() for m in small.layers.values() for p in (m.u, m.v, m.sigma))
    assert report.moments_reset + report.moments_kept == total
    return before, small.state(leaf), order, small.order(leaf)


def check_kept(before: dict, after: dict, old: list[int], new: list[int]) -> int:
    """Moments of triplets in both orders moved along, all others are zero; how many moved."""
    staying = set(old) & set(new)
    for name in MOMENTS:
        was, now = by_triplet(before, old, name), by_triplet(after, new, name)
        for triplet in new:
            expected = was[triplet] if triplet in staying else torch.zeros_like(now[triplet])
            assert torch.equal(now[triplet], expected)
    assert after["step"] == before["step"]
    return len(staying)


KEEP = ("keep_sigma", "keep_redrawn")


def test_positions():
    before, after = torch.tensor([2, 5, 7]), torch.tensor([0, 5, 2])
    assert positions(before, after, 9).tolist() == [-1, 1, 0]
    assert positions(torch.empty(0, dtype=torch.int64), after, 9).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("leaf", ["u", "v", "sigma"])
def test_moments_of_redrawn_triplets_follow_them(leaf):
    moved = swap(Small(boundary_moments="keep_redrawn"), leaf)
    assert 0 < check_kept(*moved) < len(moved[3])
    assert moved[2] != moved[3]


def test_keeping_sigma_resets_directions():
    small = Small(boundary_moments="keep_sigma")
    assert check_kept(*swap(small, "sigma")) > 0
    for leaf in ("u", "v"):
        state = small.state(leaf)
        assert state["step"] == 0
        assert not any(state[name].any() for name in MOMENTS)


@pytest.mark.parametrize("keep", KEEP)
def test_every_sigma_of_factored_storage_keeps_its_moments(keep):
    before, after, old, new = swap(Small(boundary_moments=keep, storage="factored"), "sigma")
    assert check_kept(before, after, old, new) == len(new) == K
    assert old != new


def test_moments_that_stay_with_their_columns_are_found(monkeypatch):
    monkeypatch.setattr(TorchStore, "move_moments", lambda self, fqn, source: 0)
    small = Small(boundary_moments="keep_redrawn")
    small.before_boundary()
    with pytest.raises(SpectralError, match="moments_reset, expected"):
        small.controller.after_step()


def test_wrong_columns_are_found(monkeypatch):
    right = TorchStore.move_moments
    monkeypatch.setattr(
        TorchStore, "move_moments", lambda self, fqn, source: right(self, fqn, source.roll(1))
    )
    with pytest.raises(AssertionError):
        check_kept(*swap(Small(boundary_moments="keep_redrawn"), "u"))


@pytest.mark.parametrize("keep", ["reset", *KEEP])
def test_nothing_survives_a_decomposition_or_a_reset(keep):
    small = Small(boundary_moments=keep, iterations_per_round=1)
    swap(small, "sigma")
    for leaf in ("u", "v", "sigma"):
        state = small.state(leaf)
        assert state["step"] == 0
        assert not any(state[name].any() for name in MOMENTS)


def test_a_store_that_cannot_move_moments_is_refused():
    class Plain(TorchStore):
        moves_moments = False

    small = Small(boundary_moments="keep_sigma")
    small.before_boundary()
    store = Plain(small.model, small.optimizer, small.controller.collective)
    small.controller.swap.store = store
    with pytest.raises(SpectralError, match="keep_sigma needs a store.*Plain cannot"):
        small.controller.after_step()


# -- extra sigma -----------------------------------------------------------------------------


def test_extra_sigma_are_others_and_rotate():
    small = Small(extra_sigma=3)
    seen = set()
    for _ in range(6):
        entry = small.controller.bank["2"]
        extra = entry.extra.tolist()
        assert len(extra) == 3 and extra == sorted(extra)
        assert not set(extra) & set(entry.active.tolist())
        seen |= set(extra)
        small.run(STEPS)
    assert len(seen) > 6


def test_extra_sigma_train_and_their_directions_do_not():
    small = Small(extra_sigma=3)
    layer = small.layers["2"]
    sigma, fixed = layer.sigma.detach().clone(), layer.u_fixed.detach().clone()
    small.run(STEPS - 1)
    assert (layer.sigma != sigma).all()
    assert torch.equal(layer.u_fixed, fixed)
    assert layer.sigma.shape == (11,)


@pytest.mark.parametrize("iterations", [1, 3])  # a swap, and a decomposition
def test_a_swap_with_extra_sigma_leaves_the_function_unchanged(iterations):
    small = Small(extra_sigma=3)
    small.run(STEPS * iterations - 1)
    small.step()
    store = small.controller.store
    store.retract_columns(f"{n}.{leaf}" for n in small.layers for leaf in ("u", "v"))
    store.clamp_nonnegative(f"{n}.sigma" for n in small.layers)
    before = small.model(small.x)
    small.controller.after_step()
    torch.testing.assert_close(small.model(small.x), before, atol=1e-12, rtol=0)


def test_all_extra_sigma_equal_factored_storage():
    """With every other singular value extra, residual storage is factored storage."""
    residual, factored = Small(extra_sigma=K - 8), Small(storage="factored")
    for trained in (residual, factored):
        trained.run(STEPS * 4 + 2)  # three swaps and a decomposition
    for name, layer in residual.layers.items():
        other = factored.layers[name]
        for leaf in ("u", "v", "sigma"):
            pair = getattr(layer, leaf), getattr(other, leaf)
            torch.testing.assert_close(*pair, atol=1e-9, rtol=0)
        assert residual.controller.bank[name].active.equal(factored.controller.bank[name].active)
    alone = Small()
    alone.run(STEPS * 4 + 2)
    assert not torch.allclose(alone.layers["2"].u, factored.layers["2"].u, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "factored", "extra_sigma": 2}, "extra_sigma=2 needs spectral.storage=res"),
        ({"spectral_rank": 250, "extra_sigma": 7}, "exceed the 256 triplets"),
        ({"extra_sigma": -1}, "extra_sigma=-1 must be"),
    ],
)
def test_extra_sigma_that_cannot_be_are_refused(changes, message):
    config = RunConfig(model=ModelConfig(name="opt-tiny"), spectral=SpectralConfig(**changes))
    with pytest.raises(ConfigError, match=message):
        check_config(config, world_size=1)
