"""Documents to token ids, in this process or in several; the result does not depend on which."""

import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import numpy as np

from spectral_scale.data.records import BadDocument, Reason, Record, extract_text
from spectral_scale.errors import DataError

_PIECE_CHARACTERS = 1 << 20
_CHARACTERS_AT_ONCE = 1 << 22
"""A call's text: the tokenizer's own results take about 60 bytes a character until it returns."""
_BATCH_BYTES = 1 << 20
_BATCH_RECORDS = 1024
_BATCHES_AHEAD_PER_WORKER = 3
# After one line end between two visible characters: there, no common pre-tokenizer joins the sides.
_LINE_CUT = re.compile(r"(?<=\S\n)(?=\S)")
# Within a line, before a space or one sign between two letters: GPT-2's and LLaMA-3's
# pre-tokenizers begin a new part there. Other tokenizers are asked.
_INNER_CUT = re.compile(r"(?<=[^\W\d_])(?=(?: |[^\w\s])[^\W\d_])")
_CONTEXT_CHARACTERS = 200
_CUTS_TRIED = 50


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """All that an encoding process must know."""

    tokenizer_file: Path
    """The token folder's `tokenizer.json`."""
    vocab_size: int
    """Exclusive upper bound of the token ids."""
    text_field: str
    """The field of a JSON object that holds the text."""


@dataclass(frozen=True, kw_only=True)
class EncodedDocument:
    """The ids of one document (uint32, without end-of-text token), or why there are none."""

    ids: np.ndarray | None = None
    """The token ids, 1-D; None if the document cannot be used."""
    reason: Reason | None = None
    """The reason why the document cannot be used."""
    message: str = ""
    """The reason as a message for the user, with file and offset."""
    input_bytes: int = 0
    """Length of the document as read, in bytes."""


class DocumentEncoder:
    """Tokenises documents with one `tokenizer.json`."""

    def __init__(self, settings: EncodeSettings) -> None:
        from tokenizers import Tokenizer

        self._settings = settings
        self._tokenizer = Tokenizer.from_file(str(settings.tokenizer_file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text that spells a special token stays text: it cannot fake the end of a document.
        self._tokenizer.encode_special_tokens = True

    def encode(self, records: list[Record]) -> list[EncodedDocument]:
        """One result a record, in order."""
        texts: list[str | BadDocument] = [self._text(record) for record in records]
        good = [cut_pieces(text, is_safe=self._may_cut) for text in texts if isinstance(text, str)]
        arrays = iter(self._encode_pieces(good))
        return [
            self._result(record, text if isinstance(text, BadDocument) else next(arrays))
            for record, text in zip(records, texts, strict=True)
        ]

    def _text(self, record: Record) -> str | BadDocument:
        try:
            return extract_text(record, self._settings.text_field)
        except BadDocument as error:
            return error

    def _may_cut(self, before: str, after: str) -> bool:
        """Whether two neighbouring texts have the same ids apart as together."""
        found = self._tokenizer.encode_batch_fast(
            [before + after, before, after], add_special_tokens=False
        )
        together, *apart = (encoding.ids for encoding in found)
        return bool(together == [*apart[0], *apart[1]])

    def _encode_pieces(self, documents: list[list[str]]) -> Iterator[np.ndarray]:
        """Ids of each document; all pieces go through the tokenizer in a few large calls."""
        pieces = [piece for document in documents for piece in document]
        encoded = self._encode_all(pieces)
        for document in documents:
            yield np.concatenate(list(islice(encoded, len(document))))

    def _encode_all(self, pieces: list[str]) -> Iterator[np.ndarray]:
        for group in _groups(pieces):
            for found in self._tokenizer.encode_batch_fast(group, add_special_tokens=False):
                yield np.array(found.ids, dtype=np.uint32)

    def _result(self, record: Record, found: np.ndarray | BadDocument) -> EncodedDocument:
        size = len(record.data or b"")
        if isinstance(found, BadDocument):
            return EncodedDocument(reason=found.reason, message=str(found), input_bytes=size)
        if not found.size:
            message = f"{record.where}: the tokenizer makes no token of this text"
            return EncodedDocument(reason="empty_document", message=message, input_bytes=size)
        if int(found.max()) >= self._settings.vocab_size:
            message = (
                f"{record.where}: token id {found.max()}, beyond the tokenizer's vocabulary of "
                f"{self._settings.vocab_size}"
            )
            return EncodedDocument(reason="id_beyond_vocabulary", message=message, input_bytes=size)
        return EncodedDocument(ids=found, input_bytes=size)


def _groups(pieces: list[str]) -> Iterator[list[str]]:
    """The pieces in order, in lists of at most `_CHARACTERS_AT_ONCE`; a longer one stands alone."""
    group: list[str] = []
    size = 0
    for piece in pieces:
        if group and size + len(piece) > _CHARACTERS_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece)
    if group:
        yield group


def cut_pieces(
    text: str, size: int = _PIECE_CHARACTERS, *, is_safe: Callable[[str, str], bool] | None = None
) -> list[str]:
    """A long text in pieces of about `size` characters, so that encoding needs little memory.

    Cuts where a line ends between two visible characters, and in a line of more than `size`
    characters between two words. There byte-level BPE (GPT-2, OPT, LLaMA-3) gives the same ids as
    for the whole text; a tokenizer that marks the beginning of a text (SentencePiece) marks that
    of every line that begins a piece.

    Args:
        text: what to cut.
        size: characters of a piece, at least; up to twice as many where the text allows it.
        is_safe: whether a text may be cut between two words, asked with what stands before and
            after the place; None for byte-level BPE.
    """
    pieces = []
    start = 0
    while len(text) - start > size and (cut := _next_cut(text, start + size, size, is_safe)):
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def _next_cut(
    text: str, start: int, size: int, is_safe: Callable[[str, str], bool] | None
) -> int | None:
    """The next place to cut a text from `start` on; None if there is none."""
    near = _LINE_CUT.search(text, start, start + size)
    if near is not None:
        return near.start()
    for found in islice(_INNER_CUT.finditer(text, start), _CUTS_TRIED):
        cut = found.start()
        before, after = (
            text[max(0, cut - _CONTEXT_CHARACTERS) : cut],
            text[cut : cut + _CONTEXT_CHARACTERS],
        )
        if is_safe is None or is_safe(before, after):
            return cut
    far = _LINE_CUT.search(text, start)
    return None if far is None else far.start()


def encode_records(
    records: Iterable[Record], settings: EncodeSettings, *, workers: int
) -> Iterator[EncodedDocument]:
    """Encode documents in order; with `workers` > 1, in that many processes.

    Raises:
        DataError: a worker process died.
    """
    batches = _batches(records)
    if workers <= 1:
        encoder = DocumentEncoder(settings)
        for batch in batches:
            yield from encoder.encode(batch)
        return
    try:
        yield from _encode_in_processes(batches, settings, workers)
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} worker processes died, usually for lack of memory; use fewer "
            "--workers"
        ) from error


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.data or b"")
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_in_processes(
    batches: Iterator[list[Record]], settings: EncodeSettings, workers: int
) -> Iterator[EncodedDocument]:
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(settings,)
    )
    waiting: deque[Future[list[EncodedDocument]]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode_in_worker, batch))
            if len(waiting) >= workers * _BATCHES_AHEAD_PER_WORKER:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: DocumentEncoder | None = None


def _start_worker(settings: EncodeSettings) -> None:
    """Set up a worker: Ctrl-C is the main process's, one thread, gone when the parent is."""
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_encoder = DocumentEncoder(settings)


def _exit_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(batch: list[Record]) -> list[EncodedDocument]:
    if _worker_encoder is None:
        raise RuntimeError("the worker was not set up")
    return _worker_encoder.encode(batch)
