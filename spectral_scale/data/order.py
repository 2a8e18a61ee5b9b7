"""The training order: a pure function of (seed, epoch, index), evaluated at random access.

Each epoch visits every sample once, in an order given by a keyed bijection on range(n): an
8-round Feistel network over the smallest even number of bits that holds n, walked along its
cycle until it lands below n (format-preserving encryption; Black and Rogaway, CT-RSA 2002).
Own integer arithmetic only, so the order depends on no library's random numbers and needs
no memory; resuming is evaluating it at a later position.

An epoch of 5 samples with seed 0: the smallest network here permutes range(64). In epoch 0 it sends
1 to 42, 42 to 55 and 55 to 0; 42 and 55 are no samples, so the sample at place 1 is 0. The whole
epoch is 4 0 2 3 1, and epoch 1, whose keys are others, is 0 3 4 1 2.

Invariant: no two places give the same sample. The network is a permutation, so each place lies on
a cycle; walking on to the next number below n skips what lies between, on every cycle alike, and
can always end, since the place itself is such a number.
"""

import numpy as np

ORDER_VERSION = 1
"""Part of a run's data fingerprint: goes up if the order below ever changes."""

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_MIN_HALF_BITS = 3


def sample_index(seed: int, epoch: int, index: np.ndarray | int, num_samples: int) -> np.ndarray:
    """The sample at position `index` of an epoch.

    Args:
        seed: any integer (taken modulo 2**64).
        epoch: 0-based.
        index: places in the epoch, each in range(num_samples); any shape.
        num_samples: n, at most 2**62.

    Returns:
        int64 sample numbers in range(num_samples), in the shape of `index`.

    Raises:
        ValueError: an index or num_samples out of range.
    """
    places = np.asarray(index, dtype=np.int64)
    if not 1 <= num_samples <= 1 << 62:
        raise ValueError(f"num_samples is {num_samples}, from 1 to 2**62 required")
    if places.size and not (0 <= places.min() and places.max() < num_samples):
        raise ValueError(f"index outside range({num_samples})")
    half_bits = max(_MIN_HALF_BITS, ((num_samples - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = _permute(places.reshape(-1).astype(np.uint64), keys, half_bits)
    # From 17 samples on the network permutes fewer than 4 n numbers, so that a place needs fewer
    # than four evaluations on average.
    outside = np.flatnonzero(values >= num_samples)
    while outside.size:
        values[outside] = _permute(values[outside], keys, half_bits)
        outside = outside[values[outside] >= num_samples]
    return values.astype(np.int64).reshape(places.shape)


def sample_ids(seed: int, positions: np.ndarray, num_samples: int) -> np.ndarray:
    """Samples at global positions: position p is place p % n of epoch p // n.

    With 5 samples, positions 3 to 6 are places 3 and 4 of epoch 0 and places 0 and 1 of epoch 1.

    Args:
        seed: of the run.
        positions: int64, any shape, >= 0; may span epochs.
        num_samples: n, samples an epoch.

    Returns:
        int64 sample numbers, in the shape of `positions`.
    """
    epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), num_samples)
    ids = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        ids[chosen] = sample_index(seed, int(epoch), places[chosen], num_samples)
    return ids


def hash64(*values: int) -> int:
    """A well-mixed 64-bit hash of integers (each taken modulo 2**64); order matters."""
    state = 0
    for value in values:
        state = _mix_int((state ^ (value & _MASK)) + _GOLDEN & _MASK)
    return state


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    return [np.uint64(hash64(seed, epoch, round_)) for round_ in range(_ROUNDS)]


def _permute(values: np.ndarray, keys: list[np.uint64], half_bits: int) -> np.ndarray:
    """The Feistel network on 2 * half_bits bits; values is uint64, shape (N,)."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    # A round keeps `right`, so it can be undone whatever `_mix` does: that makes a permutation.
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64 arrays (wrapping)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_int(value: int) -> int:
    """Mix the bits of one Python integer, as `_mix` does for arrays."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)
