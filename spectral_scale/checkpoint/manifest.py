"""manifest.json: the contents of a checkpoint, the location of each chunk, and their hashes.

Everything read from disk is checked before it is used: a manifest may be damaged or hostile.

A 4 x 3 matrix `w` in fp32, of which rank 0 has written rows 0 and 1, and rank 1 rows 2 and 3:

    "files":   {"rank_00000.safetensors": {"bytes": 128, "sha256": "..."},
                "rank_00001.safetensors": {"bytes": 128, "sha256": "..."}}
    "tensors": {"w": {"dtype": "F32", "shape": [4, 3], "chunks": [
        {"file": "rank_00000.safetensors", "key": "w@0,0", "offset": [0, 0], "shape": [2, 3]},
        {"file": "rank_00001.safetensors", "key": "w@2,0", "offset": [2, 0], "shape": [2, 3]}]}}

Invariant: the chunks of a tensor tile it, so that any rectangle of it can be put together from
them, and each of its elements stands in exactly one file.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from spectral_scale.checkpoint.format import DTYPES
from spectral_scale.checkpoint.strict_json import (
    canonical,
    expect,
    read_count,
    read_fields,
    read_mapping,
    read_shape,
    read_text,
)
from spectral_scale.errors import CheckpointError
from spectral_scale.files.json_text import parse_json
from spectral_scale.parallel.shard_geometry import Rectangle, Shape, tiling_fault

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
SUPPORTED_VERSIONS = (1,)
MAX_MANIFEST_BYTES = 256 * 2**20
# The name begins with no dot and holds no slash: the file is neither hidden nor outside the folder.
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One data file of the checkpoint."""

    bytes: int
    """Exact size."""
    sha256: str
    """Hash of all its bytes, in hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class ChunkEntry:
    """One rectangle of a logical tensor."""

    file: str
    """Name of the file in the checkpoint's folder."""
    key: str
    """Name of the tensor in that file."""
    offset: Shape
    """Offset of the rectangle in the logical tensor."""
    shape: Shape
    """Lengths of the rectangle."""

    @property
    def rectangle(self) -> Rectangle:
        """The part of the logical tensor it holds."""
        return Rectangle(self.offset, self.shape)


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One logical tensor; the chunks tile it exactly (none if it has no elements)."""

    dtype: str
    """safetensors' code: F32, BF16, I64, ..."""
    shape: Shape
    """Shape of the whole tensor."""
    chunks: tuple[ChunkEntry, ...]
    """The chunks that hold the elements of the tensor."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but the tensors' bytes."""

    step: int
    """Optimizer steps applied when it was written."""
    world_size: int
    """Number of ranks that wrote the checkpoint; any number may read it."""
    created: str
    """UTC time, ISO 8601."""
    package_version: str
    """Version of this package that wrote the checkpoint."""
    files: Mapping[str, FileEntry]
    """File entries by file name."""
    tensors: Mapping[str, TensorEntry]
    """Tensor entries by logical name."""
    state: dict[str, Any]
    """JSON values that continue the run: counters, schedule, data position."""
    identity: dict[str, Any]
    """JSON values that must match when the run is resumed."""


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json; `manifest_sha256` is the hash of everything else in it."""
    document = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    return canonical({**document, "manifest_sha256": _sha256(document)})


def manifest_sha256(manifest: Manifest) -> str:
    """The manifest's own hash; equal hashes mean equal checkpoints."""
    return _sha256({"format_version": FORMAT_VERSION, **asdict(manifest)})


def read_manifest(folder: Path) -> Manifest:
    """Read and check FOLDER/manifest.json. Raises CheckpointError with the first fault found."""
    data = _read_bounded(regular_file(folder, MANIFEST_NAME))
    try:
        return decode_manifest(data)
    except CheckpointError as error:
        raise CheckpointError(f"{MANIFEST_NAME}: {error}") from error


def decode_manifest(data: bytes) -> Manifest:
    """Parse manifest.json and check hash, version, types, names, and that chunks tile tensors."""
    document = _load(data)
    version = document.get("format_version")
    if version not in SUPPORTED_VERSIONS or isinstance(version, bool):
        supported = ", ".join(map(str, SUPPORTED_VERSIONS))
        raise CheckpointError(
            f"format_version is {version!r}; this version of the package reads {supported}; "
            "use the version that wrote the checkpoint"
        )
    _check_hash(document, data)
    manifest = _from_document(document)
    _check_tensors(manifest)
    return manifest


def regular_file(folder: Path, name: str) -> Path:
    """FOLDER/name, if that is a regular file inside the folder (no link, no device)."""
    path = folder / name
    if path.is_symlink():
        raise CheckpointError(f"{name}: a symbolic link; checkpoints hold only regular files")
    if not path.exists():
        raise CheckpointError(f"{name}: missing")
    if not path.is_file():
        raise CheckpointError(f"{name}: not a regular file")
    return path


def _sha256(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(document)).hexdigest()


def _read_bounded(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            # One byte more than allowed tells a file that is too long, without reading all of it.
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error}") from error
    if len(data) > MAX_MANIFEST_BYTES:
        limit = MAX_MANIFEST_BYTES // 2**20
        raise CheckpointError(f"{path.name}: larger than {limit} MiB; no checkpoint has this size")
    return data


def _load(data: bytes) -> dict[str, Any]:
    if not data:
        raise CheckpointError("empty")
    try:
        document = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON ({error}): truncated or damaged") from error
    return expect(document, dict, "the document")


def _check_hash(document: dict[str, Any], data: bytes) -> None:
    """Remove `manifest_sha256` from the document and verify the rest against it."""
    claimed = document.pop("manifest_sha256", None)
    # The hash covers values only. Spaces or another order of keys keep it, but not the bytes that
    # were written: `exact` refuses them, so equal hashes mean equal files.
    try:
        same = claimed == _sha256(document)
        exact = canonical({**document, "manifest_sha256": claimed}) == data
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"values that JSON cannot hold ({error}): edited") from error
    if not same:
        raise CheckpointError("its content does not match its own sha256: damaged or edited")
    if not exact:
        raise CheckpointError("not in canonical form: edited after it was written")


def _from_document(document: dict[str, Any]) -> Manifest:
    fields = {
        "step": read_count,
        "world_size": read_count,
        "created": read_text,
        "package_version": read_text,
        "files": _files,
        "tensors": lambda value, where: read_mapping(value, where, _tensor),
        "state": lambda value, where: expect(value, dict, where),
        "identity": lambda value, where: expect(value, dict, where),
    }
    values = read_fields(document, fields, "the document", also=("format_version",))
    return Manifest(**values)


def _files(value: Any, where: str) -> dict[str, FileEntry]:
    files = read_mapping(value, where, _file)
    for name in files:
        if not _FILE_NAME.fullmatch(name) or ".." in name:
            raise CheckpointError(
                f"file name {name!r} is not allowed: letters, digits and _ . - only, "
                "inside the folder, ending in .safetensors"
            )
    return files


def _file(value: Any, where: str) -> FileEntry:
    entry = FileEntry(**read_fields(value, {"bytes": read_count, "sha256": read_text}, where))
    if not _SHA256.fullmatch(entry.sha256):
        raise CheckpointError(f"{where}: {entry.sha256!r} is not a sha256")
    return entry


def _tensor(value: Any, where: str) -> TensorEntry:
    fields = {"dtype": read_text, "shape": read_shape, "chunks": _chunks}
    entry = TensorEntry(**read_fields(value, fields, where))
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {entry.dtype!r}; known: {', '.join(DTYPES)}")
    return entry


def _chunks(value: Any, where: str) -> tuple[ChunkEntry, ...]:
    fields = {"file": read_text, "key": read_text, "offset": read_shape, "shape": read_shape}
    items = expect(value, list, where)
    return tuple(
        ChunkEntry(**read_fields(item, fields, f"{where}[{i}]")) for i, item in enumerate(items)
    )


def _check_tensors(manifest: Manifest) -> None:
    for name, tensor in manifest.tensors.items():
        if fault := tiling_fault([chunk.rectangle for chunk in tensor.chunks], tensor.shape):
            raise CheckpointError(f"tensor {name}: {fault}")
        for chunk in tensor.chunks:
            _check_chunk(manifest, f"tensor {name}", chunk, DTYPES[tensor.dtype].itemsize)


def _check_chunk(manifest: Manifest, where: str, chunk: ChunkEntry, itemsize: int) -> None:
    if chunk.file not in manifest.files:
        raise CheckpointError(f"{where}: its file {chunk.file!r} is not in the list of files")
    # An upper bound, since a file has a header and may hold other chunks. The reader compares the
    # shape with that header before it takes any element.
    if prod(chunk.shape) * itemsize > manifest.files[chunk.file].bytes:
        raise CheckpointError(f"{where}: shape {list(chunk.shape)} is larger than {chunk.file}")
