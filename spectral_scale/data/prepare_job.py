"""The two passes of `prepare` over the documents: making the tokenizer, and writing tokens."""

import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spectral_scale.data.encode import EncodedDocument, EncodeSettings, cut_pieces, encode_records
from spectral_scale.data.order import hash64
from spectral_scale.data.prepare_settings import PrepareSettings
from spectral_scale.data.records import BadDocument, Record, extract_text
from spectral_scale.data.sources import Source, read_records
from spectral_scale.data.token_index import ShardEntry
from spectral_scale.data.tokenizer import (
    TokenizerFacts,
    install_tokenizer,
    train_bpe_tokenizer,
)
from spectral_scale.data.tokens import TOKENIZER_FOLDER, TOKENIZER_NAME
from spectral_scale.data.writer import TokenWriter
from spectral_scale.errors import DataError

logger = logging.getLogger(__name__)
BPE_SAMPLE_BYTES = 1 << 28
"""A tokenizer is trained on about this much text, spread over the inputs."""
_BPE_PIECE_CHARACTERS = 1 << 16
_SKIPS_LOGGED = 5


@dataclass(frozen=True, kw_only=True)
class Job:
    """One `prepare` under way."""

    settings: PrepareSettings
    """The checked request."""
    sources: Sequence[Source]
    """The inputs in the order in which they are read."""
    parts: Mapping[str, Path]
    """The folder of each part of the documents."""
    streaming: bool
    """Read datasets without downloading them first."""
    workers: int
    """Processes that tokenise."""
    progress: bool
    """Show a progress bar on a terminal."""

    def records(self) -> Iterator[Record]:
        """Every document of every source; its place here decides its part."""
        for source in self.sources:
            yield from read_records(
                source, text_field=self.settings.text_field, streaming=self.streaming
            )


def make_tokenizer(job: Job) -> TokenizerFacts:
    """Install or train the tokenizer, and give every part its copy.

    Raises:
        DataError: the tokenizer or a document cannot be used.
    """
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


def _training_texts(job: Job) -> Iterator[str]:
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


def _usable_text(job: Job, record: Record) -> str:
    try:
        return extract_text(record, job.settings.text_field)
    except BadDocument as error:
        _stop_unless_skipped(job, error.reason, str(error))
        return ""


def write_shards(
    job: Job, facts: TokenizerFacts
) -> tuple[dict[str, tuple[ShardEntry, ...]], dict[str, Counter[str]]]:
    """Tokenise every document into its part's shards.

    Returns:
        (shards, counts of what was left out by reason), each by part.

    Raises:
        DataError: a document that cannot be used (unless such are skipped), or an empty part.
    """
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


def _encoded(job: Job, facts: TokenizerFacts) -> Iterator[EncodedDocument]:
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


def _stop_unless_skipped(job: Job, reason: str, message: str) -> None:
    if reason != "empty_document" and job.settings.on_bad == "error":
        raise DataError(f"{message}; fix the input, or leave such out with --on-bad skip")


def _refuse_nothing(
    job: Job, part: str, shards: tuple[ShardEntry, ...], skipped: Counter[str]
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


def _bar(job: Job, what: str) -> "tqdm[Any]":
    plain = all(source.suffix in (".txt", ".jsonl") for source in job.sources)
    sizes = [source.path.stat().st_size for source in job.sources if source.path is not None]
    return tqdm(
        desc=what,
        total=sum(sizes) if plain else None,
        unit="B",
        unit_scale=True,
        disable=None if job.progress else True,
    )
