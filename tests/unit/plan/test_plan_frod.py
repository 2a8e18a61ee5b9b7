"""`plan` of a FRoD run: the bases that every rank holds are those that the controller counts."""

import pytest
import torch

from spectral_scale.config.load import load_config
from spectral_scale.config.methods.frod import FORMED
from spectral_scale.config.presets import resolve_architecture
from spectral_scale.engine.methods import convert_model
from spectral_scale.methods.frod.controller import FRoDController
from spectral_scale.methods.frod.product import CategoryBasis, FRoDProduct
from spectral_scale.methods.frod.sparsity import Pattern, draw_positions
from spectral_scale.models.build import build_model, materialise
from spectral_scale.models.weights import KeyedWeights
from spectral_scale.plan.build import checkpoint_bytes
from spectral_scale.plan.inventory import take_inventory
from spectral_scale.plan.method_needs import method_memory
from spectral_scale.testing.memory import PeakMemory

WORDS = {
    "spectral.method": "frod",
    "spectral.targets": "[q_proj,fc2]",
    "spectral.train_dense": "false",
    "model.hidden_size": "64",
    "model.num_layers": "8",
    "model.vocab_size": "128",
}


@pytest.mark.parametrize("world_size", [1, 4])
def test_bases_are_counted(world_size: int) -> None:
    config = load_config([], [f"--{k}={v}" for k, v in WORDS.items()]).config
    shapes = resolve_architecture(config.model)
    inventory = take_inventory(config, shapes)
    model = build_model(shapes, config.model, eos_token_id=None)
    convert_model(model, config.spectral, torch.float32)
    materialise(model, device=torch.device("cpu"), dtype=torch.float32)
    weights = KeyedWeights(0)
    layers = {
        n: (m.out_features, m.in_features) for n, m in model.named_modules() if hasattr(m, "base")
    }
    controller = FRoDController(
        model, None, config.spectral, weights=lambda n: weights.get(f"{n}.weight", layers[n])
    )
    needs = method_memory(config, inventory, world_size)
    assert needs.owned == controller.nbytes()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert inventory.numel(trainable=True) == trained  # nothing dense trains
    state = sum(t.nbytes for _, t in controller.state_tensors())
    assert checkpoint_bytes(config, inventory) == 12 * trained + state
    assert needs.workspace > 8 * 9 * 256**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formed_matrices_are_counted(dtype: torch.dtype) -> None:
    """A pass over few tokens holds so many of the weight's size, and the weight in V's precision
    where it is rounded; the tokens' own bytes are within 5 %."""
    width = 512
    pattern = Pattern(draw_positions(width, 0.01, 0), width)
    v = torch.eye(width)
    basis = CategoryBasis(category="q_proj", v=v, v_inverse_t=v, pattern=pattern)
    base, lengths = torch.ones(width, width, dtype=dtype), torch.ones(width)
    mixing, delta = torch.zeros(pattern.positions.shape[1]), torch.zeros(width)
    x = torch.ones(4, width, requires_grad=True)
    trained = (mixing.requires_grad_(), delta.requires_grad_())
    with PeakMemory() as memory:
        FRoDProduct.apply(x, base, *trained, None, basis, lengths).sum().backward()
    found = memory.peak_bytes / (4 * width * width)
    assert found == pytest.approx(FORMED + (dtype != torch.float32), rel=0.05)
