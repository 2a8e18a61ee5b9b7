"""Columns are scaled by stacks: the bits of each matrix alone, and launches that do not grow."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_scale.backends.deepspeed.clipping import norms_by_kind, scale
from spectral_scale.backends.deepspeed.partitions import Fragment
from spectral_scale.backends.deepspeed.retraction import Directions
from spectral_scale.backends.fsdp2.store import FSDP2Store
from spectral_scale.parallel import stacking
from spectral_scale.parallel.collective import SingleProcess
from spectral_scale.parallel.stacking import alike, unit_columns
from spectral_scale.parallel.store import TorchStore

SHAPES = ((12, 3), (12, 3), (20, 3))
"""Factors of a layer; two are of one shape."""


class Launches(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.__name__ != "detach.default"
        return func(*args, **(kwargs or {}))


def factors(layers: int) -> dict[str, nn.Parameter]:
    """What `layers` layers train, by name."""
    torch.manual_seed(0)
    shapes = [(f"{i}.{j}", shape) for i in range(layers) for j, shape in enumerate(SHAPES)]
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes}


def torch_store(parameters: dict[str, nn.Parameter]) -> Callable[[], None]:
    store = TorchStore.__new__(TorchStore)
    store._parameters = parameters
    return lambda: retract_and_clamp(store, parameters)


def fsdp2_store(parameters: dict[str, nn.Parameter]) -> Callable[[], None]:
    """Parameters that `fully_shard` left whole take the same way as its shards."""
    store = FSDP2Store(nn.Module(), None, SingleProcess())
    store._parameters = parameters
    return lambda: retract_and_clamp(store, parameters)


def megatron_store(parameters: dict[str, nn.Parameter]) -> Callable[[], None]:
    module = pytest.importorskip("spectral_scale.backends.megatron.store")
    store = module.MegatronStore.__new__(module.MegatronStore)
    store._parameters = parameters
    store._sharded_dims = {name: 0 if name.endswith("1") else None for name in parameters}
    store._tensor = SimpleNamespace(size=lambda: 1)
    return lambda: retract_and_clamp(store, parameters)


def retract_and_clamp(store: Any, parameters: dict[str, nn.Parameter]) -> None:
    store.retract_columns(parameters)
    store.clamp_nonnegative(parameters)


def zero_shards(parameters: dict[str, nn.Parameter]) -> Any:
    """The masters of a rank that keeps all but the first four elements of each factor."""
    fragments = {}
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        fragments[name] = Fragment(
            fqn=name,
            shape=shape,
            start=4,
            numel=parameter.numel() - 4,
            flat=parameter,
            flat_start=4,
        )
    return SimpleNamespace(
        shapes={name: tuple(p.shape) for name, p in parameters.items()},
        fragments=fragments,
        device=torch.device("cpu"),
    )


def zero_retraction(parameters: dict[str, nn.Parameter]) -> Callable[[], None]:
    flat = SimpleNamespace(tensor=next(iter(parameters.values())))
    layout: Any = SimpleNamespace(replicated=False, flats=lambda: [flat])
    shards = zero_shards(parameters)
    shards.members = lambda _: list(parameters)
    directions = Directions(layout, shards, parameters, SingleProcess())
    optimizer: Any = SimpleNamespace(param_groups=[{"params": [flat.tensor]}])
    return lambda: directions.after_step(optimizer)


def zero_norms(parameters: dict[str, nn.Parameter]) -> Callable[[], None]:
    gradients = [p.detach().view(-1) for p in parameters.values()]
    layout = SimpleNamespace(replicated=True)
    store: Any = SimpleNamespace(parameters=parameters, layout=layout)

    def clip() -> None:
        norms = norms_by_kind(store, {"spectral_direction": gradients}, loss_scale=1.0)
        scale(gradients, norms["spectral_direction"])

    return clip


WAYS = [torch_store, fsdp2_store, megatron_store, zero_retraction, zero_norms]


@pytest.mark.parametrize("way", WAYS)
def test_launches_do_not_grow_with_layers(way: Any) -> None:
    assert launches(way, 2) == launches(way, 8)


@pytest.mark.parametrize("way", WAYS[:-1])
def test_the_count_sees_stacks_of_one(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks that hold one matrix each take as many launches as there are matrices."""
    monkeypatch.setattr(stacking, "MAX_ELEMENTS", 1)
    assert launches(way, 8) > 3 * launches(way, 2)


def launches(way: Any, layers: int) -> int:
    act = way(factors(layers))
    with Launches() as seen:
        act()
    return seen.count


@pytest.mark.parametrize("way", [torch_store, fsdp2_store, megatron_store])
def test_every_matrix_has_the_bits_that_it_has_alone(way: Any) -> None:
    parameters = factors(3)
    expected = {}
    for name, parameter in parameters.items():
        lengths = torch.linalg.vector_norm(parameter.detach(), dim=0)
        if way is not torch_store:  # summed over ranks as squares
            lengths = lengths.square().sqrt()
        expected[name] = (parameter.detach() / lengths).clamp_min(0)
    way(parameters)()
    assert all(torch.equal(parameters[name], value) for name, value in expected.items())


def test_fragments_of_columns_become_unit_as_far_as_they_reach() -> None:
    parameters = factors(2)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    zero_retraction(parameters)()
    for name, parameter in parameters.items():
        kept = before[name].view(-1)[3:].view(-1, 3).clone()  # whole rows around the fragment
        kept[0, 0] = 0
        expected = (kept / kept.square().sum(0).sqrt()).view(-1)[1:]
        assert torch.equal(parameter.detach().view(-1)[4:], expected)
        assert torch.equal(parameter.detach().view(-1)[:4], before[name].view(-1)[:4])


@pytest.mark.parametrize("unless", [True, False])
def test_a_flag_on_the_device_leaves_every_bit(unless: bool) -> None:
    parameters = list(factors(2).values())
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        unit_columns(parameters, unless=torch.tensor(unless))
    same = [torch.equal(p, b) for p, b in zip(parameters, before, strict=True)]
    assert all(same) if unless else not any(same)


def test_groups_keep_the_order_that_kinds_give() -> None:
    """Where ranks hold shards of different shapes, kinds of the whole matrices order them alike."""
    shards = [torch.empty(2, 3), torch.empty(1, 3), torch.empty(2, 3), torch.empty(0, 3)]
    assert alike(shards) == [[0, 2], [1], [3]]
    assert alike(shards, ["a", "b", "a", "b"]) == [[0, 2], [1], [3]]
    assert alike(shards[:1] + shards[2:3], ["a", "b"]) == [[0], [1]]


def test_columns_of_zeros_and_empty_shards_stay() -> None:
    values: list[Tensor] = [torch.zeros(4, 2), torch.zeros(0, 2)]
    unit_columns(values)
    assert not values[0].any()
