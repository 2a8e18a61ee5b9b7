"""Text to token folders. `prepare` is the whole job; its steps are in visible order there."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spectral_scale import __version__
from spectral_scale.data.output_folder import (
    finished,
    locked,
    mark_finished,
    refuse_foreign,
    start_afresh,
)
from spectral_scale.data.prepare_job import Job, make_tokenizer, write_shards
from spectral_scale.data.prepare_settings import SHARD_TOKENS, OnBad, PrepareSettings
from spectral_scale.data.sources import OnUnknown, Source, find_sources
from spectral_scale.data.token_index import SourceEntry, TokenIndex
from spectral_scale.data.tokenizer import find_tokenizer
from spectral_scale.data.tokens import TOKENIZER_FOLDER, TokenFolder, file_sha256, open_tokens
from spectral_scale.data.writer import sync_files, write_index
from spectral_scale.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """The folder that `prepare` wrote, or found complete."""

    folders: tuple[TokenFolder, ...]
    """The output folder; with a split, its `train` and `valid` folders."""
    already_done: bool
    """The folders held exactly this before, and nothing was written."""


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    train_bpe: int | None = None,
    text_field: str = "text",
    on_bad: OnBad = "error",
    on_unknown: OnUnknown = "error",
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
    finds it done (files are known by their content, datasets by their name); after an
    interruption it starts over. The bytes do not depend on `workers`.

    Args:
        inputs: .txt (one document), .jsonl (both also .gz, .bz2, .xz, .zst and .lz4) and .parquet
            files, folders of these (links are followed), and datasets as
            `hf:NAME[:CONFIG][:SPLIT]`.
        output: the folder to make.
        tokenizer: a local tokenizer folder, or a token folder whose tokenizer is used.
        train_bpe: instead, train a byte-level BPE tokenizer of this vocabulary size on the inputs.
        text_field: the JSON field or table column that holds the text.
        on_bad: `error` stops at the first unusable document, `skip` counts and leaves it out.
            Empty documents are always left out and counted.
        on_unknown: `error` refuses a folder that holds files of an unknown kind, `skip` passes
            over them with a warning.
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
    job = Job(
        settings=settings,
        sources=find_sources(inputs, on_unknown=on_unknown),
        parts=parts,
        streaming=streaming,
        workers=workers,
        progress=progress,
    )
    _refuse_output(job, Path(output))
    with _write_errors(Path(output)), locked(Path(output)):
        return _prepare(job, overwrite=overwrite)


def _prepare(job: Job, *, overwrite: bool) -> PrepareResult:
    entries = tuple(_describe(source) for source in job.sources)
    _warn_of_copies(job.sources, entries)
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
    facts = make_tokenizer(job)
    shards, skipped = write_shards(job, facts)
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


def _refuse_output(job: Job, output: Path) -> None:
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


def _warn_of_copies(sources: Sequence[Source], entries: Sequence[SourceEntry]) -> None:
    """Name files of equal content: a shard that was given twice would be trained on twice."""
    first: dict[str, Source] = {}
    for source, entry in zip(sources, entries, strict=True):
        if entry.sha256 is None or not entry.bytes:
            continue
        other = first.setdefault(entry.sha256, source)
        if other is not source:
            logger.warning(
                "%s and %s have the same content, so that their documents are taken twice; leave "
                "one of them out unless this is meant",
                other.path,
                source.path,
            )


def _stats(sources: Sequence[Source]) -> list[tuple[int, int]]:
    found = [source.path.stat() for source in sources if source.path is not None]
    return [(stat.st_size, stat.st_mtime_ns) for stat in found]
