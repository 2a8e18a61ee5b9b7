"""The study's token folders: the books, cut by an 8k BPE that is trained on them."""

import os
from pathlib import Path

from spectral_scale.data.prepare import prepare
from study.results import StudyError
from study.settings import VOCABULARY

DATA_VARIABLE = "SPECTRAL_SCALE_DATA"
DEFAULT_DATA = Path(__file__).parents[3] / "shared" / "data"


def prepare_books(output: Path, data: Path | None = None) -> Path:
    """Make OUTPUT/train and OUTPUT/valid unless they are there; returns OUTPUT.

    The text is read from `data`, or the folder named by SPECTRAL_SCALE_DATA. Raises StudyError
    without it.
    """
    if is_prepared(output):
        return output
    train, valid = find_books(data)
    prepare(train, output / "train", train_bpe=VOCABULARY)
    prepare([valid], output / "valid", tokenizer=output / "train")
    return output


def is_prepared(output: Path) -> bool:
    """Whether both token folders are there."""
    return all((output / part / "index.json").exists() for part in ("train", "valid"))


def find_books(data: Path | None) -> tuple[list[Path], Path]:
    """The files to train on, and the file to validate on. Raises StudyError without them."""
    books = (data or Path(os.environ.get(DATA_VARIABLE, DEFAULT_DATA))) / "books"
    train, valid = sorted(books.glob("train-*.jsonl")), books / "valid.jsonl"
    if not train or not valid.is_file():
        raise StudyError(
            f"{books} holds no train-*.jsonl and valid.jsonl; give --data, or set {DATA_VARIABLE}, "
            "to the folder that has `books` in it"
        )
    return train, valid
