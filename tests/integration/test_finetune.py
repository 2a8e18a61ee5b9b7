"""`spectral-scale finetune` as a user runs it: from a folder's weights to an adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_scale import load_adapter, merge
from spectral_scale.cli.main import main
from spectral_scale.metrics.history import read_metrics
from spectral_scale.models.folder import load_folder
from spectral_scale.testing.tiny import tiny_words

FROD: dict[str, Any] = {
    "spectral__method": "frod",
    "spectral__sparsity": 0.05,
    "spectral__targets": "[q_proj,v_proj]",
    "spectral__train_dense": False,
    "optimizer__spectral_lr": 0.01,
    "train__steps": 8,
    "train__eval_interval": 4,
    "data__examples": 16,
}


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page takes longer than training."""
    monkeypatch.setattr("spectral_scale.cli.train._write_report", lambda run_dir: None)


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model to start from."""
    root = tmp_path_factory.mktemp("base")
    changes = {"spectral__method": "full", "train__steps": 4, "optimizer__lr": 0.01}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spectral_scale.cli.train._write_report", lambda run_dir: None)
        assert main(["train", *tiny_words(corpus, root / "run", **changes)]) == 0
    assert main(["export", str(root / "run"), "--output", str(root / "base")]) == 0
    return root / "base"


def finetune(corpus: Path, run_dir: Path, folder: Path, **changes: Any) -> int:
    shapes = ("model.hidden_size", "model.num_layers", "model.num_heads")
    words = [w for w in tiny_words(corpus, run_dir, **changes) if not w[2:].startswith(shapes)]
    return main(["finetune", *words, "--model.name=null", f"--model.path={folder}"])


@pytest.fixture(scope="module")
def finished(corpus: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete FRoD run."""
    run_dir = tmp_path_factory.mktemp("frod") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spectral_scale.cli.train._write_report", lambda run_dir: None)
        assert finetune(corpus, run_dir, folder, **FROD) == 0
    return run_dir


def curve(run_dir: Path) -> dict[int, float]:
    return {
        m["step"]: m["validation/loss"] for m in read_metrics(run_dir) if "validation/loss" in m
    }


def test_it_starts_where_the_folder_ended_and_goes_on(finished: Path, folder: Path) -> None:
    before = [
        json.loads(line)
        for line in (folder.parent / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    last = [line["validation/loss"] for line in before if "validation/loss" in line][-1]
    found = curve(finished)
    assert found[0] == pytest.approx(last, abs=1e-5)
    assert found[8] < found[0]
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["parameters_trained"] == 4 * (32 + 51)
    epochs = [m["train/epoch"] for m in read_metrics(finished) if "train/epoch" in m]
    assert epochs[-1] == 8 * 12 / 16


def test_the_adapter_alone_gives_the_exported_model(
    finished: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, dense = tmp_path / "adapter", tmp_path / "dense"
    assert main(["export", str(finished), "--adapter", "--output", str(adapter)]) == 0
    assert "an adapter of 332 trained coefficients" in capsys.readouterr().out
    assert main(["export", str(finished), "--output", str(dense)]) == 0
    cpu = torch.device("cpu")
    model = load_folder(folder, device=cpu, dtype=torch.float32)
    expected = load_folder(dense, device=cpu, dtype=torch.float32)
    assert len(load_adapter(model, adapter)) == merge(model) == 4
    weights = expected.state_dict()
    changed = 0
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name])
        base = load_folder(folder, device=cpu, dtype=torch.float32).state_dict()[name]
        changed += not torch.equal(tensor, base)
    assert changed == 4


@pytest.mark.parametrize("method", ["full", "lora", "sst"])
def test_other_methods_and_the_filter(
    method: str, corpus: Path, folder: Path, tmp_path: Path
) -> None:
    """Each trains its own kind of parameters from the same weights."""
    changes: dict[str, Any] = {"spectral__method": method, "train__steps": 2}
    changes |= {"optimizer__lr": 3e-3, "spectral__train_dense": method == "full"}
    nodes = "block_gains" if method == "lora" else "layers"
    changes |= {"filter__kind": "rational", "filter__nodes": nodes}
    assert finetune(corpus, tmp_path / "run", folder, **changes) == 0
    norms = {k for m in read_metrics(tmp_path / "run") for k in m if "grad_norm/" in k}
    frozen = method != "full"
    assert ("train/grad_norm/dense" not in norms) == frozen


def test_a_changed_base_is_refused(
    corpus: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints leave frozen weights out, so those they belong to must be there, unchanged."""
    import shutil

    base = tmp_path / "base"
    shutil.copytree(folder, base)
    run_dir = tmp_path / "run"
    assert finetune(corpus, run_dir, base, **(FROD | {"train__steps": 2})) == 0
    weights = base / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert finetune(corpus, run_dir, base, **(FROD | {"train__steps": 4})) == 78
    assert "model.weights: the checkpoint has" in capsys.readouterr().err
    assert main(["evaluate", str(run_dir)]) != 0
    assert "model.weights" in capsys.readouterr().err


def test_what_finetune_cannot_do(
    corpus: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", *tiny_words(corpus, tmp_path / "run")]) == 78
    assert "model.path is not given" in capsys.readouterr().err
    assert main(["export", str(finished), "--adapter"]) == 78
    assert "--adapter needs --output FOLDER" in capsys.readouterr().err


def test_runs_without_an_adapter(
    corpus: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "adapter"
    changes = FROD | {"spectral__train_dense": True, "train__steps": 1}
    assert finetune(corpus, run_dir, folder, **changes) == 0
    assert main(["export", str(run_dir), "--adapter", "--output", str(output)]) == 78
    assert "also trained embeddings, norms and biases" in capsys.readouterr().err
    lora = folder.parent / "run"
    assert main(["export", str(lora), "--adapter", "--output", str(output)]) == 78
    assert "spectral.method=full, and adapters are FRoD's" in capsys.readouterr().err
    assert not output.exists()
