"""JSON that comes back as it went in: one canonical encoding, nothing converted silently.

The `read_*` functions take a parsed value and `where` it stood, for the error's text.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from spectral_scale.errors import CheckpointError

_T = TypeVar("_T")


def canonical(value: Any) -> bytes:
    """The one encoding of a JSON value: sorted keys, no spaces, ASCII, a final newline."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


def plain(value: Any, *, where: str) -> Any:
    """Copy of `value` made of dict, list, str, int, float, bool and None; tuples become lists.

    Raises CheckpointError, naming the place, for what JSON would change or refuse: tensors and
    other objects, keys that are not strings, NaN and infinities.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"{where} is {value}, which JSON cannot hold; store null instead")
        return float(value)
    if isinstance(value, list | tuple):
        return [plain(item, where=f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {
            _key(key, where): plain(item, where=f"{where}.{key}") for key, item in value.items()
        }
    raise CheckpointError(
        f"{where} is a {type(value).__name__}; only JSON values fit here: "
        "save tensors as chunks and other objects as numbers or text"
    )


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise CheckpointError(f"{where} has the key {key!r}; JSON keys must be text, use str(key)")
    return key


def read_fields(
    value: Any,
    readers: Mapping[str, Callable[[Any, str], Any]],
    where: str,
    *,
    also: tuple[str, ...] = (),
) -> dict[str, Any]:
    """An object of exactly the named fields (and those in `also`), each read by its reader."""
    entries = expect(value, dict, where)
    differing = sorted(set(entries) ^ {*readers, *also})
    if differing:
        raise CheckpointError(f"{where}: missing or unknown fields {', '.join(differing)}")
    return {name: read(entries[name], f"{where}.{name}") for name, read in readers.items()}


def read_mapping(value: Any, where: str, read: Callable[[Any, str], _T]) -> dict[str, _T]:
    """An object whose values are all of one kind."""
    entries = expect(value, dict, where)
    return {name: read(item, f"{where}[{name!r}]") for name, item in entries.items()}


def read_shape(value: Any, where: str) -> tuple[int, ...]:
    """A list of counts."""
    return tuple(read_count(item, where) for item in expect(value, list, where))


def read_text(value: Any, where: str) -> str:
    """The value, if it is a string. Raises CheckpointError otherwise."""
    return expect(value, str, where)


def read_count(value: Any, where: str) -> int:
    """An integer that is not negative."""
    if expect(value, int, where) < 0 or isinstance(value, bool):
        raise CheckpointError(f"{where}: {value!r} is not a count")
    return int(value)


def expect(value: Any, kind: type[_T], where: str) -> _T:
    """A value of the given Python type."""
    if not isinstance(value, kind):
        given = type(value).__name__
        raise CheckpointError(f"{where}: must be a {kind.__name__}, is a {given}")
    return value
