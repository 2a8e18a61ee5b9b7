"""Reading a checkpoint: any rectangle of any tensor, whatever rectangles it was written as.

Of a 4 x 3 matrix whose rows 0 and 1 are one chunk and rows 2 and 3 another, a rank wants rows 1
and 2, the rectangle (1, 0) of shape 2 x 3:

    chunk            common with the rectangle   rows of the chunk   rows of the result
    (0, 0)  2 x 3    (1, 0)  1 x 3               1                   0
    (2, 0)  2 x 3    (2, 0)  1 x 3               0                   1

The manifest was checked: the chunks tile the matrix, so every element of the result is written.
"""

import difflib
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spectral_scale.checkpoint.format import DTYPES, hash_file
from spectral_scale.checkpoint.manifest import (
    ChunkEntry,
    FileEntry,
    Manifest,
    TensorEntry,
    read_manifest,
    regular_file,
)
from spectral_scale.checkpoint.names import step_of
from spectral_scale.errors import CheckpointError
from spectral_scale.parallel.shard_geometry import Rectangle, Shape, outside

_HASH_THREADS = 4


class CheckpointReader:
    """An open checkpoint. Every rank may read it, at any world size; reads are not collective."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._open_files: dict[str, Any] = {}

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Self:
        """Read the manifest of the folder `path` and, with `verify`, hash every file.

        Raises CheckpointError naming the file and the fault. Unverified, only the manifest is
        checked; damage in a data file may then go unnoticed.
        """
        path = Path(path)
        manifest = read_manifest(path)
        named = step_of(path.name)
        if named is not None and named != manifest.step:
            raise CheckpointError(
                f"{path.name} holds the checkpoint of step {manifest.step}: the folder was renamed"
            )
        reader = cls(path, manifest)
        if verify:
            reader.verify()
        return reader

    @property
    def step(self) -> int:
        """Optimizer steps applied when it was written."""
        return self.manifest.step

    @property
    def state(self) -> dict[str, Any]:
        """JSON values that continue the run."""
        return self.manifest.state

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that must match when the run is resumed."""
        return self.manifest.identity

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, Shape]]:
        """dtype and shape of every logical tensor."""
        return {name: (DTYPES[t.dtype], t.shape) for name, t in self.manifest.tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Size of all data files."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def verify(self, names: Collection[str] | None = None) -> None:
        """Hash the files named (default: all). Raises CheckpointError naming the first bad one."""
        verify_files(self.path, self.manifest.files, names)

    def read(self, name: str, offset: Shape | None = None, shape: Shape | None = None) -> Tensor:
        """The rectangle [offset, offset + shape) of a logical tensor, by default all of it.

        Returns a new CPU tensor; only the chunks that meet the rectangle are read, and of them
        only the elements inside. Raises CheckpointError for an unknown name or a rectangle that
        is not inside the tensor.
        """
        entry = self._entry(name)
        wanted = _rectangle(name, entry.shape, offset, shape)
        result = torch.empty(wanted.shape, dtype=DTYPES[entry.dtype])
        for chunk in entry.chunks:
            common = wanted.intersect(chunk.rectangle)
            if common is not None:
                part = self._read_chunk(chunk, entry.dtype, common)
                result[common.slices_in(wanted)].copy_(part)
        return result

    def close(self) -> None:
        """Close all open files; reading reopens them."""
        self._open_files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _entry(self, name: str) -> TensorEntry:
        entry = self.manifest.tensors.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, self.manifest.tensors, n=3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise CheckpointError(f"{self.path.name} holds no tensor {name!r}{hint}")
        return entry

    def _file(self, name: str) -> Any:
        if name not in self._open_files:
            path = regular_file(self.path, name)
            self._open_files[name] = safe_open(path, framework="pt", device="cpu")
        return self._open_files[name]

    def _read_chunk(self, chunk: ChunkEntry, dtype: str, part: Rectangle) -> Tensor:
        try:
            file = self._file(chunk.file)
            stored = file.get_slice(chunk.key)
            found = (stored.get_dtype(), tuple(stored.get_shape()))
            if found != (dtype, chunk.shape):
                raise CheckpointError(
                    f"{chunk.file}: {chunk.key} is {found[0]} {list(found[1])} but the manifest "
                    f"says {dtype} {list(chunk.shape)}"
                )
            # safetensors takes no slice of a tensor that has no dimensions.
            if not chunk.shape:
                return file.get_tensor(chunk.key)
            return stored[part.slices_in(chunk.rectangle)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / chunk.file}: {chunk.key}: {error}") from error


def verify_files(
    folder: Path, files: Mapping[str, FileEntry], names: Collection[str] | None = None
) -> None:
    """Hold FOLDER's files against size and sha256. Raises CheckpointError on the first fault."""
    chosen = sorted(files if names is None else names)
    threads = max(1, min(_HASH_THREADS, os.cpu_count() or 1, len(chosen)))
    with ThreadPoolExecutor(threads) as pool:
        # `map` answers in the order of the names: which fault is named depends on no thread.
        for fault in pool.map(lambda name: _file_fault(folder, name, files[name]), chosen):
            if fault:
                pool.shutdown(cancel_futures=True)
                raise CheckpointError(fault)


def _file_fault(folder: Path, name: str, entry: FileEntry) -> str | None:
    try:
        path = regular_file(folder, name)
        size = path.stat().st_size
        if size != entry.bytes:
            return (
                f"{name}: has {size} bytes, the manifest says {entry.bytes}: truncated or changed"
            )
        if hash_file(path) != entry.sha256:
            return f"{name}: its sha256 differs from the manifest's: damaged or changed"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{name}: cannot be read: {error}"
    return None


def _rectangle(
    name: str, global_shape: Shape, offset: Shape | None, shape: Shape | None
) -> Rectangle:
    start = (0,) * len(global_shape) if offset is None else tuple(offset)
    if shape is None:
        # An offset of the wrong length is reported by `outside` below, in words.
        shape = tuple(n - o for n, o in zip(global_shape, start, strict=False))
    wanted = Rectangle(start, tuple(shape))
    if fault := outside(wanted, global_shape):
        raise CheckpointError(f"{name}: {fault}")
    return wanted
