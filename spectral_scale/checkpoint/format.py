"""The file format: chunks of logical tensors as safetensors, hashed while they are written.

Knows nothing of ranks, folders or manifests. safetensors' own `save_file` holds every tensor of a
file in host memory, hides the errno of a full disk and cannot hash what it writes; the format is a
length, a JSON header and raw bytes, so it is written here and read back by the library.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from spectral_scale.errors import CheckpointError
from spectral_scale.files.durable import fsync_descriptor
from spectral_scale.parallel.chunks import TensorChunk

DTYPE_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
MAX_FILE_BYTES = 4 * 2**30
"""A rank starts another file beyond this many tensor bytes."""
_BLOCK_BYTES = 16 * 2**20

FileOpener = Callable[[Path], BinaryIO]
"""Creates a file that must not exist yet, unbuffered; tests pass slow or failing ones."""


def create_file(path: Path) -> BinaryIO:
    """Open a new file for unbuffered writing."""
    return open(path, "xb", buffering=0)


def dtype_code(name: str, dtype: torch.dtype) -> str:
    """safetensors' name of a dtype. Raises CheckpointError for one that cannot be stored."""
    if dtype not in DTYPE_CODES:
        supported = ", ".join(str(d).removeprefix("torch.") for d in DTYPE_CODES)
        raise CheckpointError(f"{name}: dtype {dtype} cannot be stored; supported: {supported}")
    return DTYPE_CODES[dtype]


def split_into_files(chunks: Sequence[TensorChunk]) -> list[list[TensorChunk]]:
    """Group chunks in order, a new group where MAX_FILE_BYTES would be passed; none is empty."""
    groups: list[list[TensorChunk]] = []
    size = 0
    for chunk in chunks:
        if not groups or size + chunk.num_bytes > MAX_FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(chunk)
        size += chunk.num_bytes
    return groups


def encode_header(chunks: Sequence[TensorChunk]) -> bytes:
    """safetensors header: its length (8 bytes, little endian) and the JSON, padded to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for chunk in chunks:
        end = position + chunk.num_bytes
        header[chunk.key] = {
            "dtype": dtype_code(chunk.name, chunk.tensor.dtype),
            "shape": list(chunk.tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def write_chunks(
    path: Path, chunks: Sequence[TensorChunk], *, open_new: FileOpener = create_file
) -> str:
    """Write a new safetensors file, fsync it and return the sha256 of the bytes handed to the disk.

    One tensor at a time is copied to host memory. Wide elements come first, so that every tensor
    is aligned to its own element size.
    """
    ordered = sorted(chunks, key=lambda c: -c.tensor.element_size())
    return _write(path, _blocks(ordered), open_new=open_new)


def write_bytes(path: Path, data: bytes, *, open_new: FileOpener = create_file) -> str:
    """Write a new file, fsync it and return its sha256."""
    return _write(path, iter([memoryview(data)]), open_new=open_new)


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(chunks: Sequence[TensorChunk]) -> Iterator[memoryview]:
    yield memoryview(encode_header(chunks))
    for chunk in chunks:
        host = chunk.tensor.detach().cpu().contiguous().reshape(-1)
        data = host.view(torch.uint8).numpy().data
        for start in range(0, len(data), _BLOCK_BYTES):
            yield data[start : start + _BLOCK_BYTES]


def _write(path: Path, blocks: Iterator[memoryview], *, open_new: FileOpener) -> str:
    digest = hashlib.sha256()
    try:
        with open_new(path) as file:
            for block in blocks:
                digest.update(block)
                while len(block):
                    block = block[file.write(block) :]
            fsync_descriptor(file.fileno())
            _drop_from_cache(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return digest.hexdigest()


def _drop_from_cache(descriptor: int) -> None:
    """Ask for later reads to come from the disk, not from this write's pages in memory."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
