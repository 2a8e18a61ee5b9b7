"""`export`: what transformers loads is the model that trained, or there is no folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import STEPS, command
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectral_scale.artifacts import export as engine_export
from spectral_scale.config.load import load_config
from spectral_scale.methods.sst.layer import SpectralLinear
from spectral_scale.parallel.rank_info import RankInfo
from spectral_scale.testing.tiny import build_from_config

Runs = Callable[[str], Path]


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def resumed_logits(run_dir: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the model that a resumed training would continue with."""
    run = build_from_config(load_config([run_dir / "config.yaml"]).config, RankInfo())
    assert run.start_step == STEPS
    with torch.no_grad():
        return run.model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("kind", ["opt", "post_norm", "llama", "fp64", "lora", "full", "tangent"])
def test_the_folder_gives_the_logits_of_the_model_that_trained(
    kind: str, run_of: Runs, exported: Runs
) -> None:
    ids = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(3))
    expected = resumed_logits(run_of(kind), ids)
    with torch.no_grad():
        found = load(exported(kind))(input_ids=ids).logits
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_tied_embeddings_are_stored_once(exported: Runs) -> None:
    for kind, tied in (("opt", True), ("post_norm", True), ("llama", False)):
        folder = exported(kind)
        names = load_file(folder / "model.safetensors").keys()
        assert ("lm_head.weight" in names) is not tied
        config = json.loads((folder / "config.json").read_text())
        assert config["tie_word_embeddings"] is tied
        model = load(folder)
        shared = model.lm_head.weight is model.get_input_embeddings().weight
        assert shared is tied


def test_projections_and_post_norm_survive(exported: Runs) -> None:
    model = load(exported("post_norm"))
    assert model.model.decoder.project_in.weight.shape == (32, 512)
    assert model.model.decoder.final_layer_norm is None
    assert not model.config.do_layer_norm_before


def test_llama_keeps_its_own_configuration(llama_folder: Path, exported: Runs) -> None:
    before, after = (load(f).config for f in (llama_folder, exported("llama")))
    for key in ("rope_parameters", "num_key_value_heads", "rms_norm_eps", "eos_token_id"):
        assert getattr(after, key) == getattr(before, key), key


def test_the_folder_is_ready_to_use(corpus: Path, exported: Runs) -> None:
    folder = exported("opt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = corpus / "train" / "tokenizer" / "tokenizer.json"
    assert (folder / "tokenizer.json").read_bytes() == original.read_bytes()
    model = load(folder)
    assert model.config.use_cache and model.config.pad_token_id is None
    assert model.config.eos_token_id == tokenizer.eos_token_id
    made = model.generate(**tokenizer("def main", return_tensors="pt"), max_new_tokens=3)
    assert made.shape[1] > 1
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {(folder / "config.json").stat().st_mode & 0o777}
    record = json.loads((folder / "spectral_scale.json").read_text())
    assert record["step"] == STEPS and record["sequence_length"] == 32


def test_a_bf16_run_is_compared_without_its_rounding(run_of: Runs, exported: Runs) -> None:
    """Frozen weights were bf16 in training; the folder holds the unrounded ones."""
    weights = load_file(exported("bf16") / "model.safetensors")
    fc1 = weights["model.decoder.layers.0.fc1.weight"]
    assert fc1.dtype == torch.float32
    assert not torch.equal(fc1, fc1.bfloat16().float())


def test_bf16_weights_are_rounded_once_and_said_to_be(run_of: Runs, tmp_path: Path) -> None:
    output = tmp_path / "bf16"
    ran = command("export", run_of("llama"), "--output", output, "--dtype", "bf16")
    assert ran.code == 0 and "bf16 weights" in ran.out
    weights = load_file(output / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    record = json.loads((output / "spectral_scale.json").read_text())["logits"]
    assert record["stored"]["max_abs"] < 1e-5 < record["trained"]["max_abs"]
    assert load(output).dtype == torch.bfloat16


def test_one_checkpoint_or_the_newest(run_of: Runs, tmp_path: Path) -> None:
    older = run_of("opt") / "checkpoints" / f"step_{STEPS - 1:08d}"
    found = command("export", older, "--output", tmp_path / "older", "--format", "json").json
    assert found["step"] == STEPS - 1
    found = command("export", run_of("opt"), "--output", tmp_path / "new", "--format", "json").json
    assert found["step"] == STEPS and found["merged"] == 12
    assert found["trained"]["max_abs"] < 1e-5


def test_a_damaged_newest_checkpoint_is_passed_over(opt_copy: Path, tmp_path: Path) -> None:
    newest = opt_copy / "checkpoints" / f"step_{STEPS:08d}"
    damage(next(newest.glob("*.safetensors")))
    found = command("export", opt_copy, "--output", tmp_path / "a", "--format", "json").json
    assert found["step"] == STEPS - 1
    ran = command("export", newest, "--output", tmp_path / "b")
    assert ran.code == 1 and "sha256" in ran.err
    assert not (tmp_path / "b").exists()


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 0xFF
    file.write_bytes(data)


def test_a_checkpoint_of_another_run_is_refused(
    opt_copy: Path, run_of: Runs, tmp_path: Path
) -> None:
    shutil.rmtree(opt_copy / "checkpoints")
    shutil.copytree(run_of("post_norm") / "checkpoints", opt_copy / "checkpoints")
    ran = command("export", opt_copy, "--output", tmp_path / "out")
    assert ran.code == 1
    assert "model.pre_norm: the checkpoint has False, config.yaml True" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["nothing there", "empty", "file"])
def test_a_foreign_target_is_refused(what: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if what == "empty":
        target.mkdir()
    if what == "file":
        target.write_text("no")
    ran = command("export", target, "--output", tmp_path / "out")
    assert ran.code == 78 and "run folder" in ran.err


def test_a_run_without_checkpoints_is_refused(opt_copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(opt_copy / "checkpoints")
    ran = command("export", opt_copy, "--output", tmp_path / "out")
    assert ran.code == 1 and "no checkpoint yet" in ran.err


def test_a_filled_output_is_left_alone(run_of: Runs, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("kept")
    ran = command("export", run_of("opt"), "--output", output)
    assert ran.code == 78 and "not empty (it has 'precious')" in ran.err
    assert [path.name for path in output.iterdir()] == ["precious"]
    (output / "precious").unlink()
    assert command("export", run_of("opt"), "--output", output).code == 0


def test_a_weight_that_was_written_wrong_fails(
    run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken on purpose: one matrix is scaled by 1.01 on its way to the disk."""

    def write_wrong(model: Any, folder: Path, **options: Any) -> None:
        right(model, folder, **options)
        file = folder / "model.safetensors"
        weights = load_file(file)
        weights["model.decoder.layers.1.fc2.weight"] *= 1.01
        save_file(weights, file, metadata={"format": "pt"})

    right = engine_export.write_model
    monkeypatch.setattr(engine_export, "write_model", write_wrong)
    ran = command("export", run_of("opt"), "--output", tmp_path / "out")
    assert ran.code == 1 and "the folder is not the model that was written" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_forgets_the_trained_triplets_fails(
    run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken on purpose: only the frozen part is merged."""
    monkeypatch.setattr(
        SpectralLinear, "effective_weight", lambda layer: layer.residual.detach().clone()
    )
    ran = command("export", run_of("opt"), "--output", tmp_path / "out")
    assert ran.code == 1 and "the merged model is not the trained one" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_weight_fails(
    run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_less(model: Any, folder: Path, **options: Any) -> None:
        right(model, folder, **options)
        file = folder / "model.safetensors"
        weights = load_file(file)
        del weights["model.decoder.layers.1.fc2.bias"]
        save_file(weights, file, metadata={"format": "pt"})

    right = engine_export.write_model
    monkeypatch.setattr(engine_export, "write_model", write_less)
    ran = command("export", run_of("opt"), "--output", tmp_path / "out")
    assert ran.code == 78 and "layers.1.fc2.bias" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_without_its_data_the_error_says_what_to_do(
    opt_copy: Path, corpus: Path, other_corpus: Path, tmp_path: Path
) -> None:
    config = opt_copy / "config.yaml"
    config.write_text(config.read_text().replace(str(corpus), str(tmp_path / "gone")))
    ran = command("export", opt_copy, "--output", tmp_path / "out")
    assert ran.code == 78
    assert str(tmp_path / "gone" / "valid") in ran.err and "--data FOLDER" in ran.err
    ran = command("export", opt_copy, "--output", tmp_path / "out", "--data", other_corpus)
    assert ran.code == 78 and str(opt_copy) in ran.err and str(other_corpus) in ran.err
    ran = command("export", opt_copy, "--output", tmp_path / "out", "--data", corpus / "train")
    assert ran.code == 0 and (tmp_path / "out" / "tokenizer.json").exists()
    ran = command("export", opt_copy, "--output", tmp_path / "bare", "--no-tokenizer")
    assert ran.code == 0 and "random token ids" in ran.out
    assert not (tmp_path / "bare" / "tokenizer.json").exists()
    ran = command("export", opt_copy, "--prune", "0.5", "--no-tokenizer")
    assert ran.code == 78 and "needs data" in ran.err


def test_a_tokenizer_changed_after_the_run_is_refused(
    opt_copy: Path, corpus: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(corpus / "valid", tmp_path / "valid"))
    tokenizer = data / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    ran = command("export", opt_copy, "--output", tmp_path / "out", "--data", data)
    assert ran.code == 78 and "was changed after" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_launcher_of_several_processes_is_refused(
    run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = command("export", run_of("opt"), "--output", tmp_path / "out")
    assert ran.code == 78 and "one process" in ran.err
