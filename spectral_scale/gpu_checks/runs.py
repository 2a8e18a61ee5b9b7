"""Small training runs for the checks: their data, their settings, and a run in this process."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import ResolvedRun, resolve
from spectral_scale.config.schema import RunConfig
from spectral_scale.data.prepare import prepare
from spectral_scale.engine.build import build_run, check_inputs
from spectral_scale.engine.loop import TrainingLoop
from spectral_scale.engine.run import Run
from spectral_scale.gpu_checks.place import Place
from spectral_scale.metrics.sinks import NullLog
from spectral_scale.parallel.rank_info import RankInfo
from spectral_scale.supervision.run_folder import create_run_folder

WORDS, VOCABULARY = 40_000, 512
"""Length of the made-up text, and entries of the tokenizer that is trained on it."""

SMALL: dict[str, Any] = {
    "model.name": "opt-tiny",
    "model.hidden_size": 64,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.sequence_length": 64,
    "spectral.spectral_rank": 8,
    "spectral.steps_per_iteration": 4,
    "spectral.iterations_per_round": 2,
    "spectral.iteration_warmup_steps": 2,
    "optimizer.warmup_steps": 3,
    "train.steps": 10,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "checkpoint.interval": 1000,
    "health.replica_interval": 4,
    "metrics.log_interval": 1,
    "metrics.tensorboard": False,
    "metrics.progress": False,
    "metrics.report": False,
}
"""A run whose steps take milliseconds: swaps after steps 4 and 8, the second with SVDs."""
LLAMA = {"model.name": "llama-60m"}
"""Changes that give the small run LLaMA's blocks."""

Watch = Callable[[int], None]
"""Called before the loop takes a batch, with the number of batches it has had."""


def make_corpus(folder: Path) -> Path:
    """A token folder of made-up text, the same in every call. Takes about a second."""
    generator = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    lexicon = ["".join(generator.choices(syllables, k=k)) for k in (1, 2, 2, 3) for _ in range(300)]
    weights = [1 / (rank + 1) for rank in range(len(lexicon))]
    words = generator.choices(lexicon, weights, k=WORDS)
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text(" ".join(words), encoding="utf-8")
    prepare([text], folder / "tokens", train_bpe=VOCABULARY, progress=False)
    return folder / "tokens"


def words_of(corpus: Path, run_dir: Path, device: str, changes: Mapping[str, Any]) -> list[str]:
    """Command-line words of `SMALL` with changes, by dotted key."""
    places = {"data.train": corpus, "train.run_dir": run_dir, "train.device": device}
    values = {**SMALL, **places, **changes}
    return [f"--{key}={value}" for key, value in values.items()]


def small_config(
    place: Place, corpus: Path, name: str, changes: Mapping[str, Any] | None = None
) -> RunConfig:
    """The configuration of a run in the check's folder, on the place's device."""
    words = words_of(corpus, place.folder / name, place.device.type, changes or {})
    return load_config([], words).config


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run that has come to its end."""

    loop: TrainingLoop
    """The loop, with what it knows of the run and its saves; the model stays on the device."""
    lines: list[dict[str, Any]]
    """What was logged, a step at a time."""

    def series(self, key: str) -> dict[int, float]:
        """A logged value by step."""
        return {line["step"]: line[key] for line in self.lines if key in line}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of everything a checkpoint would hold, on the CPU."""
        chunks = self.loop.run.state_chunks()
        return {chunk.key: chunk.tensor.detach().to("cpu", copy=True) for chunk in chunks}


def resolved(config: RunConfig) -> ResolvedRun:
    """The run in one process. Raises ConfigError."""
    return resolve(config, world_size=1)


def train_here(config: RunConfig, watch: Watch | None = None) -> Trained:
    """Train in this process, as one rank, until the last step."""
    create_run_folder(Path(config.train.run_dir))
    run: Run = build_run(check_inputs(resolved(config), RankInfo()))
    if watch is not None:
        run.loader = cast(Any, WatchedLoader(run.loader, watch))
    lines: list[dict[str, Any]] = []
    loop = TrainingLoop(run, cast(NullLog, _Lines(lines)), None)
    try:
        loop.train()
        return Trained(loop=loop, lines=lines)
    finally:
        run.backend.close()


class WatchedLoader:
    """A run's loader that tells when a batch is taken, which is between two steps."""

    def __init__(self, loader: Any, watch: Watch) -> None:
        self._loader, self._watch = loader, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def steps(self, start: int, stop: int, **options: Any) -> Iterator[Any]:
        """The loader's batches."""
        for number, batch in enumerate(self._loader.steps(start, stop, **options)):
            self._watch(number)
            yield batch


class _Lines:
    """Keeps what a metrics log would write."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self._lines = lines

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Keep a line."""
        self._lines.append({"step": step, **values})

    def go_back(self, step: int) -> None:
        """Lines of steps that a rollback undid are kept as well."""


def largest_gap(found: Mapping[int, float], expected: Mapping[int, float]) -> float:
    """Largest difference of two series; infinite if their steps differ or there are none."""
    if found.keys() != expected.keys() or not found:
        return float("inf")
    gaps = torch.tensor([abs(found[step] - expected[step]) for step in found])
    return float("inf") if bool(gaps.isnan().any()) else float(gaps.max())


def different(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same to the bit, or that only one side has."""
    names = found.keys() | expected.keys()
    return sorted(
        name
        for name in names
        if name not in found or name not in expected or not _same(found[name], expected[name])
    )


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Bytes, since NaN differs from itself and -0.0 equals 0.0.
    return torch.equal(_bytes_of(a), _bytes_of(b))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
