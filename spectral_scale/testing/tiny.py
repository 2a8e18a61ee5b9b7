"""A run so small that a step takes milliseconds, for tests of the whole path."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.config.schema import RunConfig
from spectral_scale.parallel.rank_info import RankInfo, detect_rank_info

if TYPE_CHECKING:
    from spectral_scale.engine.run import Run

TINY = {
    "model.hidden_size": 32,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.sequence_length": 32,
    "spectral.spectral_rank": 8,
    "spectral.steps_per_iteration": 4,
    "spectral.iterations_per_round": 2,
    "spectral.iteration_warmup_steps": 2,
    "optimizer.warmup_steps": 3,
    "data.validation_sequences": 8,
    "train.steps": 12,
    "train.global_batch_size": 12,
    "train.micro_batch_size": 2,
    "train.eval_interval": 6,
    "train.device": "cpu",
    "checkpoint.interval": 100,
    "metrics.log_interval": 1,
    "metrics.tensorboard": False,
    "metrics.report": False,
}
TORCH_ADAM = Path(__file__).with_name("torch_adam.json")
"""DeepSpeed file of runs that ask for offload without one: DeepSpeed's own Adam would be compiled
for minutes."""


def tiny_words(corpus: Path, run_dir: Path, **changes: Any) -> list[str]:
    """Command-line words of TINY on `corpus`, with changes given as section__key=value."""
    values = TINY | {
        "data.train": str(corpus / "train"),
        "data.validation": str(corpus / "valid"),
        "train.run_dir": str(run_dir),
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    if values.get("parallel.offload") == "cpu":
        values.setdefault("parallel.deepspeed_config", str(TORCH_ADAM))
    return [f"--{key}={value}" for key, value in values.items()]


def tiny_config(corpus: Path, run_dir: Path, **changes: Any) -> RunConfig:
    """The configuration that `tiny_words` gives."""
    return load_config([], tiny_words(corpus, run_dir, **changes)).config


def save_tiny_llama(folder: Path, corpus: Path, **changes: Any) -> dict[str, Any]:
    """A random LLaMA with grouped queries as a transformers folder; changes by which a tiny run
    starts from it.

    Args:
        folder: to be made.
        corpus: its tokenizer is put beside the weights.
        changes: of the LlamaConfig.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 64,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForCausalLM(LlamaConfig(**(sizes | changes))).save_pretrained(folder)
    for file in (corpus / "train" / "tokenizer").iterdir():
        shutil.copy(file, folder)
    given = dict.fromkeys(("hidden_size", "num_layers", "num_heads"), "null")
    return {"model__path": folder, "model__name": "null"} | {
        f"model__{key}": value for key, value in given.items()
    }


def build_from_config(config: RunConfig, rank_info: RankInfo | None = None) -> "Run":
    """Resolve a configuration, check what it reads, and build the run, as `train` does.

    Args:
        config: the run.
        rank_info: which rank this process is; None: as the environment says.
    """
    from spectral_scale.engine.build import build_run, check_inputs

    found = detect_rank_info() if rank_info is None else rank_info
    return build_run(check_inputs(resolve(config, world_size=found.world_size), found))


def train_tiny(
    config: RunConfig,
    stop_after: int | None = None,
    build: "Callable[[RunConfig], Run] | None" = None,
) -> dict[str, Any]:
    """Train in this process; losses by step, index sets, and every tensor of the final state.

    Args:
        config: the run.
        stop_after: ask for a stop, by a signal, in that step of this attempt.
        build: makes the run; by default `build_from_config`.
    """
    from spectral_scale.engine.loop import TrainingLoop
    from spectral_scale.metrics.sinks import NullLog
    from spectral_scale.parallel.dtensor_collectives import local
    from spectral_scale.supervision.run_folder import create_run_folder

    rank_info = detect_rank_info()
    create_run_folder(Path(config.train.run_dir))
    run = (build or build_from_config)(config)
    recorder = _Recorder()
    run.loader = cast(Any, _SignallingLoader(run.loader, stop_after))
    log: Any = recorder if rank_info.rank == 0 else NullLog()
    outcome = TrainingLoop(run, log, None).train()
    tensors = {chunk.key: chunk.tensor.clone() for chunk in run.backend.state_chunks()}
    if run.controller is not None:
        tensors |= {name: tensor.clone() for name, tensor in run.controller.state_tensors()}
    if run.gradient_filter is not None:
        tensors |= {c.key: c.tensor.clone() for c in run.gradient_filter.state_chunks()}
    frozen = {
        f"frozen/{name}": local(parameter).clone()
        for name, parameter in run.model.named_parameters()
        if not parameter.requires_grad
    }
    run.backend.close()
    return {
        "step": outcome.step,
        "stopped": outcome.stopped,
        "lines": recorder.lines,
        "losses": recorder.series("train/loss"),
        "tensors": {k: v.numpy() if v.dtype != torch.bfloat16 else v.float().numpy()
                    for k, v in (tensors | frozen).items()},
    }  # fmt: skip


def run_with_gradients(config: RunConfig) -> Any:
    """A `Run` in the middle of its first step: after the last backward pass, before the filter,
    clipping and the optimizer."""
    from spectral_scale.engine.loop import TrainingLoop
    from spectral_scale.metrics.sinks import NullLog
    from spectral_scale.supervision.run_folder import create_run_folder

    create_run_folder(Path(config.train.run_dir))
    run = build_from_config(config)
    TrainingLoop(run, NullLog(), None)._forward_backward(next(iter(run.loader.steps(0, 1))))
    return run


def train_in_turn(runs: Sequence[tuple[RunConfig, int | None]]) -> list[dict[str, Any]]:
    """`train_tiny` of several runs: configurations, and after how many steps each stops (None: at
    its end). Processes and hosts take seconds to start, the runs milliseconds a step."""
    with one_process_group():
        return [train_tiny(config, stop_after) for config, stop_after in runs]


@contextmanager
def one_process_group() -> Iterator[None]:
    """Inside, runs neither join nor leave a process group: they share one. Ends with the process,
    whose backends stay patched."""
    import importlib

    from spectral_scale.parallel.group import join_alone, join_group, leave_group

    world_size = detect_rank_info().world_size
    collective = join_group(world_size, torch.device("cpu"))
    if world_size == 1:
        join_alone(torch.device("cpu"))
    for name in ("torch", "deepspeed", "fsdp2"):
        module: Any = importlib.import_module(f"spectral_scale.backends.{name}.backend")
        module.join_group = lambda *_: collective
        module.join_alone = lambda *_: None
        module.leave_group = lambda **_: None
    yield
    leave_group()


class _SignallingLoader:
    """A loader that signals its own process when a batch is asked for."""

    def __init__(self, loader: Any, at: int | None) -> None:
        self._loader, self._at = loader, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def steps(self, start: int, stop: int, **options: Any) -> Iterator[Any]:
        """The loader's batches; SIGTERM comes before the one that was named, counted from 1."""
        for number, batch in enumerate(self._loader.steps(start, stop, **options), start=1):
            if number == self._at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


class _Recorder:
    """Keeps what a metrics log would write."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, Any]]] = []

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.lines.append((step, dict(values)))

    def go_back(self, step: int) -> None:
        """Lines stay: tests look at all of them."""

    def series(self, key: str) -> dict[int, Any]:
        return {step: values[key] for step, values in self.lines if key in values}
