"""The tensor-parallel forms of the methods' layers, on a group of one rank."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_scale.config.methods import METHOD_SPECS
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.engine.methods import METHODS
from spectral_scale.errors import ConfigError
from spectral_scale.methods.layer import FactoredLinear, factored_layers, in_product_dtype
from spectral_scale.methods.sst.controller import SpectralController
from spectral_scale.methods.sst.layer import convert
from spectral_scale.methods.tensor_parallel import CommonInput, ShardedForward
from spectral_scale.methods.tensor_parallel_context import Sharding, TensorParallelContext

CONVERTING = [name for name, spec in METHOD_SPECS.items() if spec.converts]


def alone(sharding: Sharding) -> TensorParallelContext:
    """The only rank of its group: its shard is the whole, and sums have one term."""
    return TensorParallelContext(
        sharding=sharding,
        index=0,
        start_sum=lambda partial: partial.clone,
        copy_to_region=CommonInput(lambda x: x),
        reduce_from_region=lambda x: x,
        local=lambda parameter: parameter,
    )


@pytest.mark.parametrize("name", CONVERTING)
def test_a_method_has_the_form_that_its_specification_promises(name: str) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(8, 8)])
    settings: Any = {"method": name, "spectral_rank": 2, "sparsity": 0.5}
    METHODS[name].convert(model, SpectralConfig(**settings), torch.float32)
    (layer,) = factored_layers(model).values()
    if METHOD_SPECS[name].tensor_parallel:
        assert callable(layer.sharded_product(alone("column_parallel")))
    else:
        with pytest.raises(ConfigError, match=r"no tensor-parallel form; use another spectral"):
            ShardedForward(layer, alone("column_parallel"))


def outputs_and_gradients(layer: FactoredLinear, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.sum().backward()
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y, *(t.grad for t in (x, *trained) if t.grad is not None)]


@pytest.mark.parametrize("sharding", ["column_parallel", "row_parallel"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_one_rank_computes_the_whole_layer(
    stack: nn.Module, sharding: Sharding, autocast: bool
) -> None:
    stack.float()
    config = SpectralConfig(spectral_rank=2)
    convert(stack, config)
    SpectralController(stack, None, config, seed=0)
    layer = stack.get_submodule("layers.0")
    assert isinstance(layer, FactoredLinear)
    x = torch.randn(3, 5, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = outputs_and_gradients(layer, x)
        layer.sharded_forward = ShardedForward(layer, alone(sharding))
        found = outputs_and_gradients(layer, x)
        assert found[0].dtype == in_product_dtype(x).dtype
    for one, other in zip(found, expected, strict=True):
        # Row-parallel layers add the bias to the rounded sum over ranks.
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.01 if autocast else 1e-6)
