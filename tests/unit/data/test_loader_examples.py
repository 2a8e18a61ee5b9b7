"""Training on k examples alone: k sequences drawn by the seed, read over and over."""

from collections.abc import Callable

import numpy as np
import pytest

from spectral_scale.data.loader import TrainLoader
from spectral_scale.data.tokens import TokenFolder
from spectral_scale.errors import ConfigError


def loader(folder: TokenFolder, examples: int | None, seed: int = 0) -> TrainLoader:
    return TrainLoader(
        folder,
        sequence_length=8,
        global_batch_size=4,
        micro_batch_size=2,
        seed=seed,
        examples=examples,
    )


def read(loader: TrainLoader, steps: int) -> list[int]:
    return np.concatenate([loader.sample_ids(step) for step in range(steps)]).tolist()


def test_k_sequences_are_read_and_no_others(
    counting_folder: Callable[[int], TokenFolder],
) -> None:
    folder = counting_folder(400)
    few = loader(folder, 6)
    seen = read(few, 9)
    assert len(set(seen)) == 6
    assert all(seen.count(sample) == 6 for sample in seen)  # 36 places, 6 epochs
    assert few.epoch_of(3) == 2.0
    assert set(read(loader(folder, 6, seed=1), 9)) != set(seen)
    every = loader(folder, None)
    assert set(read(loader(folder, every.num_samples), 40)) == set(read(every, 40))


def test_more_examples_keep_those_of_fewer(counting_folder: Callable[[int], TokenFolder]) -> None:
    folder = counting_folder(400)
    assert set(read(loader(folder, 4), 9)) < set(read(loader(folder, 8), 9))


def test_resume_knows_how_many(counting_folder: Callable[[int], TokenFolder]) -> None:
    folder = counting_folder(400)
    assert loader(folder, 6).state_fingerprint["examples"] == 6
    assert "examples" not in loader(folder, None).state_fingerprint


@pytest.mark.parametrize("examples", [0, 51])
def test_examples_there_are_not(
    examples: int, counting_folder: Callable[[int], TokenFolder]
) -> None:
    with pytest.raises(ConfigError, match=f"data.examples={examples}, but .* holds 49 sequences"):
        loader(counting_folder(400), examples)
