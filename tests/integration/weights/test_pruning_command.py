"""Pruning of singular values: the curve and the folder agree, and keeping all changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import command

Runs = Callable[[str], Path]
DATA = ("--sequences", "all", "--format", "json")


def test_keeping_all_leaves_perplexity_unchanged(run_of: Runs, exported: Runs) -> None:
    run = run_of("opt")
    curve = command("export", run, "--prune", "1.0", "0.5", "0.1", *DATA).json["curve"]
    whole = command("evaluate", exported("opt"), "--data", valid(run), "--batch-size", 2, *DATA[2:])
    assert curve[0]["loss"] == whole.json["loss"]
    assert curve[0]["energy"] == 1.0 and curve[0]["triplets"] == 12 * 32
    losses = [point["loss"] for point in curve]
    assert losses[2] > losses[0] + 0.01
    assert [point["triplets"] for point in curve] == [12 * 32, 12 * 16, 12 * 3]
    attention, ffn = 8 * 3 * (32 + 32), 4 * 3 * (32 + 128)
    assert curve[2]["elements"] == attention + ffn


def valid(run: Path) -> str:
    lines = (run / "config.yaml").read_text().splitlines()
    return next(line.split(": ")[1] for line in lines if line.startswith("  validation:"))


def test_a_pruned_folder_lies_on_the_curve(run_of: Runs, tmp_path: Path) -> None:
    run, output = run_of("opt"), tmp_path / "pruned"
    words = ("export", run, "--output", output, "--prune", 0.25, 1, "--keep", 0.25)
    ran = command(*words, "--sequences", "all")
    assert ran.code == 0 and "0.25 of the singular values" in ran.out
    assert "| 0.25 (96) |" in ran.out and "| 0.25 (96) |" in (output / "pruning.md").read_text()
    curve = json.loads((output / "pruning.json").read_text())
    found = command("evaluate", output, "--data", valid(run), "--batch-size", 2, *DATA[2:]).json
    assert found["loss"] == pytest.approx(curve[0]["loss"], abs=1e-6)
    weights = load_file(output / "model.safetensors")
    for name in ("self_attn.k_proj", "fc1"):
        weight = weights[f"model.decoder.layers.1.{name}.weight"]
        assert torch.linalg.matrix_rank(weight, rtol=1e-5) == 8
    assert json.loads((output / "spectral_scale.json").read_text())["keep"] == 0.25


def test_full_training_is_pruned_at_the_same_matrices(run_of: Runs) -> None:
    for kind in ("full", "lora", "post_norm"):
        point = command("export", run_of(kind), "--prune", "0.5", *DATA).json["curve"][0]
        assert point["triplets"] == 12 * 16


@pytest.mark.parametrize("fraction", ["0", "1.5", "-1", "nan"])
def test_fractions_outside_are_refused(fraction: str, run_of: Runs, tmp_path: Path) -> None:
    for words in (("--prune", fraction), ("--output", tmp_path / "out", f"--keep={fraction}")):
        if fraction == "-1" and words[0] == "--prune":
            continue  # argparse takes it for an option
        ran = command("export", run_of("opt"), *words)
        assert ran.code == 78 and "(0, 1]" in ran.err


def test_nothing_to_do_is_said(run_of: Runs) -> None:
    ran = command("export", run_of("opt"))
    assert ran.code == 78 and "--output FOLDER" in ran.err
