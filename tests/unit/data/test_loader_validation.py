"""Validation batches: fixed, complete, and divided without overlap."""

from collections.abc import Callable

import pytest
import torch

from spectral_scale.data.loader import ValidationLoader
from spectral_scale.data.tokens import TokenFolder
from spectral_scale.errors import ConfigError, DataError
from spectral_scale.ops.labels import IGNORED_LABEL

Make = Callable[[int], TokenFolder]
S = 8


def loader(folder: TokenFolder, **changes: int) -> ValidationLoader:
    settings = {"sequence_length": S, "num_sequences": 1000, "micro_batch_size": 3}
    return ValidationLoader(folder, **(settings | changes))


def labels_of(validation: ValidationLoader) -> list[int]:
    found = [label for batch in validation for label in batch.labels.flatten().tolist()]
    return [label for label in found if label != IGNORED_LABEL]


@pytest.mark.parametrize("num_tokens", [2, 8, 9, 10, 16, 17, 18, 100])
def test_every_token_but_the_first_is_predicted_once(
    counting_folder: Make, num_tokens: int
) -> None:
    validation = loader(counting_folder(num_tokens))
    assert labels_of(validation) == [*range(2, num_tokens), 0]


def test_tail_is_padded_without_labels(counting_folder: Make) -> None:
    batches = list(loader(counting_folder(S + 4)))
    assert len(batches) == 1
    assert batches[0].input_ids[1].tolist() == [9, 10, 11, 0, 0, 0, 0, 0]
    assert batches[0].labels[1].tolist() == [10, 11, 0, -100, -100, -100, -100, -100]
    assert batches[0].input_ids.dtype == batches[0].labels.dtype == torch.int64


def test_inputs_and_labels_are_shifted(counting_folder: Make) -> None:
    for batch in loader(counting_folder(100)):
        wanted = torch.where(batch.labels[:, :-1] == -100, 0, batch.labels[:, :-1])
        assert torch.equal(batch.input_ids[:, 1:], wanted)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 20])
def test_ranks_share_without_overlap_or_gap(counting_folder: Make, world: int) -> None:
    folder = counting_folder(100)
    ranks = [loader(folder, data_rank=k, data_world_size=world) for k in range(world)]
    sizes = [len(rank.rank_sample_ids) for rank in ranks]
    assert max(sizes) - min(sizes) <= 1
    assert (0 in sizes) == (world == 20)
    assert [len(list(rank)) for rank in ranks] == [len(rank) for rank in ranks]
    assert sum((labels_of(rank) for rank in ranks), []) == labels_of(loader(folder))


def test_chosen_sequences_are_spread_and_fixed(counting_folder: Make) -> None:
    folder = counting_folder(801)
    validation = loader(folder, num_sequences=4)
    assert validation.rank_sample_ids.tolist() == [0, 25, 50, 75]
    first, second = ([b.input_ids for b in validation] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_micro_batch_size_does_not_change_the_sequences(counting_folder: Make) -> None:
    folder = counting_folder(100)
    expected = labels_of(loader(folder, micro_batch_size=1))
    assert all(labels_of(loader(folder, micro_batch_size=m)) == expected for m in (2, 5, 100))


def test_refusals(counting_folder: Make) -> None:
    with pytest.raises(DataError, match="1 tokens, at least 2 are required"):
        loader(counting_folder(1))
    folder = counting_folder(100)
    with pytest.raises(ConfigError, match="num_sequences is 0"):
        loader(folder, num_sequences=0)
    with pytest.raises(ConfigError, match="data rank 1 of 1"):
        loader(folder, data_rank=1)
