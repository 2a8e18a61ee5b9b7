"""Controllers as torch.distributed.checkpoint and accelerate save and load them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_scale import SpectralConfig, SpectralController, convert, param_groups
from spectral_scale.errors import CheckpointError

CONFIG = SpectralConfig(
    spectral_rank=2, steps_per_iteration=2, iterations_per_round=2, iteration_warmup_steps=2
)
STEPS, SAVED = 7, 3


class Training:
    """A model of two blocks in an own loop."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(6, 6) for _ in range(2))})
        convert(self.model, CONFIG)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, lr=0.01, spectral_lr=0.01))
        self.controller = SpectralController(self.model, self.optimizer, CONFIG, seed=1)

    def steps(self, start: int, stop: int) -> None:
        layers: Any = self.model["layers"]
        for step in range(start, stop):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            for layer in layers:
                x = torch.tanh(layer(x))
            x.square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.controller.after_step()

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "controller": self.controller}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.controller.state_tensors())


def same(first: Training, second: Training) -> bool:
    expected, found = first.tensors(), second.tensors()
    return all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture(scope="module")
def straight() -> Training:
    training = Training()
    training.steps(0, STEPS)
    return training


def test_going_on_from_a_state_dict_changes_no_bit(straight: Training) -> None:
    first, second = Training(), Training()
    first.steps(0, SAVED)
    state = copy.deepcopy({k: p.state_dict() for k, p in first.parts().items()})
    second.model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.controller.load_state_dict(state["controller"])
    second.steps(SAVED, STEPS)
    assert same(straight, second)
    # What was left out would have changed the numbers.
    third = Training()
    third.model.load_state_dict(state["model"])
    third.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    third.steps(SAVED, STEPS)
    assert not same(straight, third)


def test_torch_distributed_checkpoint_saves_and_loads_a_controller(
    straight: Training, tmp_path: Path
) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.stateful import Stateful

    first, second = Training(), Training()
    first.steps(0, SAVED)
    assert isinstance(first.controller, Stateful)
    dcp.save(first.parts(), checkpoint_id=tmp_path)
    moments = copy.deepcopy(first.optimizer.state_dict())
    dcp.load(second.parts(), checkpoint_id=tmp_path)
    second.optimizer.load_state_dict(moments)
    second.steps(SAVED, STEPS)
    assert same(straight, second)


def test_a_tensor_that_is_missing_is_named() -> None:
    training = Training()
    state = training.controller.state_dict()
    del state["bank/layers.1/sigma"]
    with pytest.raises(CheckpointError, match=r"bank/layers.1/sigma is missing"):
        training.controller.load_state_dict(state)
