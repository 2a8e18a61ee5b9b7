"""Random numbers as a pure function of a key, independent of call order, world size and library.

Only raw integers of a counter-based generator (Philox 4x64) are used, which numpy keeps stable;
the transforms to floats are ours.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import torch


def _digest(parts: tuple[object, ...]) -> bytes:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()


def keyed_seed(*key: object) -> int:
    """A seed in [0, 2^63) determined by the key's text."""
    return int.from_bytes(_digest(key)[:8], "little") >> 1


def keyed_uniform(count: int, *key: object) -> npt.NDArray[np.float64]:
    """`count` float64 numbers in the open interval (0, 1) determined by the key."""
    digest = _digest(key)
    words = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8)]
    raw = np.random.Philox(key=np.array(words, dtype=np.uint64)).random_raw(count)
    integers = (np.atleast_1d(raw) >> np.uint64(11)).astype(np.float64)
    return (integers + 0.5) * 2.0**-53


def keyed_generator(*key: object) -> torch.Generator:
    """A CPU torch generator seeded by the key."""
    return torch.Generator().manual_seed(keyed_seed(*key))
