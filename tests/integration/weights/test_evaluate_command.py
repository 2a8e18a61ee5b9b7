"""`evaluate`: the number training logged comes back, and other tokens are refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import STEPS, command

from spectral_scale.metrics.history import read_metrics

Runs = Callable[[str], Path]
JSON = ("--format", "json")


def logged(run: Path) -> float:
    return [line["validation/loss"] for line in read_metrics(run) if "validation/loss" in line][-1]


@pytest.mark.parametrize(
    "kind", ["opt", "post_norm", "llama", "bf16", "fp64", "lora", "full", "tangent"]
)
def test_a_run_gives_exactly_the_loss_it_logged(kind: str, run_of: Runs) -> None:
    found = command("evaluate", run_of(kind), "--sequences", 8, *JSON).json
    assert found["loss"] == logged(run_of(kind))
    assert found["perplexity"] == math.exp(found["loss"])
    assert (found["step"], found["sequences"], found["sequence_length"]) == (STEPS, 8, 32)
    assert found["tokens"] == 8 * 32
    assert found["precision"] == (kind if kind in ("bf16", "fp64") else "fp32")


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_an_exported_folder_gives_the_run_s_perplexity(
    kind: str, run_of: Runs, exported: Runs, corpus: Path
) -> None:
    words = ("--data", corpus / "train", *JSON)
    run, folder = (command("evaluate", f(kind), *words).json for f in (run_of, exported))
    assert folder["loss"] == pytest.approx(run["loss"], abs=1e-6)
    for key in ("tokens", "sequences", "sequence_length", "step"):
        assert folder[key] == run[key]
    assert folder["tokenizer"] == "same"


def test_everything_is_read_unless_told_otherwise(run_of: Runs, corpus: Path) -> None:
    index = json.loads((corpus / "valid" / "index.json").read_text())
    found = command("evaluate", run_of("opt"), *JSON).json
    assert found["tokens"] == index["num_tokens"] - 1
    short = command("evaluate", run_of("opt"), "--sequence-length", 16, *JSON).json
    assert short["tokens"] == found["tokens"] and short["loss"] != found["loss"]
    bf16 = command("evaluate", run_of("opt"), "--precision", "bf16", *JSON).json
    assert 0 < abs(bf16["loss"] - found["loss"]) < 0.02


def test_a_double_precision_run_can_be_measured_in_single(run_of: Runs) -> None:
    words = ("evaluate", run_of("fp64"), "--sequences", 8, *JSON, "--precision")
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 0.02)):
        found = command(*words, precision).json
        assert 0 < abs(found["loss"] - logged(run_of("fp64"))) < tolerance
        assert found["precision"] == precision


def test_text_output_names_what_was_measured(run_of: Runs, corpus: Path) -> None:
    ran = command("evaluate", run_of("opt"), "--sequences", 8)
    assert ran.code == 0
    assert f"at step {STEPS} on {corpus / 'valid'}" in ran.out
    assert f"loss {logged(run_of('opt')):.6f}" in ran.out


def test_data_of_another_tokenizer_is_refused_by_both_names(
    run_of: Runs, exported: Runs, other_corpus: Path
) -> None:
    for target in (run_of("opt"), exported("opt")):
        ran = command("evaluate", target, "--data", other_corpus)
        assert ran.code == 78
        assert str(target) in ran.err and str(other_corpus) in ran.err
        assert "tokenizer" in ran.err


def test_a_rewritten_tokenizer_file_is_recognised(folder_copy: Path, corpus: Path) -> None:
    file = folder_copy / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))  # other bytes, the same tokenizer
    ran = command("evaluate", folder_copy, "--data", corpus / "valid", "--sequences", 2, *JSON)
    assert ran.json["tokenizer"] == "same"
    changed = json.loads(file.read_text())
    changed["model"]["merges"].pop()
    file.write_text(json.dumps(changed))
    assert command("evaluate", folder_copy, "--data", corpus / "valid").code == 78


def test_a_folder_without_a_tokenizer_is_measured_and_said(folder_copy: Path, corpus: Path) -> None:
    for file in folder_copy.glob("tokenizer*"):
        file.unlink()
    ran = command("evaluate", folder_copy, "--data", corpus / "valid", "--sequences", 2)
    assert ran.code == 0 and "no tokenizer that could be checked" in ran.out


def test_a_folder_needs_data(exported: Runs) -> None:
    ran = command("evaluate", exported("opt"))
    assert ran.code == 78 and "--data FOLDER" in ran.err


def test_too_long_sequences_and_small_vocabularies_are_refused(
    folder_copy: Path, corpus: Path, run_of: Runs
) -> None:
    ran = command("evaluate", run_of("opt"), "--sequence-length", 2000)
    assert ran.code == 78 and "1024 positions" in ran.err
    for file in folder_copy.glob("tokenizer*"):
        file.unlink()
    index = Path(shutil.copytree(corpus / "valid", folder_copy / "data")) / "index.json"
    index.write_text(index.read_text().replace('"vocab_size": 512', '"vocab_size": 9999'))
    ran = command("evaluate", folder_copy, "--data", folder_copy / "data")
    assert ran.code == 78 and "vocabulary" in ran.err


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    ran = command("evaluate", tmp_path, "--data", tmp_path)
    assert ran.code == 78 and "neither a run folder nor a checkpoint" in ran.err
