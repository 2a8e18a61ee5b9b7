"""The swap protocol on a small float64 model: what must hold, and broken twins that fail."""

import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spectral_scale import SpectralConfig, SpectralController, convert, merge, param_groups
from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.phases import PHASES
from spectral_scale.methods.sst.bank import SpectralBank
from spectral_scale.methods.sst.layer import spectral_layers

LR = 1e-2
SHAPES = [(24, 32), (32, 16)]


class Trainer:
    """A converted two-layer model, its optimizer, controller and a fixed regression task."""

    def __init__(self, dtype: torch.dtype = torch.float64, lr: float = LR, **changes: object):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 24, generator=generator, dtype=dtype)
        self.y = torch.randn(64, 16, generator=generator, dtype=dtype)
        self.model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16)).to(dtype)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(0, 0.3, generator=generator)
        settings = {
            "spectral_rank": 4,
            "steps_per_iteration": 5,
            "iterations_per_round": 2,
            "iteration_warmup_steps": 3,
        }
        self.config = SpectralConfig(**(settings | changes))
        convert(self.model, self.config)
        groups = param_groups(self.model, lr=lr, spectral_lr=lr)
        self.optimizer = torch.optim.AdamW(groups)
        self.controller = SpectralController(
            self.model, self.optimizer, self.config, seed=1, bank_dtype=dtype
        )
        self.layers = spectral_layers(self.model)

    def step(self) -> float:
        """One optimizer step without its swap."""
        loss = (self.model(self.x) - self.y).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def run(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(self.step())
            self.controller.after_step()
        return losses

    def to_boundary(self) -> None:
        """Train up to the last step of the iteration, its factors retracted, nothing swapped."""
        self.run(self.config.steps_per_iteration - 1)
        self.step()
        names = [f"{n}.{leaf}" for n in self.layers for leaf in ("u", "v")]
        self.controller.store.retract_columns(names)
        self.controller.store.clamp_nonnegative(f"{n}.sigma" for n in self.layers)

    def weights(self) -> list[Tensor]:
        return [layer.effective_weight() for layer in self.layers.values()]


def change_at_swap(trainer: Trainer, swap: Callable[[], object]) -> float:
    """Largest relative change of an effective weight across a swap."""
    before = trainer.weights()
    swap()
    pairs = zip(before, trainer.weights(), strict=True)
    return max(float((b - a).norm() / a.norm()) for a, b in pairs)


@pytest.mark.parametrize("storage", ["residual", "factored"])
@pytest.mark.parametrize("rounds", [1, 2], ids=["re-SVD", "swap"])
def test_function_is_unchanged(storage: str, rounds: int) -> None:
    """T3, T7: neither a swap nor a re-SVD changes what the layers compute."""
    trainer = Trainer(storage=storage, iterations_per_round=rounds)
    trainer.to_boundary()
    reports = []
    change = change_at_swap(trainer, lambda: reports.append(trainer.controller.after_step()))
    assert reports[0].redecomposed == (2 if rounds == 1 else 0)
    assert reports[0].swapped_triplets > 0
    assert change < 1e-13


@pytest.mark.parametrize("forgotten", ["commit", "residual"])
def test_a_broken_swap_changes_the_function(
    forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twins: trained values not banked, or the residual not rebuilt."""
    trainer = Trainer()
    trainer.to_boundary()
    if forgotten == "commit":
        monkeypatch.setattr(SpectralBank, "commit", lambda *_: None)
    else:
        stale = {n: layer.residual.detach().clone() for n, layer in trainer.layers.items()}
        monkeypatch.setattr(
            SpectralBank, "frozen_values", lambda _, name, **__: {"residual": stale[name]}
        )
    assert change_at_swap(trainer, trainer.controller.after_step) > 1e-3


def test_frozen_values_are_bit_identical_inside_an_iteration() -> None:
    for storage in ("residual", "factored"):
        trainer = Trainer(storage=storage)
        frozen = {n: p for n, p in trainer.model.named_parameters() if not p.requires_grad}
        assert frozen
        before = {n: p.detach().clone() for n, p in frozen.items()}
        trainer.run(4)
        assert all(torch.equal(before[n], p) for n, p in frozen.items())
        trainer.run(1)  # the twin: a swap does change them
        assert not any(torch.equal(before[n], p) for n, p in frozen.items())


def test_residual_equals_factored_on_the_same_sigma_set() -> None:
    """Three iterations and a re-SVD in float64: the two storages are one algorithm."""
    residual = Trainer(storage="residual").run(15)
    factored = Trainer(storage="factored", trained_sigma="active").run(15)
    assert max(abs(a - b) for a, b in zip(residual, factored, strict=True)) < 1e-12
    free = Trainer(storage="factored").run(15)  # the twin: every sigma trains
    assert max(abs(a - b) for a, b in zip(residual, free, strict=True)) > 1e-6


def test_moments_and_step_counts_are_reset_and_dense_ones_kept() -> None:
    trainer = Trainer()
    trainer.run(5)
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            state = trainer.optimizer.state[parameter]
            total = sum(float(state[key].abs().sum()) for key in ("exp_avg", "exp_avg_sq"))
            assert (total == 0 and state["step"] == 0) == group["spectral"]


def test_an_optimizer_without_the_factors_is_noticed() -> None:
    """Silently off is the worst defect: an optimizer that misses the factors stops the run."""
    trainer = Trainer()
    missing = [g for g in trainer.optimizer.param_groups if g["name"] != "spectral_value"]
    trainer.optimizer.param_groups = missing
    with pytest.raises(SpectralError, match="moments_reset"):
        trainer.run(5)
    groups = param_groups(trainer.model, lr=LR, spectral_lr=LR)
    plain = [{"params": group["params"]} for group in groups]
    with pytest.raises(ConfigError, match="marked spectral"):
        SpectralController(trainer.model, torch.optim.AdamW(plain), trainer.config)


def test_units_stay_unit_and_sigma_nonnegative() -> None:
    trainer = Trainer(lr=0.5)
    trainer.run(9)
    for layer in trainer.layers.values():
        for factor in (layer.u, layer.v):
            norms = torch.linalg.vector_norm(factor, dim=0)
            torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-12, rtol=0)
        assert bool((layer.sigma >= 0).all())


def test_sigma_would_go_negative_without_the_clamp() -> None:
    """The twin of the clamp: a large step does push values below zero."""
    trainer = Trainer(lr=20.0)
    trainer.step()
    assert any(bool((layer.sigma < 0).any()) for layer in trainer.layers.values())


def test_twenty_rounds_leave_no_drift() -> None:
    """fp32, 20 rounds: layers equal their bank, factors are orthogonal after each re-SVD."""
    trainer = Trainer(torch.float32, lr=1e-3, steps_per_iteration=2)
    bank = trainer.controller.bank
    for _ in range(20):
        trainer.run(4)
        for name, layer in trainer.layers.items():
            entry = bank[name]
            composed = (entry.u * entry.sigma) @ entry.v.t()
            error = (layer.effective_weight() - composed).norm() / composed.norm()
            assert float(error) < 1e-6
            for factor in (entry.u, entry.v):
                gram = factor.t() @ factor
                assert float((gram - torch.eye(len(gram))).abs().max()) < 1e-5


def test_rounds_alone_do_not_move_the_weight() -> None:
    """fp32, nothing learned: 20 rounds of SVD and rebuilding keep W to fp32 rounding."""
    trainer = Trainer(torch.float32, lr=0.0, steps_per_iteration=1)
    before = trainer.weights()
    trainer.run(40)
    for a, b in zip(before, trainer.weights(), strict=True):
        assert float((b - a).norm() / a.norm()) < 1e-5


def test_low_precision_updates_of_the_residual_would_drift() -> None:
    """The twin: adding and subtracting rank-r parts in bf16 instead of rebuilding from the bank."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 16, generator=generator)
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)

    def part(i: int) -> Tensor:
        return sigma[i] * u[:, i : i + 1] @ vh[i : i + 1]

    residual = (weight - part(0)).bfloat16()
    start = residual.float().clone()
    for i in range(400):
        residual += part(i % 16).bfloat16()
        residual -= part((i + 1) % 16).bfloat16()
    assert float((residual.float() - start).norm() / start.norm()) > 1e-2


def test_staggered_rounds_visit_every_matrix_once_a_round() -> None:
    trainer = Trainer(stagger_rounds=True, iterations_per_round=4, steps_per_iteration=1)
    counts = []
    for _ in range(8):
        trainer.step()
        report = trainer.controller.after_step()
        counts.append(report.redecomposed)
    assert sum(counts[:4]) == sum(counts[4:]) == 2
    assert max(counts) == 1  # never both at once: that is what staggering is for


def test_partitioned_sampling_visits_every_triplet_once_a_round() -> None:
    trainer = Trainer(sampling="partitioned", iterations_per_round=6, steps_per_iteration=1)
    seen: dict[str, list[int]] = {name: [] for name in trainer.layers}
    for _ in range(6):
        for name in trainer.layers:
            seen[name] += trainer.controller.bank[name].active.tolist()
        trainer.run(1)
    assert sorted(seen["0"]) == list(range(24))  # k = 24, r = 4: six blocks
    assert set(seen["2"]) == set(range(16))


def test_ramp_multiplies_and_restores_the_learning_rate() -> None:
    trainer = Trainer(iteration_warmup_steps=4)
    used = []
    trainer.optimizer.register_step_pre_hook(
        lambda opt, *_: used.append({g["name"]: g["lr"] for g in opt.param_groups})
    )
    trainer.run(6)
    factors = [step["spectral_direction"] / LR for step in used]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.25])
    assert all(step["dense"] == LR if "dense" in step else True for step in used)
    assert all(group["lr"] == LR for group in trainer.optimizer.param_groups)


def test_draws_depend_on_the_seed_alone() -> None:
    def active(seed: int) -> list[int]:
        trainer = Trainer()
        bank = trainer.controller.bank
        bank.draw("0", trainer.config, seed=seed, position=(1, 1))
        return bank["0"].active.tolist()

    assert active(1) == active(1)
    assert active(1) != active(2)


@pytest.mark.parametrize("rounds", [1, 2], ids=["re-SVD", "swap"])
def test_poisoned_factor_names_its_matrix(rounds: int) -> None:
    """Before it reaches the bank, so that a swap without decomposition finds it, too."""
    trainer = Trainer(iterations_per_round=rounds)
    trainer.run(4)
    trainer.step()
    with torch.no_grad():
        trainer.layers["2"].sigma[0] = math.nan
    with pytest.raises(SpectralError, match=r"rank 0: swap: 2: .*NaN"):
        trainer.controller.after_step()


def test_failed_svd_keeps_the_old_factors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The factors still sum to the same matrix; only orthogonality waits for the next round."""

    def fail(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    trainer = Trainer(iterations_per_round=1)
    trainer.to_boundary()
    monkeypatch.setattr(torch.linalg, "svd", fail)
    reports = []
    with caplog.at_level(logging.WARNING):
        change = change_at_swap(trainer, lambda: reports.append(trainer.controller.after_step()))
    assert change < 1e-13
    assert reports[0].kept_factors == 2 and reports[0].redecomposed == 0
    assert "keeps its factors" in caplog.text


def test_merge_gives_the_same_function_densely() -> None:
    for storage in ("residual", "factored"):
        trainer = Trainer(storage=storage)
        trainer.run(7)
        expected = trainer.model(trainer.x)
        assert merge(trainer.model) == 2
        assert not spectral_layers(trainer.model)
        assert all(type(m) is not nn.Linear or m.weight.requires_grad for m in trainer.model)
        torch.testing.assert_close(trainer.model(trainer.x), expected, atol=1e-12, rtol=0)


def test_state_round_trip_into_fresh_objects() -> None:
    """A user's own checkpoint: model, optimizer and controller state resume bit-exactly."""
    whole = Trainer()
    expected = whole.run(18)[7:]
    first = Trainer()
    first.run(7)
    saved = {name: tensor.clone() for name, tensor in first.controller.state_tensors()}
    second = Trainer()
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.controller.load_state(saved.__getitem__, first.controller.applied_steps)
    assert second.run(11) == expected


def test_a_store_that_writes_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first swap reads back what it scattered; the twin loses every write."""
    trainer = Trainer()
    trainer.run(4)
    trainer.step()
    monkeypatch.setattr(trainer.controller.store, "scatter", lambda *_, **__: None)
    with pytest.raises(SpectralError, match=r"scattered \d+ of 8 triplets"):
        trainer.controller.after_step()


def test_phases_are_timed_and_announced() -> None:
    """In the protocol's order, and each within the swap's seconds."""
    trainer = Trainer(iterations_per_round=1)
    entered: list[tuple[str, int]] = []
    trainer.controller.swap.clock.listeners.append(lambda *phase: entered.append(phase))
    trainer.run(4)
    assert not entered
    trainer.step()
    report = trainer.controller.after_step()
    assert report is not None
    assert {iteration for _, iteration in entered} == {1}
    first = list(dict.fromkeys(name for name, _ in entered))
    assert sorted(first, key=PHASES.index) == sorted(PHASES, key=PHASES.index)
    assert [p for p in first if p != "agree"] == [p for p in PHASES if p != "agree"]
    assert set(report.phase_seconds) == set(PHASES)
    assert 0 < sum(report.phase_seconds.values()) <= report.seconds
    assert report.metrics()["spectral/boundary_seconds/decompose"] > 0


def test_a_failed_collective_says_where_it_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("Connection closed by peer")

    trainer = Trainer()
    trainer.run(4)
    trainer.step()
    monkeypatch.setattr(trainer.controller.store, "scatter", lost)
    with pytest.raises(RuntimeError, match="closed by peer") as caught:
        trainer.controller.after_step()
    assert caught.value.__notes__ == [
        "rank 0 broke off in phase 'deliver' of the swap before iteration 1"
    ]


@pytest.mark.parametrize("kind", ["random", "zero"])
def test_the_ablation_of_the_initialization_discards_the_weights(kind: str) -> None:
    svd, ablated = Trainer(), Trainer(initialization=kind)
    for kept, weight in zip(svd.weights(), ablated.weights(), strict=True):
        sigma = torch.linalg.svdvals(kept)
        found = torch.linalg.svdvals(weight)
        torch.testing.assert_close(found, sigma if kind == "random" else torch.zeros_like(sigma))
        assert (weight - kept).norm() > 0.5 * kept.norm()
    again = Trainer(initialization=kind)
    assert all(map(torch.equal, ablated.weights(), again.weights()))
    ablated.run(11)  # swaps and re-SVDs take such a start
    assert all(weight.any() for weight in ablated.weights())
