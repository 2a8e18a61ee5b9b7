"""Whatever is wrong is said in one clear error, by exit code, and nothing that was there is lost.

A configuration that cannot run ends with 78 before anything is written.
"""

import contextlib
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spectral_scale.checkpoint.lock import RunLock
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.cli.main import main
from spectral_scale.data.loader import TrainLoader
from spectral_scale.data.prepare import prepare
from spectral_scale.data.tokens import open_tokens
from spectral_scale.metrics.history import read_metrics
from spectral_scale.testing.tiny import tiny_words

CONFIGURATION = 78
TINY_SHAPE = ("model__name", "model__hidden_size", "model__num_layers", "model__num_heads")
SHORT = {"train__steps": 4, "checkpoint__interval": 4}
LONGER = {"train__steps": 8, "checkpoint__interval": 4}


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering takes longer than training."""
    monkeypatch.setattr("spectral_scale.cli.train._write_report", lambda run_dir: None)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, but for the log and the lock, which only say that somebody tried."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock" and file.parent.name != "logs"
    }


def losses(run_dir: Path) -> dict[int, float]:
    return {m["step"]: m["train/loss"] for m in read_metrics(run_dir) if "train/loss" in m}


class Command:
    """Runs the command in this process and keeps what it said."""

    def __init__(self, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.corpus, self.capsys = corpus, capsys

    def __call__(self, run_dir: Path, **changes: Any) -> tuple[int, str]:
        """Exit code, and standard error."""
        self.capsys.readouterr()
        code = main(["train", *tiny_words(self.corpus, run_dir, **changes)])
        return code, self.capsys.readouterr().err

    def refuse(self, run_dir: Path, parts: list[str], **changes: Any) -> str:
        """Expect exit code 78, the parts in the error, and no file written or changed."""
        before = snapshot(run_dir) if run_dir.exists() else None
        code, error = self(run_dir, **changes)
        assert code == CONFIGURATION, error
        assert error.startswith("spectral-scale train: error: ") and "Traceback" not in error
        for part in parts:
            assert part in error, error
        if before is None:
            assert not run_dir.exists()
        else:
            assert snapshot(run_dir) == before
        return error


@pytest.fixture
def command(corpus: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(corpus, capsys)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with a checkpoint. Copy it before changing it."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *tiny_words(corpus, run_dir, **SHORT)]) == 0
    return run_dir


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the run that `trained` is the beginning of."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert main(["train", *tiny_words(corpus, run_dir, **LONGER)]) == 0
    return losses(run_dir)


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained`."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train__stepz": 5}, ["unknown key train.stepz", "did you mean train.steps?"]),
        ({"train__steps": "ten"}, ["train.steps='ten'", "Expected an int"]),
        (
            {"spectral__spectral_rank": 33},
            ["spectral.spectral_rank=33 exceeds min(m, n)=32 of q_proj (32 x 32)", "lower it"],
        ),
        (
            {"model__sequence_length": 2048},
            ["model.sequence_length=2048 exceeds the model's 1024", "lower it to at most 1024"],
        ),
        (
            {"model__vocab_size": 400},
            ["400 rows", "token ids up to 511", "auto or at least 512"],
        ),
        (
            {"train__micro_batch_size": 5},
            ["train.global_batch_size=12 is not divisible by", "one of [1, 2, 3, 4, 6, 12]"],
        ),
        ({"model__name": "opt-125"}, ["model.name=opt-125 is no preset", "did you mean opt-125m"]),
        ({"data__train": "none"}, ["none: no such token folder", "spectral-scale prepare"]),
        ({"data__validation": "none"}, ["none: no such token folder"]),
        ({"model__path": "none"}, ["model.path=none fixes the shapes", "remove one"]),
        (
            {"model__path": "none"} | dict.fromkeys(TINY_SHAPE, "null"),
            ["model.path=none: config.json cannot be read", "save_pretrained"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_cannot_run(
    command: Command, tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    command.refuse(tmp_path / "runs" / "new", parts, **changes)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(command: Command, tmp_path: Path) -> None:
    parts = ["train.device=cuda, but torch sees no GPU", "set train.device=auto or cpu"]
    command.refuse(tmp_path / "run", parts, train__device="cuda")


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"RANK": "0"}, ["incomplete launcher environment", "WORLD_SIZE", "torchrun"]),
        ({"WORLD_SIZE": "2"}, ["incomplete launcher environment", "RANK"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR and MASTER_PORT must be set"]),
    ],
)
def test_half_a_launcher(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    parts: list[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command.refuse(tmp_path / "run", parts)


def test_a_model_folder_without_weights(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "ffn_dim": 64, "vocab_size": 512, "max_position_embeddings": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    changes = {"model__path": folder} | dict.fromkeys(TINY_SHAPE, "null")
    parts = [str(folder), "holds no model.safetensors", "save_pretrained"]
    command.refuse(tmp_path / "run", parts, **changes)


@pytest.fixture(scope="module")
def other_data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token folders: `same` tokenizer and other text, `other` tokenizer, `short` of one word."""
    folder = tmp_path_factory.mktemp("other")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} of another text, {i * i} words.\n" for i in range(900)))
    (folder / "word.txt").write_text("word")
    tokenizer = corpus / "train" / "tokenizer"
    prepare([text], folder / "same", tokenizer=tokenizer, progress=False)
    prepare([text], folder / "other", train_bpe=300, progress=False)
    prepare([folder / "word.txt"], folder / "short", tokenizer=tokenizer, progress=False)
    return folder


def test_tokenizers_that_differ(command: Command, tmp_path: Path, other_data: Path) -> None:
    parts = ["different tokenizers", str(other_data / "other"), "prepare both with the same one"]
    command.refuse(tmp_path / "run", parts, data__validation=other_data / "other")


def test_data_shorter_than_a_sequence(command: Command, tmp_path: Path, other_data: Path) -> None:
    parts = [str(other_data / "short"), "at least 33 are required", "prepare more text"]
    command.refuse(tmp_path / "run", parts, data__train=other_data / "short")


def test_an_empty_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`prepare` says so, and leaves no folder that could be trained on."""
    (tmp_path / "empty.txt").write_text("")
    output = tmp_path / "tokens"
    words = ["prepare", "--input", str(tmp_path / "empty.txt"), "--output", str(output)]
    assert main([*words, "--train-bpe", "300"]) == CONFIGURATION
    error = capsys.readouterr().err
    assert "error: " in error and "empty.txt" in error and "Traceback" not in error
    assert main(["train", f"--data.train={output}"]) == CONFIGURATION


@pytest.mark.parametrize("parent", ["a file", "a file/below"])
def test_a_run_folder_that_cannot_be_made(command: Command, tmp_path: Path, parent: str) -> None:
    (tmp_path / "a file").write_text("in the way")
    before = snapshot(tmp_path)
    code, error = command(tmp_path / parent / "run")
    assert code == CONFIGURATION
    assert "train.run_dir=" in error and "cannot be written" in error
    assert "give a folder you may write to" in error
    assert snapshot(tmp_path) == before


def test_a_run_folder_in_use(command: Command, run_dir: Path) -> None:
    with RunLock(run_dir):
        parts = ["is in use by process", "set train.run_dir to another folder"]
        command.refuse(run_dir, parts, **LONGER)
    assert command(run_dir, **LONGER)[0] == 0


@pytest.fixture
def damaged(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus to break."""
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


def shard(corpus: Path) -> Path:
    index = open_tokens(corpus / "train").index
    assert len(index.shards) == 1
    return corpus / "train" / index.shards[0].file


def test_a_truncated_shard(command: Command, damaged: Path, tmp_path: Path) -> None:
    file = shard(damaged)
    file.write_bytes(file.read_bytes()[:-2])
    parts = [file.name, "truncated or changed", "prepare the folder again"]
    command.refuse(tmp_path / "run", parts, data__train=damaged / "train")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_id_beyond_the_vocabulary(
    command: Command, damaged: Path, run_dir: Path, undisturbed: dict[int, float], workers: int
) -> None:
    """Found in the step that reads it; the checkpoint before it is kept, and good to go on."""
    tokens = open_tokens(damaged / "train")
    loader = TrainLoader(
        tokens, sequence_length=32, global_batch_size=12, micro_batch_size=2, seed=0
    )
    earlier = {int(i) for step in range(6) for i in loader.sample_ids(step)}
    place = next(int(i) for i in loader.sample_ids(6) if not {i - 1, i} & earlier) * 32 + 5
    file = shard(damaged)
    good = file.read_bytes()
    ids = np.frombuffer(good, dtype=np.uint16).copy()
    ids[place] ^= 0x8000  # one flipped bit
    file.write_bytes(ids.tobytes())
    changes = {"data__train": damaged / "train", "data__num_workers": workers} | LONGER
    checkpoints = snapshot(run_dir / "checkpoints")
    code, error = command(run_dir, **changes)
    assert code == CONFIGURATION
    for part in (str(file), f"token {place} (byte {2 * place})", "beyond the vocabulary of 512"):
        assert part in error
    assert snapshot(run_dir / "checkpoints") == checkpoints
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 4)
    assert "beyond the vocabulary" in status["reason"]
    assert max(losses(run_dir)) == 6  # the step that needs it is the 7th
    file.write_bytes(good)
    assert command(run_dir, **changes)[0] == 0
    assert losses(run_dir) == undisturbed


@contextlib.contextmanager
def little_space(largest_file_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond a size meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_while_saving(
    command: Command, run_dir: Path, undisturbed: dict[int, float]
) -> None:
    checkpoints = snapshot(run_dir / "checkpoints")
    with little_space(60_000):
        code, output = command(run_dir, **LONGER)
    assert code == 1, output
    error = output.splitlines()[-1]
    assert "step 8 was not saved" in error and "no space: need" in error
    assert "free space or lower checkpoint.keep_last" in error
    assert snapshot(run_dir / "checkpoints") == checkpoints  # and no leftover of the new one
    assert CheckpointReader.open(run_dir / "checkpoints" / "step_00000004").step == 4
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 4)
    assert command(run_dir, **LONGER)[0] == 0
    assert losses(run_dir) == undisturbed


CHANGED: list[tuple[dict[str, Any], str]] = [
    ({"model__num_layers": 3}, "model.num_layers: the checkpoint has 2, this run 3"),
    ({"model__hidden_size": 64}, "model.hidden_size: the checkpoint has 32, this run 64"),
    ({"model__name": "llama-60m"}, "model.family: the checkpoint has 'opt', this run 'llama'"),
    ({"model__dropout": 0.1}, "model.dropout: the checkpoint has 0.0, this run 0.1"),
    ({"spectral__spectral_rank": 4}, "spectral.spectral_rank: the checkpoint has 8, this run 4"),
    ({"spectral__method": "full"}, "spectral.method: the checkpoint has 'sst', this run 'full'"),
    ({"spectral__storage": "factored"}, "spectral.storage: the checkpoint has 'residual'"),
    ({"spectral__steps_per_iteration": 5}, "steps_per_iteration: the checkpoint has 4, this run 5"),
    ({"train__precision": "bf16"}, "train.precision: the checkpoint has 'fp32', this run 'bf16'"),
    ({"train__seed": 1}, "data.seed: the checkpoint has 0, this run 1"),
    (
        {"train__global_batch_size": 24},
        "data.global_batch_size: the checkpoint has 12, this run 24",
    ),
    ({"model__sequence_length": 16}, "data.sequence_length: the checkpoint has 32, this run 16"),
    ({"optimizer__betas": "[0.8, 0.9]"}, "optimizer.betas: the checkpoint has [0.9, 0.95]"),
]


@pytest.mark.parametrize(("changes", "difference"), CHANGED, ids=lambda v: str(v)[:40])
def test_resuming_as_another_run(
    command: Command, run_dir: Path, changes: dict[str, Any], difference: str
) -> None:
    key = difference.partition(":")[0].rpartition(" ")[2]
    parts = [f"{run_dir} holds checkpoints of a different run", difference]
    parts += ["choose another train.run_dir", "--train.allow_changed '["]
    error = command.refuse(run_dir, parts, **LONGER | changes)
    assert key in error.rpartition("--train.allow_changed")[2]


def test_resuming_on_other_data(command: Command, run_dir: Path, other_data: Path) -> None:
    """Another text is refused by its fingerprint, another tokenizer by its checksum."""
    changes = {"data__train": other_data / "same", **LONGER}
    error = command.refuse(run_dir, ["data.data: the checkpoint has '"], **changes)
    assert "data.tokenizer" not in error
    changes = {"data__train": other_data / "other", "data__validation": "null", **LONGER}
    command.refuse(run_dir, ["data.data: ", "data.tokenizer: the checkpoint has '"], **changes)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model__dropout": 0.1}, "model.dropout"),
        ({"spectral__steps_per_iteration": 5}, "spectral.steps_per_iteration"),
        ({"optimizer__betas": "[0.8, 0.9]"}, "optimizer.betas"),
        ({"data__train": "same"}, "data.data"),
    ],
)
def test_a_change_that_is_allowed_by_name(
    command: Command, run_dir: Path, other_data: Path, changes: dict[str, Any], key: str
) -> None:
    if "data__train" in changes:
        changes = {"data__train": other_data / "same"}
    code, error = command(run_dir, **LONGER, **changes, train__allow_changed=f"[{key}]")
    assert code == 0, error
    assert "resuming at step 4 of 8" in error
    assert sorted(losses(run_dir)) == list(range(1, 9))


def test_one_allowed_change_does_not_allow_another(command: Command, run_dir: Path) -> None:
    changes = {"model__dropout": 0.1, "train__seed": 1, "train__allow_changed": "[data.seed]"}
    error = command.refuse(run_dir, ["model.dropout: the checkpoint has"], **LONGER | changes)
    assert "data.seed:" not in error


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"spectral__spectral_rank": 4}, "spectral.spectral_rank"),
        ({"model__num_layers": 3}, "model.num_layers"),
    ],
)
def test_a_change_that_cannot_work_though_it_is_allowed(
    command: Command, run_dir: Path, changes: dict[str, Any], key: str
) -> None:
    """The checkpoint's tensors do not fit: a clear error, and every checkpoint is still there."""
    before = snapshot(run_dir / "checkpoints")
    code, error = command(run_dir, **LONGER, **changes, train__allow_changed=f"[{key}]")
    assert code == 1
    assert error.splitlines()[-1].startswith("spectral-scale train: error: ")
    assert "step_00000004 holds no tensor" in error or "in the checkpoint" in error
    assert "Traceback" not in error
    assert snapshot(run_dir / "checkpoints") == before
    assert command(run_dir, **LONGER)[0] == 0


def test_checkpoints_that_are_all_damaged(command: Command, run_dir: Path) -> None:
    """The run does not silently begin again from step 0."""
    checkpoint = run_dir / "checkpoints" / "step_00000004"
    largest = max(checkpoint.iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    before = snapshot(run_dir / "checkpoints")
    code, error = command(run_dir, **LONGER)
    assert code == 1
    assert "none of the 1 checkpoints" in error and largest.name in error
    assert "move the folder away to start from step 0" in error
    assert snapshot(run_dir / "checkpoints") == before
