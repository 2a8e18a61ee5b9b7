"""Batches for training and validation: which samples a step and a rank get, as tensors.

The only part of `data` that needs torch. No random number is drawn here, neither in this
process nor in a worker, so batches never disturb (or depend on) the state of a generator.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from spectral_scale.data.order import ORDER_VERSION, sample_ids, sample_index
from spectral_scale.data.packing import count_samples, read_padded, read_samples
from spectral_scale.data.read_ahead import ReadAhead, WhileWaiting
from spectral_scale.data.tokens import TokenFolder
from spectral_scale.errors import ConfigError

BEFORE_ALL = -1
"""The epoch in whose order the examples come first: one that no training reaches."""


class Batch(NamedTuple):
    """One micro-batch; `labels` are already shifted, -100 where nothing is predicted."""

    input_ids: torch.Tensor
    """int64, shape (sequences, sequence_length)."""
    labels: torch.Tensor
    """int64, shape (sequences, sequence_length)."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The micro-batches that one rank reads for one optimizer step."""

    step: int
    """The optimizer step, 0-based."""
    micro_batches: list[Batch]
    """The micro-batches, in the order in which their gradients are accumulated."""


class TrainLoader:
    """The training batches of one rank, by step number.

    Optimizer step s uses the global positions [s G, (s + 1) G) of the training order; rank k of
    N takes the k-th of N equal contiguous parts, in micro-batches. The samples of a step thus
    depend on neither N, the micro-batch size nor the number of workers, and any step can be
    asked for first.

    With G = 8, step 3 reads positions 24 to 31. On 2 ranks with micro-batches of 2, rank 0 reads
    24 25 | 26 27 and rank 1 reads 28 29 | 30 31; on 4 ranks, rank 0 reads 24 25, and so on.

    Args:
        folder: the token stream.
        sequence_length: S, tokens a sequence.
        global_batch_size: G, sequences a step over all ranks.
        micro_batch_size: sequences a micro-batch.
        seed: of the training order.
        data_rank: k, this rank's place among the data-parallel ranks.
        data_world_size: N, the number of data-parallel ranks.
        num_workers: processes that read ahead; 0 reads in this process.
        examples: read only this many sequences of the folder, drawn by the seed; None: all.

    Raises:
        ConfigError: G is not divisible by N times the micro-batch size, or too many examples.
        DataError: the folder holds less than one sequence.
    """

    def __init__(
        self,
        folder: TokenFolder,
        *,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        data_rank: int = 0,
        data_world_size: int = 1,
        num_workers: int = 0,
        examples: int | None = None,
    ) -> None:
        _check_positive(
            sequence_length=sequence_length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
        )
        _check_rank(data_rank, data_world_size)
        if global_batch_size % (data_world_size * micro_batch_size):
            raise ConfigError(
                f"train.global_batch_size {global_batch_size} is not divisible by "
                f"{data_world_size} data-parallel ranks x train.micro_batch_size "
                f"{micro_batch_size}; change one of the three"
            )
        self.folder = folder
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.num_samples = count_examples(folder, sequence_length, examples)
        self.examples: np.ndarray | None = None
        if examples is not None:
            every = count_samples(folder, sequence_length)
            self.examples = sample_index(seed, BEFORE_ALL, np.arange(examples), every)
        self.rank_batch_size = global_batch_size // data_world_size
        self.gradient_accumulation_steps = self.rank_batch_size // micro_batch_size
        self._rank_offset = data_rank * self.rank_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step learns from, over all ranks."""
        return self.global_batch_size * self.sequence_length

    @property
    def state_fingerprint(self) -> dict[str, int | str]:
        """Everything that the sequence of global batches depends on; compare it on resume."""
        few: dict[str, int | str] = {}
        if self.examples is not None:
            few["examples"] = len(self.examples)
        return few | {
            "data": self.folder.fingerprint,
            "tokenizer": self.folder.tokenizer_sha256,
            "sequence_length": self.sequence_length,
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "order_version": ORDER_VERSION,
        }

    def sample_ids(self, step: int) -> np.ndarray:
        """The samples of a step's global batch, in order: int64, shape (global_batch_size,)."""
        start = step * self.global_batch_size
        return self._samples_at(start, self.global_batch_size)

    def epoch_of(self, step: int) -> float:
        """Epochs read when a step begins, as a fraction."""
        return step * self.global_batch_size / self.num_samples

    def steps(
        self, start_step: int, stop_step: int, *, while_waiting: WhileWaiting | None = None
    ) -> Iterator[StepBatch]:
        """The batches of steps start_step..stop_step (exclusive), without reading earlier ones.

        Args:
            start_step: the first step.
            stop_step: the step after the last.
            while_waiting: called about once a second, with the seconds waited so far, while
                workers owe a batch; when it returns True no further step is given.

        Raises:
            DataError: the token folder is damaged.
            WorkerError: a worker cannot be started, died or failed.
        """
        accumulation = self.gradient_accumulation_steps
        numbers = range(start_step * accumulation, stop_step * accumulation)
        with ExitStack() as stack:
            tokens: Iterator[np.ndarray] = map(self._read_micro_batch, numbers)
            if self.num_workers and numbers:
                workers = ReadAhead(self._read_micro_batch, numbers, self.num_workers)
                tokens = stack.enter_context(workers).items(while_waiting)
            for step in range(start_step, stop_step):
                micro_batches = [_batch(found) for found in islice(tokens, accumulation)]
                if len(micro_batches) < accumulation:
                    return
                yield StepBatch(step=step, micro_batches=micro_batches)

    def _read_micro_batch(self, number: int) -> np.ndarray:
        """Token ids, int64, shape (micro_batch_size, sequence_length + 1)."""
        step, place = divmod(number, self.gradient_accumulation_steps)
        start = step * self.global_batch_size + self._rank_offset + place * self.micro_batch_size
        ids = self._samples_at(start, self.micro_batch_size)
        return read_samples(self.folder, ids, self.sequence_length)

    def _samples_at(self, start: int, count: int) -> np.ndarray:
        positions = np.arange(start, start + count, dtype=np.int64)
        ids = sample_ids(self.seed, positions, self.num_samples)
        return ids if self.examples is None else self.examples[ids]


def count_examples(folder: TokenFolder, sequence_length: int, examples: int | None) -> int:
    """Sequences that training reads. Raises ConfigError for more examples than there are."""
    available = count_samples(folder, sequence_length)
    if examples is None:
        return available
    if not 1 <= examples <= available:
        raise ConfigError(
            f"data.examples={examples}, but {folder.path} holds {available} sequences of "
            f"{sequence_length} tokens; give 1 to {available}, or leave it out to take all"
        )
    return examples


class ValidationLoader:
    """A fixed set of sequences in a fixed order, the same at every evaluation.

    The sequences are spread evenly over the folder (all of it when it holds no more than
    `num_sequences`). Ranks take contiguous parts that differ by at most one sequence; a rank
    may have none. The last sequence of the folder may be short: its missing labels are -100.

    3 of 10 sequences are 0, 3 and 6; of 2 ranks, the first reads 0, and the second 3 and 6.

    Args:
        folder: the token stream.
        sequence_length: S, tokens a sequence.
        num_sequences: sequences over all ranks, at most.
        micro_batch_size: sequences a batch; the last one of a rank may hold fewer.
        data_rank: this rank's place among the data-parallel ranks.
        data_world_size: the number of data-parallel ranks.

    Raises:
        ConfigError: a size is not positive.
        DataError: the folder holds nothing to predict.
    """

    def __init__(
        self,
        folder: TokenFolder,
        *,
        sequence_length: int,
        num_sequences: int,
        micro_batch_size: int,
        data_rank: int = 0,
        data_world_size: int = 1,
    ) -> None:
        _check_positive(
            sequence_length=sequence_length,
            num_sequences=num_sequences,
            micro_batch_size=micro_batch_size,
        )
        _check_rank(data_rank, data_world_size)
        available = count_samples(folder, sequence_length, keep_tail=True)
        self.folder = folder
        self.sequence_length = sequence_length
        self.micro_batch_size = micro_batch_size
        self.num_sequences = min(num_sequences, available)
        chosen = np.arange(self.num_sequences, dtype=np.int64) * available // self.num_sequences
        first = data_rank * self.num_sequences // data_world_size
        stop = (data_rank + 1) * self.num_sequences // data_world_size
        self.rank_sample_ids = chosen[first:stop]

    def __len__(self) -> int:
        """Batches of this rank; ranks may differ by one."""
        return -(-len(self.rank_sample_ids) // self.micro_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.rank_sample_ids), self.micro_batch_size):
            ids = self.rank_sample_ids[start : start + self.micro_batch_size]
            inputs, labels = read_padded(self.folder, ids, self.sequence_length)
            yield Batch(torch.from_numpy(inputs), torch.from_numpy(labels))


def _batch(ids: np.ndarray) -> Batch:
    """Inputs and labels from sequences that are one token longer."""
    tokens = torch.from_numpy(ids)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} is {size}, at least 1 is required")


def _check_rank(data_rank: int, data_world_size: int) -> None:
    if not 0 <= data_rank < data_world_size:
        raise ConfigError(f"data rank {data_rank} of {data_world_size} ranks does not exist")
