"""Text to token folders. `prepare` is the whole job; its steps are in visible order there."""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spectral_scale import __version__
from spectral_scale.data.encode import EncodedDocument, EncodeSettings, cut_pieces, encode_records
from spectral_scale.data.index import ShardEntry, SourceEntry, TokenIndex
from spectral_scale.data.order import hash64
from spectral_scale.data.prepare_settings import SHARD_TOKENS, OnBad, PrepareSettings
from spectral_scale.data.records import BadDocument, Record, extract_text
from spectral_scale.data.sources import Source, find_sources, read_records
from spectral_scale.data.target import (
    finished,
    locked,
    mark_finished,
    refuse_foreign,
    start_afresh,
)
from spectral_scale.data.tokenizer import (
    TokenizerFacts,
    find_tokenizer,
    install_tokenizer,
    train_bpe_tokenizer,
)
from spectral_scale.data.tokens import (
    TOKENIZER_FOLDER,
    TOKENIZER_NAME,
    TokenFolder,
    file_sha256,
    open_tokens,
)
from spectral_scale.data.writer import TokenWriter, sync_files, write_index
from spectral_scale.errors import ConfigError, DataError

logger = logging.getLogger(__name__)
BPE_SAMPLE_BYTES = 1 << 28
"""A tokenizer is trained on about this much text, spread over the inputs."""
_BPE_PIECE_CHARACTERS = 1 << 16
_SKIPS_LOGGED = 5


@dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """What `prepare` made, or found already made."""

    folders: tuple[TokenFolder, ...]
    """The output folder; with a split, its `train` and `valid` folders."""
    already_done: bool
    """The folders held exactly this before, and nothing was written."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One `prepare` under way."""

    settings: PrepareSettings
    sources: Sequence[Source]
    parts: Mapping[str, Path]
    streaming: bool
    workers: int
    progress: bool

    def records(self) -> Iterator[Record]:
        for source in self.sources:
            yield from read_records(
                source, text_field=self.settings.text_field, streaming=self.streaming
            )


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    train_bpe: int | None = None,
    text_field: str = "text",
    on_bad: OnBad = "error",
    shard_tokens: int = SHARD_TOKENS,
    split_validation: float = 0.0,
    seed: int = 0,
    streaming: bool = False,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareResult:
    """Turn text into a token folder (two with `split_validation`).

    The folder appears whole or not at all: its index is written last. The same call again
    finds it done; after an interruption it starts over. The bytes do not depend on `workers`.

    Args:
        inputs: .txt (one document), .jsonl, .jsonl.gz and .parquet files, folders of these, and
            datasets as `hf:NAME[:CONFIG][:SPLIT]`.
        output: the folder to make.
        tokenizer: a local tokenizer folder, or a token folder whose tokenizer is used.
        train_bpe: instead, train a byte-level BPE tokenizer of this vocabulary size on the inputs.
        text_field: the JSON field or table column that holds the text.
        on_bad: `error` stops at the first unusable document, `skip` counts and leaves it out.
            Empty documents are always left out and counted.
        shard_tokens: a shard is closed once it holds this many tokens.
        split_validation: share of the documents, chosen by hash, that goes to OUTPUT/valid while
            the others go to OUTPUT/train.
        seed: chooses those documents.
        streaming: read datasets without downloading them first.
        workers: processes that tokenise. More than one needs an importable main module
            (`if __name__ == "__main__":` in a script).
        overwrite: replace a token folder that was made from something else.
        progress: show a progress bar on a terminal.

    Raises:
        ConfigError: settings that cannot be.
        DataError: inputs, tokenizer or output that cannot be used; names file and offset.
    """
    settings = PrepareSettings(
        tokenizer=None if tokenizer is None else find_tokenizer(Path(tokenizer)),
        train_bpe=train_bpe,
        text_field=text_field,
        on_bad=on_bad,
        shard_tokens=shard_tokens,
        split_validation=split_validation,
        seed=seed,
    )
    settings.check()
    parts = settings.parts(Path(output))
    job = _Job(
        settings=settings,
        sources=find_sources(inputs),
        parts=parts,
        streaming=streaming,
        workers=workers,
        progress=progress,
    )
    _refuse_output(job, Path(output))
    with _write_errors(Path(output)), locked(Path(output)):
        return _prepare(job, overwrite=overwrite)


def _prepare(job: _Job, *, overwrite: bool) -> PrepareResult:
    entries = tuple(_describe(source) for source in job.sources)
    stats = _stats(job.sources)
    request = job.settings.request()
    found = [
        finished(folder, request={**request, "part": part}, sources=entries, overwrite=overwrite)
        for part, folder in job.parts.items()
    ]
    if all(folder is not None for folder in found):
        for folder in job.parts.values():
            mark_finished(folder)
        return PrepareResult(folders=tuple(f for f in found if f is not None), already_done=True)
    for folder in job.parts.values():
        start_afresh(folder)
    facts = _make_tokenizer(job)
    shards, skipped = _write_shards(job, facts)
    if _stats(job.sources) != stats:
        raise DataError("an input file changed while it was read; run the same command again")
    for part, folder in job.parts.items():
        index = TokenIndex(
            vocab_size=facts.vocab_size,
            eos_token_id=facts.eos_token_id,
            shards=shards[part],
            tokenizer_sha256=facts.sha256,
            sources=entries,
            skipped=dict(sorted(skipped[part].items())),
            request={**request, "part": part},
            created_by=f"spectral_scale {__version__}",
        )
        sync_files(folder / TOKENIZER_FOLDER)
        write_index(folder, index)
        mark_finished(folder)
    return PrepareResult(
        folders=tuple(open_tokens(folder) for folder in job.parts.values()), already_done=False
    )


def _refuse_output(job: _Job, output: Path) -> None:
    nested = tuple(name for name, folder in job.parts.items() if folder != output)
    refuse_foreign(output, allowed=nested)
    for folder in job.parts.values():
        refuse_foreign(folder)
        tokenizer = job.settings.tokenizer
        if tokenizer is not None and tokenizer.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"--tokenizer {tokenizer} lies in the output folder {folder}, which is written "
                "anew; copy it elsewhere or choose another output folder"
            )


@contextmanager
def _write_errors(output: Path) -> Iterator[None]:
    """Inputs' errors are named where they are read; what remains is the output's."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or output}: cannot be written ({error.strerror or error}); nothing "
            "was finished there, run the same command again once this is solved"
        ) from error


def _describe(source: Source) -> SourceEntry:
    if source.path is None:
        return SourceEntry(file=source.name)
    size = source.path.stat().st_size
    return SourceEntry(file=source.name, bytes=size, sha256=file_sha256(source.path))


def _stats(sources: Sequence[Source]) -> list[tuple[int, int]]:
    found = [source.path.stat() for source in sources if source.path is not None]
    return [(stat.st_size, stat.st_mtime_ns) for stat in found]


def _make_tokenizer(job: _Job) -> TokenizerFacts:
    first, *others = [folder / TOKENIZER_FOLDER for folder in job.parts.values()]
    if job.settings.tokenizer is not None:
        facts = install_tokenizer(job.settings.tokenizer, first)
    else:
        facts = train_bpe_tokenizer(
            _training_texts(job), vocab_size=job.settings.train_bpe or 0, target=first
        )
    for other in others:
        shutil.copytree(first, other)
    return facts


def _training_texts(job: _Job) -> Iterator[str]:
    """Pieces of the documents that are not held out, chosen by hash when there is too much."""
    sizes = [source.path.stat().st_size for source in job.sources if source.path is not None]
    share = min(1.0, BPE_SAMPLE_BYTES / max(1, sum(sizes)))
    taken = pieces = 0
    with _bar(job, "training the tokenizer") as bar:
        for number, record in enumerate(job.records()):
            bar.update(len(record.data or b""))
            if job.settings.part_of(number) == "valid":
                continue
            for piece in cut_pieces(_usable_text(job, record), _BPE_PIECE_CHARACTERS):
                pieces += 1
                if taken < BPE_SAMPLE_BYTES and hash64(pieces) < share * 2.0**64:
                    taken += len(piece)
                    yield piece


def _usable_text(job: _Job, record: Record) -> str:
    try:
        return extract_text(record, job.settings.text_field)
    except BadDocument as error:
        _stop_unless_skipped(job, error.reason, str(error))
        return ""


def _write_shards(
    job: _Job, facts: TokenizerFacts
) -> tuple[dict[str, tuple[ShardEntry, ...]], dict[str, Counter[str]]]:
    writers = {
        part: TokenWriter(
            folder,
            vocab_size=facts.vocab_size,
            eos_token_id=facts.eos_token_id,
            shard_tokens=job.settings.shard_tokens,
        )
        for part, folder in job.parts.items()
    }
    skipped: dict[str, Counter[str]] = {part: Counter() for part in job.parts}
    try:
        for number, document in enumerate(_encoded(job, facts)):
            part = job.settings.part_of(number)
            if document.ids is not None:
                writers[part].append(document.ids)
            elif document.reason is not None:
                _stop_unless_skipped(job, document.reason, document.message)
                skipped[part][document.reason] += 1
                if sum(map(Counter.total, skipped.values())) <= _SKIPS_LOGGED:
                    logger.warning("left out: %s", document.message)
        shards = {part: writer.close() for part, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    for part in job.parts:
        _refuse_nothing(job, part, shards[part], sum(skipped.values(), Counter()))
    return shards, skipped


def _encoded(job: _Job, facts: TokenizerFacts) -> Iterator[EncodedDocument]:
    first = next(iter(job.parts.values()))
    settings = EncodeSettings(
        tokenizer_file=first / TOKENIZER_FOLDER / TOKENIZER_NAME,
        vocab_size=facts.vocab_size,
        text_field=job.settings.text_field,
    )
    with _bar(job, "preparing") as bar:
        for document in encode_records(job.records(), settings, workers=job.workers):
            bar.update(document.input_bytes)
            yield document


def _stop_unless_skipped(job: _Job, reason: str, message: str) -> None:
    if reason != "empty_document" and job.settings.on_bad == "error":
        raise DataError(f"{message}; fix the input, or leave such out with --on-bad skip")


def _refuse_nothing(
    job: _Job, part: str, shards: tuple[ShardEntry, ...], skipped: Counter[str]
) -> None:
    if shards:
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    if part == "all":
        raise DataError(
            f"{job.sources[0].name}{' ...' if len(job.sources) > 1 else ''}: no usable document in "
            f"the inputs ({counts or 'they are empty'})"
        )
    raise DataError(
        f"--split-validation {job.settings.split_validation} leaves no document for {part!r} "
        f"(left out: {counts or 'none'}); give more documents, another share or another --seed"
    )


def _bar(job: _Job, what: str) -> "tqdm[Any]":
    plain = all(source.suffix in (".txt", ".jsonl") for source in job.sources)
    sizes = [source.path.stat().st_size for source in job.sources if source.path is not None]
    return tqdm(
        desc=what,
        total=sum(sizes) if plain else None,
        unit="B",
        unit_scale=True,
        disable=None if job.progress else True,
    )
