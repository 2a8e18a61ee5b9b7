"""The training order: a bijection, keyed, uniform, pinned."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_scale.data import order
from spectral_scale.data.order import hash64, sample_ids, sample_index

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 13, 63, 64, 65, 97, 255, 256, 257, 1009, 4096, 10007, 65537]
# Changing any of these changes the data order of every run: raise ORDER_VERSION with them.
GOLDEN_10 = [9, 0, 7, 6, 1, 8, 5, 2, 3, 4]
GOLDEN_MILLION = [850988, 733370, 605011, 213595, 267798, 785752]
GOLDEN_HUGE = [228141227255259322, 3447319527530878086, 1534824579900977972]
GOLDEN_HASH = 15020427595393229491


@pytest.mark.parametrize("num_samples", SIZES)
def test_every_epoch_is_a_permutation(num_samples: int) -> None:
    for epoch in range(3):
        found = sample_index(5, epoch, np.arange(num_samples), num_samples)
        assert np.array_equal(np.sort(found), np.arange(num_samples))


@given(seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6), n=st.integers(1, 500))
@settings(max_examples=60, deadline=None)
def test_bijection_for_any_key(seed: int, epoch: int, n: int) -> None:
    assert len(set(sample_index(seed, epoch, np.arange(n), n).tolist())) == n


def test_a_round_that_forgets_the_left_half_is_not_a_bijection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lossy(values: np.ndarray, keys: list[np.uint64], half_bits: int) -> np.ndarray:
        return order._mix(values ^ keys[0]) & np.uint64((1 << 2 * half_bits) - 1)

    monkeypatch.setattr(order, "_permute", lossy)
    assert len(set(sample_index(5, 0, np.arange(64), 64).tolist())) < 64


def test_golden_values() -> None:
    assert sample_index(0, 0, np.arange(10), 10).tolist() == GOLDEN_10
    assert sample_index(1234, 7, np.arange(6), 1_000_003).tolist() == GOLDEN_MILLION
    assert sample_index(1, 0, np.arange(3), 1 << 62).tolist() == GOLDEN_HUGE
    assert hash64(1, 2, 3) == GOLDEN_HASH


def test_epochs_and_seeds_give_different_orders() -> None:
    places = np.arange(1000)
    orders = [sample_index(s, e, places, 1000) for s, e in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # Two random permutations agree at about one place.
            assert (first == second).sum() < 10


def test_random_access_equals_the_whole_order() -> None:
    whole = sample_index(3, 2, np.arange(997), 997)
    assert [int(sample_index(3, 2, place, 997)) for place in (0, 500, 996)] == [
        whole[0],
        whole[500],
        whole[996],
    ]
    grid = sample_index(3, 2, np.arange(12).reshape(3, 4), 997)
    assert np.array_equal(grid.reshape(-1), whole[:12])


@pytest.mark.parametrize("num_samples", [1000, 4096, 50_000])
def test_displacement_looks_uniform(num_samples: int) -> None:
    """Where consecutive places land: uniform bins, uncorrelated neighbours, no fixed structure."""
    found = sample_index(11, 0, np.arange(num_samples), num_samples)
    head = found[: num_samples // 2]
    counts = np.histogram(head, bins=20, range=(0, num_samples))[0]
    expected = len(head) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50  # chi-square, 19 degrees of freedom
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 4 / np.sqrt(num_samples)
    assert abs(np.corrcoef(found, np.arange(num_samples))[0, 1]) < 4 / np.sqrt(num_samples)
    # A random permutation moves an element by n / 3 on average.
    assert np.abs(found - np.arange(num_samples)).mean() == pytest.approx(num_samples / 3, rel=0.06)


@pytest.mark.slow
def test_all_orders_of_three_samples_are_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(900):
        found = tuple(sample_index(0, epoch, np.arange(3), 3).tolist())
        counts[found] = counts.get(found, 0) + 1
    assert len(counts) == 6
    assert sum((c - 150) ** 2 / 150 for c in counts.values()) < 20.5  # 5 degrees, p = 0.001


def test_positions_continue_into_the_next_epoch() -> None:
    ids = sample_ids(9, np.arange(0, 25), 10)
    assert np.array_equal(ids[:10], sample_index(9, 0, np.arange(10), 10))
    assert np.array_equal(ids[10:20], sample_index(9, 1, np.arange(10), 10))
    assert np.array_equal(ids[20:], sample_index(9, 2, np.arange(5), 10))


@pytest.mark.parametrize("index, n", [(10, 10), (-1, 10), (0, 0), (0, (1 << 62) + 1)])
def test_out_of_range_is_refused(index: int, n: int) -> None:
    with pytest.raises(ValueError, match="range|required"):
        sample_index(0, 0, index, n)


def test_no_library_generator_is_touched() -> None:
    before = np.random.get_state()[1].copy()
    sample_index(0, 0, np.arange(100), 100)
    assert np.array_equal(before, np.random.get_state()[1])
