"""Documents of a Hugging Face dataset, through `datasets` (imported only when one is named).

`datasets` 4 and later runs no code of a dataset; older versions are not supported.
"""

from collections.abc import Iterator
from typing import Any

from spectral_scale.data.records import Record
from spectral_scale.errors import DataError

PREFIX = "hf:"


def parse_spec(spec: str) -> tuple[str, str | None, str]:
    """`hf:NAME[:CONFIG][:SPLIT]` -> (name, configuration or None, split; `train` by default).

    Raises:
        DataError: not of that form.
    """
    parts = spec.removeprefix(PREFIX).split(":")
    if len(parts) > 3 or not parts[0]:
        raise DataError(
            f"{spec!r}: required is hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT "
            "(hf:NAME::SPLIT for the default configuration)"
        )
    name, config, split = [*parts, "", ""][:3]
    return name, config or None, split or "train"


def read_dataset(spec: str, *, text_field: str, streaming: bool) -> Iterator[Record]:
    """The rows of a dataset, in its order.

    Raises:
        DataError: it cannot be loaded (and what to do offline), or has no such column.
    """
    dataset = _load(spec, streaming)
    columns = dataset.column_names
    if columns and text_field not in columns:
        raise DataError(
            f"{spec}: no column {text_field!r}, it has: {', '.join(columns)}; name one with "
            "--text-field"
        )
    rows = iter(dataset.select_columns([text_field]) if columns else dataset)
    number = 0
    while (row := _next_row(spec, rows, number)) is not None:
        number += 1
        yield _record(f"{spec}: row {number}", row.get(text_field))


def _record(where: str, text: object) -> Record:
    # A lone surrogate becomes bytes that are refused as invalid UTF-8, as everywhere else.
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else None
    return Record(where, 0, data, False)


def _load(spec: str, streaming: bool) -> Any:
    import datasets

    name, config, split = parse_spec(spec)
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # many kinds, of several libraries; all mean the same here
        raise DataError(_message(spec, error)) from error


def _next_row(spec: str, rows: Iterator[dict[str, Any]], number: int) -> dict[str, Any] | None:
    try:
        return next(rows, None)
    except Exception as error:  # a connection that breaks while streaming, a damaged cache
        raise DataError(f"after row {number}: {_message(spec, error)}") from error


def _message(spec: str, error: Exception) -> str:
    return (
        f"{spec}: the dataset cannot be loaded ({type(error).__name__}: {error}). Check its name "
        "and the network; on a machine without network, set HF_HOME to a folder where it was "
        "downloaded before, or give its Parquet or JSON-lines files instead"
    )
