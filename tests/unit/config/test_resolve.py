"""A configuration is checked once, and its DeepSpeed file is opened once, by whatever uses it."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.errors import ConfigError
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_words

FILE = {"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}


def count_while_running(words: list[str], file: Path) -> dict[str, Any]:
    """Run a command; how often it checked the configuration and opened the DeepSpeed file.

    The checks and openings of `train` are also counted as its first step begins.
    """
    from spectral_scale.cli.main import main
    from spectral_scale.config import check
    from spectral_scale.engine.loop import TrainingLoop

    opened: list[str] = []
    checked: list[int] = []
    before_first_step: list[tuple[int, int]] = []

    def notice(event: str, arguments: Any) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            if os.fspath(arguments[0]) == str(file):
                opened.append(event)

    sys.addaudithook(notice)
    plain_check, plain_step = check._check_batches, TrainingLoop._one_step

    def counted(*arguments: Any) -> Any:
        checked.append(1)
        return plain_check(*arguments)

    def first(loop: TrainingLoop, batch: Any) -> None:
        before_first_step.append((len(checked), len(opened)))
        plain_step(loop, batch)

    check._check_batches = counted
    TrainingLoop._one_step = first  # type: ignore[method-assign]
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    return {
        "code": code,
        "checked": len(checked),
        "opened": len(opened),
        "before the first step": before_first_step[:1],
    }


def on_deepspeed(corpus: Path, folder: Path) -> tuple[list[str], Path]:
    file = folder / "ds.json"
    file.write_text(json.dumps(FILE))
    changes = {"parallel__backend": "deepspeed", "parallel__deepspeed_config": file}
    return tiny_words(corpus, folder / "run", train__steps=2, **changes), file


def test_train(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    words, file = on_deepspeed(corpus, tmp_path)
    (found,) = run_distributed(count_while_running, 1, ["train", *words], file)
    assert found == {"code": 0, "checked": 1, "opened": 1, "before the first step": [(1, 1)]}


def test_plan_slurm_and_doctor(corpus: Path, tmp_path: Path) -> None:
    words, file = on_deepspeed(corpus, tmp_path)
    for command in ("plan", "slurm", "doctor"):
        (found,) = run_distributed(count_while_running, 1, [command, *words], file)
        found.pop("code")  # a machine that runs tests may not be fit for training
        assert found == {"checked": 1, "opened": 1, "before the first step": []}, command


def test_what_follows_from_a_configuration() -> None:
    words = ["--train.global_batch_size=32", "--train.micro_batch_size=2"]
    words += ["--parallel.backend=fsdp2", "--parallel.tensor_parallel=2"]
    run = resolve(load_config([], words).config, world_size=8)
    assert (run.world_size, run.data_parallel_size) == (8, 4)
    assert run.gradient_accumulation_steps == 4
    assert run.capability_row == "fsdp2+tp"
    assert run.method.name == "sst"
    assert run.deepspeed is None


def test_a_vocabulary_that_does_not_divide_is_refused_when_it_is_known() -> None:
    words = ["--parallel.backend=fsdp2", "--parallel.tensor_parallel=2"]
    run = resolve(load_config([], words).config, world_size=2)
    assert run.with_vocabulary(512).architecture.vocab_size == 512
    with pytest.raises(ConfigError, match="does not divide the 513 rows of the vocabulary"):
        run.with_vocabulary(513)
