"""What the README shows, works: its Python runs, its commands parse, its names exist."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spectral_scale import merge
from spectral_scale.cli.main import build_parser
from spectral_scale.config.check import check_config
from spectral_scale.config.load import config_from_dict, load_config
from spectral_scale.config.presets import PRESETS
from spectral_scale.errors import SpectralError
from spectral_scale.testing.distributed import run_distributed

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if w and w[0] == "spectral-scale"]


def small_model() -> Any:
    """A transformers OPT, the same on every rank."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=64, max_position_embeddings=32, word_embed_proj_dim=32, dropout=0.0,
        )
    )  # fmt: skip


def test_own_loop_runs_and_learns() -> None:
    """The example of under ten lines, on a small transformers OPT."""
    model = small_model()
    tokens = torch.randint(4, 64, (4, 16))
    batches = [{"input_ids": tokens, "labels": tokens}] * 12
    before = model(**batches[0]).loss.item()
    source = blocks("python")[0]
    statements = source.split("convert(model", 1)[1].strip().splitlines()
    assert len(statements) <= 10
    namespace = {"model": model, "batches": batches}
    exec(compile(source.replace("=200)", "=5)"), "README.md", "exec"), namespace)
    assert model(**batches[0]).loss.item() < before - 0.1
    assert namespace["controller"].applied_steps == 12
    assert all(type(m).__name__ != "SpectralLinear" for m in model.modules())


def own_loop(source: str) -> list[float]:
    """Set up as `source` does, then the loop of the first example; the losses."""
    import torch.distributed as dist

    from spectral_scale.parallel.group import join_group, leave_group

    join_group(int(os.environ.get("WORLD_SIZE", "1")), torch.device("cpu"))
    model = small_model()
    model.eval()
    namespace: dict[str, Any] = {"model": model}
    exec(
        compile(source.replace("=200)", "=5, iterations_per_round=2)"), "README.md", "exec"),
        namespace,
    )
    losses = []
    for step in range(12):
        tokens = torch.randint(4, 64, (4, 16), generator=torch.Generator().manual_seed(step % 2))
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        namespace["optimizer"].step()
        namespace["optimizer"].zero_grad()
        namespace["controller"].after_step()
    if dist.is_initialized():
        with pytest.raises(SpectralError, match="its weights are sharded"):
            merge(model)
    leave_group()
    return [loss.item() for loss in losses]


def test_own_loop_under_fully_shard() -> None:
    """Two ranks that see the same batch train as one process does, swaps and a re-SVD included."""
    others = ("DeepSpeed", "deepspeed", "Trainer")
    alone, sharded = (b for b in blocks("python") if not any(name in b for name in others))
    alone = alone.split("for batch")[0]
    (expected,) = run_distributed(own_loop, 1, alone)
    for losses in run_distributed(own_loop, 2, sharded):
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5
    assert expected[-1] < expected[0] - 0.1


def test_commands_parse() -> None:
    parser = build_parser()
    found = commands()
    assert len(found) >= 8
    for words in found:
        arguments, rest = parser.parse_known_args(words[1:])
        if rest:
            assert arguments.command in ("train", "finetune"), words
            load_config([], rest)


def test_configuration_is_accepted() -> None:
    (text,) = blocks("yaml")
    config = config_from_dict(yaml.safe_load(text), "README.md")
    check_config(config, world_size=2)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_listed(name: str) -> None:
    assert f"`{name}`" in README


def test_files_and_links_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"(?:\./)?((?:launch|slurm|tests)/[\w/.]+)", README):
        assert (ROOT / path).exists(), path
