"""The documented ways to start a DeepSpeed run, and the README's loop around an engine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_scale.cluster.rendezvous import free_port
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run_yaml(corpus: Path, folder: Path, **changes: Any) -> Path:
    """A run as a file: 4 steps of the tiny model."""
    from spectral_scale.supervision.run_folder import write_config

    changes = {"train__steps": 4, "train__global_batch_size": 8} | changes
    folder.mkdir(parents=True)
    write_config(folder, tiny_config(corpus, folder / "run", **changes))
    return folder / "config.yaml"


def start(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["DS_ACCELERATOR"] = "cpu"
    return subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_the_deepspeed_launcher(corpus: Path, tmp_path: Path) -> None:
    """Flags before and after ours, its --local_rank, the JSON's stage, the resolved JSON saved."""
    config = run_yaml(corpus, tmp_path / "a")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    where = ["--num_accelerators", "2", "--master_port", str(free_port())]
    flags = ["--deepspeed", "--deepspeed_config", "ds_configs/zero3.json"]
    done = start(
        *(sys.executable, launcher, *where, "launch/pretrain.py", "--config", str(config)), *flags
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "a" / "run" / "ds_config.json").read_text())
    assert found["zero_optimization"]["stage"] == 3
    assert found["gradient_accumulation_steps"] == 2
    assert "auto" not in json.dumps(found)
    assert len(losses(tmp_path / "a" / "run")) == 4


def test_torchrun(corpus: Path, tmp_path: Path) -> None:
    """Without a JSON: the stage from the run's own keys; dropout and recomputation on."""
    changes = {"model__dropout": 0.1, "model__activation_checkpointing": True}
    config = run_yaml(corpus, tmp_path / "a", **changes)
    where = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    flags = ["--parallel.backend", "deepspeed", "--parallel.zero_stage", "3"]
    done = start(sys.executable, *where, "launch/pretrain.py", "--config", str(config), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "a" / "run" / "ds_config.json").read_text())
    assert found["zero_optimization"]["stage"] == 3
    assert len(losses(tmp_path / "a" / "run")) == 4


def test_fp16_is_refused_by_name_where_there_is_none(corpus: Path, tmp_path: Path) -> None:
    """DeepSpeed asks the processor; tests elsewhere tell it that torch can do it on any."""
    ask = "from deepspeed.accelerator import get_accelerator as a; print(a().is_fp16_supported())"
    if "True" in start(sys.executable, "-c", ask).stdout:
        pytest.skip("this processor has fp16 instructions")
    config = run_yaml(corpus, tmp_path / "a", train__precision="fp16", parallel__zero_stage=2,
                      parallel__backend="deepspeed")  # fmt: skip
    done = start(sys.executable, "launch/pretrain.py", "--config", str(config))
    assert done.returncode == 78, done.stdout + done.stderr
    assert "train.precision=fp16: DeepSpeed does not support it on this cpu" in done.stderr


def test_one_process_with_a_file_behind_the_flag(corpus: Path, tmp_path: Path) -> None:
    """`--deepspeed FILE`, as transformers' Trainer has it, and every spelling of the rank."""
    config = run_yaml(corpus, tmp_path / "a")
    settings = json.loads((ROOT / "ds_configs" / "zero2_offload.json").read_text())
    settings["zero_force_ds_cpu_optimizer"] = False  # else it is compiled first, for minutes
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    file = str(tmp_path / "ds.json")
    flags = ["--deepspeed", file, "--local_rank=0", "--local-rank", "0"]
    done = start(sys.executable, "launch/pretrain.py", "--config", str(config), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "a" / "run" / "ds_config.json").read_text())
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_a_contradiction_ends_with_78_before_anything_is_written(
    corpus: Path, tmp_path: Path
) -> None:
    config = run_yaml(corpus, tmp_path / "a")
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"train_batch_size": 9}')
    flags = ["--deepspeed", "--deepspeed_config", str(wrong)]
    done = start(sys.executable, "launch/pretrain.py", "--config", str(config), *flags)
    assert done.returncode == 78
    assert "train_batch_size=9 differs from 8, given by train.global_batch_size" in done.stderr
    assert not (tmp_path / "a" / "run").exists()


def readme_loop(source: str) -> dict[str, Any]:
    """Run the README's example on a small transformers OPT; losses and what was counted."""
    from transformers import OPTConfig, OPTForCausalLM

    from spectral_scale.parallel.group import join_group, leave_group

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # Else it is compiled first, for minutes; gloo sums as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    join_group(int(os.environ["WORLD_SIZE"]), torch.device("cpu"))
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=64, max_position_embeddings=32, word_embed_proj_dim=32, dropout=0.0,
        )
    )  # fmt: skip
    found: list[float] = []
    model.register_forward_hook(lambda *a: found.append(a[-1].loss.item()))
    batches = []
    for step in range(12):
        tokens = torch.randint(4, 64, (4, 16), generator=torch.Generator().manual_seed(step % 2))
        batches.append({"input_ids": tokens, "labels": tokens})
    namespace: dict[str, Any] = {"model": model, "batches": batches}
    source = source.replace("=200)", "=5, iterations_per_round=2)")
    exec(compile(source, "README.md", "exec"), namespace)
    leave_group()
    return {"losses": found, "applied": namespace["controller"].applied_steps}


@pytest.mark.parametrize("stage", [2, 3])
def test_the_readme_s_loop_around_an_engine(stage: int) -> None:
    """It learns across swaps and a re-SVD, and no rank goes its own way."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (source,) = (block for block in blocks if "deepspeed.initialize" in block)
    source = source.replace('"stage": 2', f'"stage": {stage}')
    first, second = run_distributed(readme_loop, 2, source, timeout_seconds=120)
    assert first == second
    assert first["applied"] == 12
    assert first["losses"][-1] < first["losses"][0] - 0.1
