"""Tiny runs, trained once through the real command, and folders to start from."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import BF16, FP64, FULL, LORA, OPT, POST_NORM, TANGENT, command, train

from spectral_scale.testing.tiny import save_tiny_llama


@pytest.fixture(scope="session")
def llama_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA with grouped-query attention and scaled rotary embeddings, saved."""
    folder = tmp_path_factory.mktemp("llama") / "start"
    rope = {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 2.0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    save_tiny_llama(folder, corpus, **heads, rope_parameters=rope, rms_norm_eps=1e-5)
    return folder


@pytest.fixture(scope="session")
def run_of(
    corpus: Path, llama_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """run_of(kind) -> the folder of a finished run, trained on first use; copy it to change it."""
    llama = {"model.path": llama_folder, "model.name": "null"}
    llama |= dict.fromkeys(("model.hidden_size", "model.num_layers", "model.num_heads"), "null")
    kinds = {"opt": OPT, "post_norm": POST_NORM, "llama": llama}
    kinds |= {"bf16": BF16, "lora": LORA, "full": FULL, "fp64": FP64, "tangent": TANGENT}
    runs: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in runs:
            runs[kind] = tmp_path_factory.mktemp("runs") / kind
            ran = train(corpus, runs[kind], **kinds[kind])
            assert ran.code == 0, ran.err
        return runs[kind]

    return get


@pytest.fixture
def opt_copy(run_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the OPT run, to be damaged."""
    return Path(shutil.copytree(run_of("opt"), tmp_path / "run"))


@pytest.fixture(scope="session")
def exported(
    run_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """exported(kind) -> the run of that kind as a transformers folder; copy it to change it."""
    folders: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("exported") / kind
            ran = command("export", run_of(kind), "--output", folders[kind], "--device", "cpu")
            assert ran.code == 0, ran.err
        return folders[kind]

    return get


@pytest.fixture
def folder_copy(exported: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the exported OPT, to be damaged."""
    return Path(shutil.copytree(exported("opt"), tmp_path / "folder"))


@pytest.fixture(scope="session")
def other_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token folder of another tokenizer with the same number of entries."""
    from spectral_scale.data.prepare import prepare

    folder = tmp_path_factory.mktemp("other")
    text = folder / "text.txt"
    text.write_text("\n".join(f"line {i} of {i * i} other words" for i in range(2000)))
    prepare([text], folder / "tokens", train_bpe=300, progress=False)
    return folder / "tokens"
