"""Residuals of eight bits over swaps: rounded from the bank alone, delivered whole, never trained
in low precision. Broken twins fail."""

import pytest
import torch
from torch import Tensor, nn

from spectral_scale import SpectralConfig, SpectralController, convert, param_groups
from spectral_scale.errors import ConfigError
from spectral_scale.methods.sst import swap as swap_module
from spectral_scale.methods.sst.bank import SpectralBank
from spectral_scale.methods.sst.layer import spectral_layers
from spectral_scale.ops.int8 import quantise_rows
from spectral_scale.parallel.store import TorchStore

STEPS = 3


class Trainer:
    """A converted model of two layers with residuals of eight bits, and a fixed task."""

    def __init__(self, **changes: object) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 24, generator=generator)
        self.y = torch.randn(64, 16, generator=generator)
        self.model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(0, 0.3, generator=generator)
        settings = {
            "spectral_rank": 4,
            "steps_per_iteration": STEPS,
            "iterations_per_round": 2,
            "residual_dtype": "int8",
        }
        config = SpectralConfig(**(settings | changes))
        convert(self.model, config, frozen_dtype=torch.bfloat16)
        groups = param_groups(self.model, lr=1e-2, spectral_lr=1e-2)
        self.optimizer = torch.optim.AdamW(groups)
        self.controller = SpectralController(self.model, self.optimizer, config, seed=1)
        self.layers = spectral_layers(self.model)

    def step(self) -> None:
        """One optimizer step, the factors retracted, without its swap."""
        self.optimizer.zero_grad()
        (self.model(self.x) - self.y).square().mean().backward()
        self.optimizer.step()
        names = [f"{n}.{leaf}" for n in self.layers for leaf in ("u", "v")]
        self.controller.store.retract_columns(names)
        self.controller.store.clamp_nonnegative(f"{n}.sigma" for n in self.layers)

    def to_boundary(self) -> None:
        """Up to the last step of the iteration, nothing swapped."""
        for _ in range(STEPS - 1):
            self.step()
            self.controller.after_step()
        self.step()

    def quantised_from_bank(self) -> bool:
        """Whether every layer holds, to the bit, what the fp32 bank's residual is rounded to."""
        same = []
        for name, layer in self.layers.items():
            residual = self.controller.bank.frozen_values(name, factored=False)["residual"]
            assert residual.dtype == torch.float32
            q, scale = quantise_rows(residual)
            same += [torch.equal(q, layer.residual), torch.equal(scale, layer.residual_scale)]
        return all(same)


def change_of_outputs(trainer: Trainer) -> float:
    """Relative change of the model's outputs across the swap that is due."""
    with torch.no_grad():
        before = trainer.model(trainer.x)
        trainer.controller.after_step()
        return float((trainer.model(trainer.x) - before).norm() / before.norm())


@pytest.mark.parametrize("rounds", [1, 2], ids=["re-SVD", "swap"])
def test_a_swap_keeps_the_function_within_the_rounding(rounds: int) -> None:
    trainer = Trainer(iterations_per_round=rounds)
    assert trainer.quantised_from_bank()
    trainer.to_boundary()
    assert change_of_outputs(trainer) < 0.02
    assert trainer.quantised_from_bank()


@pytest.mark.parametrize("stale", ["residual", "residual_scale"])
def test_a_stale_leaf_after_a_swap_changes_the_function(
    stale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twins: whole numbers, or scales, of the iteration before."""
    trainer = Trainer()
    trainer.to_boundary()
    old = {n: getattr(layer, stale).detach().clone() for n, layer in trainer.layers.items()}
    build = swap_module.Swap._build

    def broken(swap: swap_module.Swap, name: str, trained: bool) -> dict[str, Tensor]:
        return build(swap, name, trained) | {stale: old[name]}

    monkeypatch.setattr(swap_module.Swap, "_build", broken)
    assert change_of_outputs(trainer) > 0.02
    assert not trainer.quantised_from_bank()


def test_rounding_twice_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a residual that was bf16 before it was rounded to whole numbers."""
    trainer = Trainer()
    trainer.to_boundary()
    values = SpectralBank.frozen_values

    def low(bank: SpectralBank, name: str, *, factored: bool) -> dict[str, Tensor]:
        found = values(bank, name, factored=factored)
        return {leaf: value.bfloat16() for leaf, value in found.items()}

    with monkeypatch.context() as patched:
        patched.setattr(SpectralBank, "frozen_values", low)
        trainer.controller.after_step()
    assert not trainer.quantised_from_bank()


def test_only_the_residual_has_eight_bits() -> None:
    """Trained factors, the bank and directions of extra singular values keep their precision."""
    trainer = Trainer(extra_sigma=3)
    for layer in trainer.layers.values():
        kinds = {n: p.dtype for n, p in layer.named_parameters()}
        assert kinds.pop("residual") == torch.int8
        assert {kinds.pop("u_fixed"), kinds.pop("v_fixed")} == {torch.bfloat16}
        assert set(kinds.values()) == {torch.float32}
        assert not layer.residual_scale.requires_grad
    for _, tensor in trainer.controller.state_tensors():
        assert tensor.dtype in (torch.float32, torch.int64)
    trainer.to_boundary()
    trainer.controller.after_step()


def test_a_store_whose_host_might_cast_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchStore, "keeps_whole_numbers", False)
    with pytest.raises(ConfigError, match="residual_dtype=int8 does not run behind TorchStore"):
        Trainer()
    Trainer(residual_dtype="auto")


def test_a_swap_reports_the_error_by_kind_of_matrix() -> None:
    trainer = Trainer()
    trainer.to_boundary()
    values = trainer.controller.after_step().metrics()
    kinds = [values[f"spectral/quantisation_error/{name}"] for name in ("0", "2")]
    assert all(1e-3 < error < 0.02 for error in kinds)
    assert values["spectral/quantisation_error"] == max(kinds)
    plain = Trainer(residual_dtype="auto")
    plain.to_boundary()
    assert not any("quantisation" in key for key in plain.controller.after_step().metrics())
