"""Compiled blocks compute what plain ones do, also after their triplets were swapped in place.

One test generates code as a run does. In the others graphs are captured and differentiated as for
real, and only the slow code generation is left out.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import ModelConfig, SpectralConfig
from spectral_scale.methods.sst.controller import SpectralController
from spectral_scale.methods.sst.layer import convert
from spectral_scale.models.build import build_model, compile_blocks, materialise
from spectral_scale.models.weights import KeyedWeights
from spectral_scale.optim.groups import param_groups

pytestmark = pytest.mark.slow

TINY = Architecture(
    family="opt", hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, ffn_size=32,
    vocab_size=40, max_positions=32, embedding_size=16, tied_embeddings=True,
)  # fmt: skip


def train(steps: int, *, compiled: bool) -> list[float]:
    """Losses of a few SST steps with a swap after every second one."""
    config = SpectralConfig(spectral_rank=4, steps_per_iteration=2, iteration_warmup_steps=0)
    model = build_model(TINY, ModelConfig(), eos_token_id=0)
    layers = convert(model, config, frozen_dtype=torch.float32)
    materialise(model, device=torch.device("cpu"), dtype=torch.float32)
    if compiled:
        compile_blocks(model)
    weights = KeyedWeights(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(name.startswith(f"{layer}.") for layer in layers) or name.endswith("bias"):
                parameter.copy_(weights.get(name, tuple(parameter.shape)))
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, spectral_lr=1e-2))
    controller = SpectralController(
        model,
        optimizer,
        config,
        weights=lambda name: weights.get(
            f"{name}.weight", (layers[name].out_features, layers[name].in_features)
        ),
    )
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.after_step()
        losses.append(loss.item())
    return losses


def test_losses_equal_those_of_plain_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    compile_really = torch.compile

    def capture(forward: Any) -> Any:
        compiled.append(forward.__self__)
        return compile_really(forward, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", capture)
    plain = train(5, compiled=False)
    assert compiled == []
    found = train(5, compiled=True)
    assert [type(block).__name__ for block in compiled] == ["OPTDecoderLayer"] * 2
    assert found == pytest.approx(plain, abs=1e-5)
    assert plain[-1] < plain[0]


BUDGET_SECONDS = 180.0
"""Processor time of the compiled run, C++ compilers included: twice what it takes."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's code generator needs g++")
def test_generated_code_trains_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own code generator, from an empty cache: nothing is generated again after a swap."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    plain = train(5, compiled=False)
    torch._dynamo.reset()
    counters.clear()
    started = sum(os.times()[:4])
    found = train(5, compiled=True)
    assert sum(os.times()[:4]) - started < BUDGET_SECONDS
    assert found == pytest.approx(plain, abs=1e-5)
    assert counters["stats"]["unique_graphs"] == 1  # of both blocks, before and after two swaps
    assert list(tmp_path.rglob("*.so")), "nothing was generated"
