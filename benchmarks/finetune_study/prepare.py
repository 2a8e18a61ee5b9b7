"""The study's data, and the pretrained model that all runs start from."""

import json
from collections.abc import Iterator
from pathlib import Path

from study.results import StudyError

from finetune_study import settings as declared
from finetune_study.execute import command
from spectral_scale.data.prepare import prepare


def prepare_data(books: Path, output: Path) -> Path:
    """Token folders of other authors (train, valid) and of the one held out (author_train,
    author_valid), by one BPE trained on the former; made unless they are there. Returns `output`.

    Raises StudyError if `books` has no train-*.jsonl and valid.jsonl, or nothing by the author.
    """
    names = ("train", "valid", "author_train", "author_valid")
    if all((output / name / "index.json").exists() for name in names):
        return output
    train, valid = sorted(books.glob("train-*.jsonl")), books / "valid.jsonl"
    if not train or not valid.is_file():
        raise StudyError(f"{books} holds no train-*.jsonl and valid.jsonl; give another --data")
    output.mkdir(parents=True, exist_ok=True)
    others, author = [], []
    for book in _books(train):
        (author if book["author"] == declared.AUTHOR else others).append(book["text"])
    if not author:
        raise StudyError(f"{books} holds nothing by {declared.AUTHOR}")
    cut = [int(len(text) * (1 - declared.VALIDATION_SHARE)) for text in author]
    texts = {
        "train": [text[: declared.PRETRAIN_CHARACTERS] for text in others],
        "author_train": [text[:end] for text, end in zip(author, cut, strict=True)],
        "author_valid": [text[end:] for text, end in zip(author, cut, strict=True)],
    }
    prepare(
        [_write(output, "train", texts["train"])], output / "train", train_bpe=declared.VOCABULARY
    )
    for name in ("author_train", "author_valid"):
        prepare([_write(output, name, texts[name])], output / name, tokenizer=output / "train")
    prepare([valid], output / "valid", tokenizer=output / "train")
    return output


def pretrain(data: Path, work: Path) -> Path:
    """The folder of the pretrained model; trained, or continued, unless it is there."""
    folder, run_dir = work / "pretrained", work / "pretrain"
    if (folder / "config.json").exists():
        return folder
    own = {"data.train": data / "train", "data.validation": data / "valid"}
    code = command(["train"], declared.PRETRAIN | own | {"train.run_dir": run_dir})
    if code:
        raise StudyError(f"pretraining ended with exit code {code}; start again to continue it")
    if code := command(["export", str(run_dir), "--output", str(folder)], {}):
        raise StudyError(f"the export of {run_dir} ended with exit code {code}")
    return folder


def _books(files: list[Path]) -> Iterator[dict[str, str]]:
    for file in files:
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _write(folder: Path, name: str, texts: list[str]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
