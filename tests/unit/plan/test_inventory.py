"""Two blocks that are built and repeated are the whole model; its FLOPs are those of the MFU."""

from types import SimpleNamespace

import pytest
import torch

from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import ResolvedRun, resolve
from spectral_scale.engine.measure import flops_per_token
from spectral_scale.engine.methods import convert_model
from spectral_scale.metrics.flops import model_flops_per_token
from spectral_scale.models.build import build_model
from spectral_scale.parallel.table import parameter_table
from spectral_scale.plan import inventory as module
from spectral_scale.plan.inventory import take_inventory

METHODS = {
    "full": ["--spectral.method=full"],
    "sst": ["--spectral.method=sst"],
    "factored": ["--spectral.storage=factored"],
    "tangent": ["--spectral.form=tangent"],
    "lora": ["--spectral.method=lora"],
    "galore": ["--spectral.method=galore"],
    "frod": ["--spectral.method=frod"],
    "targets": ["--spectral.targets=[q_proj]"],
}


def run_of(*words: str, model: str = "opt-tiny") -> ResolvedRun:
    return resolve(load_config([], [f"--model.name={model}", *words]).config, world_size=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["opt-tiny", "llama-60m"])
def test_repeated_blocks_are_those_that_are_built(
    method: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(*METHODS[method], model=model)
    repeated = take_inventory(run.config, run.architecture)
    monkeypatch.setattr(module, "BUILT_BLOCKS", run.architecture.num_layers)
    built = take_inventory(run.config, run.architecture)
    assert repeated.items == built.items
    assert repeated.matrices == built.matrices
    assert len({item.fqn for item in built.items}) == len(built.items)


def test_one_block_is_not_repeated() -> None:
    run = run_of("--model.num_layers=1")
    found = take_inventory(run.config, run.architecture)
    assert {item.block for item in found.items} == {None, 0}


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_of_a_run(method: str) -> None:
    run = run_of(*METHODS[method])
    model = build_model(run.architecture, run.config.model, eos_token_id=None)
    convert_model(model, run.config.spectral, torch.float32)
    training = SimpleNamespace(
        architecture=run.architecture, table=parameter_table(model), config=run.config
    )
    found = take_inventory(run.config, run.architecture)
    a = run.architecture
    assert flops_per_token(training) == model_flops_per_token(  # type: ignore[arg-type]
        found.products,
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        sequence_length=run.config.model.sequence_length,
    )


def test_sums_and_owners_are_kept_and_right() -> None:
    run = run_of()
    found = take_inventory(run.config, run.architecture)
    trained = sum(item.numel for item in found.items if item.trainable)
    assert found.numel(trainable=True) == trained
    inside = found.numel(trainable=True, in_blocks=True)
    assert inside + found.numel(trainable=True, in_blocks=False) == trained
    assert found.owners(3) is found.owners(3)
    assert set(found.owners(3).values()) == {0, 1, 2}
