"""Plans what each rank writes and checks it beforehand. Pure: no files, no collectives."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from spectral_scale.checkpoint.format import dtype_code, encode_header, split_into_files
from spectral_scale.checkpoint.manifest import ChunkEntry, TensorEntry
from spectral_scale.errors import CheckpointError
from spectral_scale.parallel.chunks import TensorChunk
from spectral_scale.parallel.shard_geometry import outside, tiling_fault

FileGroups = list[tuple[str, list[TensorChunk]]]
"""Files of a rank: name and tensors of each."""


def check_chunks(chunks: Iterable[TensorChunk]) -> list[TensorChunk]:
    """The chunks as a list. Raises CheckpointError for a bad name, dtype, device or rectangle."""
    listed = list(chunks)
    for chunk in listed:
        _check_name(chunk.name)
        dtype_code(chunk.name, chunk.tensor.dtype)
        if chunk.tensor.is_meta:
            raise CheckpointError(
                f"{chunk.name}: a meta tensor has no values; materialise it first"
            )
        if fault := outside(chunk.rectangle, tuple(chunk.global_shape)):
            raise CheckpointError(f"{chunk.name}: {fault}")
    return listed


def group_files(rank: int, chunks: Sequence[TensorChunk]) -> FileGroups:
    """The files of one rank; chunks without elements need no place in any."""
    groups = split_into_files([chunk for chunk in chunks if chunk.tensor.numel() > 0])
    suffixes = ["", *(f"_{i}" for i in range(1, len(groups)))]
    return [
        (f"rank_{rank:05d}{suffix}.safetensors", group)
        for suffix, group in zip(suffixes, groups, strict=False)
    ]


def describe(chunks: Sequence[TensorChunk], files: FileGroups) -> dict[str, Any]:
    """A rank's part of the plan as JSON: bytes to write, its tensors, and where each chunk goes."""
    place = {id(chunk): name for name, group in files for chunk in group}
    tensors = []
    for chunk in chunks:
        entry = TensorEntry(
            dtype=dtype_code(chunk.name, chunk.tensor.dtype),
            shape=tuple(chunk.global_shape),
            chunks=_entries(chunk, place.get(id(chunk))),
        )
        tensors.append([chunk.name, asdict(entry)])
    return {"bytes": sum(_file_bytes(group) for _, group in files), "tensors": tensors}


def join_plans(plans: Sequence[dict[str, Any]]) -> dict[str, TensorEntry]:
    """One table of all ranks' tensors, by name.

    Raises CheckpointError where ranks disagree on dtype or shape, and where the chunks of a
    tensor do not tile it: every element must be written by exactly one rank.
    """
    joined: dict[str, TensorEntry] = {}
    for rank, plan in enumerate(plans):
        for name, raw in plan["tensors"]:
            entry = _parse(raw)
            known = joined.get(name, entry)
            if (known.dtype, known.shape) != (entry.dtype, entry.shape):
                raise CheckpointError(
                    f"{name}: rank {rank} has {entry.dtype} {list(entry.shape)}, an earlier chunk "
                    f"has {known.dtype} {list(known.shape)}; they must agree"
                )
            chunks = entry.chunks if name not in joined else known.chunks + entry.chunks
            joined[name] = TensorEntry(dtype=entry.dtype, shape=entry.shape, chunks=chunks)
    for name, entry in joined.items():
        _check_tiling(name, entry)
    return joined


def _check_tiling(name: str, entry: TensorEntry) -> None:
    fault = tiling_fault([chunk.rectangle for chunk in entry.chunks], entry.shape)
    if fault:
        files = ", ".join(sorted({chunk.file for chunk in entry.chunks})) or "no file"
        raise CheckpointError(f"{name} (in {files}): {fault}")


def _check_name(name: str) -> None:
    if not name or "@" in name or not name.isprintable() or name == "__metadata__":
        raise CheckpointError(
            f"tensor name {name!r} is not allowed: printable, not empty, without '@', "
            "and not __metadata__"
        )


def _entries(chunk: TensorChunk, file: str | None) -> tuple[ChunkEntry, ...]:
    if file is None:
        return ()
    rectangle = chunk.rectangle
    return (ChunkEntry(file=file, key=chunk.key, offset=rectangle.offset, shape=rectangle.shape),)


def _parse(raw: dict[str, Any]) -> TensorEntry:
    chunks = tuple(
        ChunkEntry(
            file=item["file"],
            key=item["key"],
            offset=tuple(item["offset"]),
            shape=tuple(item["shape"]),
        )
        for item in raw["chunks"]
    )
    return TensorEntry(dtype=raw["dtype"], shape=tuple(raw["shape"]), chunks=chunks)


def _file_bytes(chunks: Sequence[TensorChunk]) -> int:
    return len(encode_header(chunks)) + sum(chunk.num_bytes for chunk in chunks)
