"""The run folder's file system: can a checkpoint be written there, and do all hosts see it?"""

import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from spectral_scale.doctor.findings import Finding, fault, ok, warning
from spectral_scale.files.durable import free_bytes, fsync_descriptor
from spectral_scale.parallel.collective import Collective

PROBE_BYTES = 16 << 20
SEEN_WITHIN_SECONDS = 10.0


def existing_parent(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(p for p in (folder, *folder.absolute().parents) if p.is_dir())


def examine_storage(
    folder: Path, collective: Collective, *, checkpoint_bytes: int, kept: int
) -> Iterator[Finding]:
    """Write a file as a checkpoint does, measure the speed, and check that other hosts see it.

    Collective. Nothing stays behind.

    Args:
        folder: where runs are to be written; it need not exist.
        collective: all ranks.
        checkpoint_bytes: of one checkpoint; 0 if unknown.
        kept: checkpoints kept at a time.
    """
    place = existing_parent(folder)
    probe = place / f".spectral_scale_probe_{collective.broadcast_json(secrets.token_hex(8))}"
    leads = collective.rank == 0
    mine = list(_write(place, probe, checkpoint_bytes, kept)) if leads else []
    collective.barrier()
    yield from mine
    if collective.world_size > 1 and collective.broadcast_json(probe.exists()):
        yield _seen(place, probe)
    collective.barrier()
    if leads:
        probe.unlink(missing_ok=True)


def _write(place: Path, probe: Path, checkpoint_bytes: int, kept: int) -> Iterator[Finding]:
    temporary = probe.with_suffix(".tmp")
    data = os.urandom(PROBE_BYTES)
    started = time.perf_counter()
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            flushes = fsync_descriptor(file.fileno())
        temporary.replace(probe)
        seconds = time.perf_counter() - started
        same = probe.read_bytes() == data
    except OSError as error:
        temporary.unlink(missing_ok=True)
        yield fault(
            "run folder",
            f"{place} cannot be written: {error.strerror}",
            "give --train.run_dir on a file system you may write to",
        )
        return
    if not same:
        yield fault("run folder", f"{place}: what was read is not what was written", "tell the "
                    "administrator of the file system; use another one")  # fmt: skip
        return
    yield ok(
        "run folder",
        f"{place}: {PROBE_BYTES / seconds / 1e6:.0f} MB/s "
        + ("with" if flushes else "without")
        + " fsync",
    )
    yield _space(place, checkpoint_bytes * (kept + 1))


def _space(place: Path, need: int) -> Finding:
    free = free_bytes(place)
    if free is None:
        return warning(
            "space",
            f"{place}: this file system does not tell its free space",
            "make sure by other means that the checkpoints fit",
        )
    text = f"{free / 1e9:.1f} GB free in {place}"
    if need > free:
        return fault(
            "space",
            f"{text}, {need / 1e9:.1f} GB needed for the checkpoints that are kept and one more",
            "free some, lower checkpoint.keep_last, or give --train.run_dir elsewhere",
        )
    if need > free / 2:
        return warning("space", f"{text}, {need / 1e9:.1f} GB needed", "watch it, or free some")
    return ok("space", f"{text}, {need / 1e9:.1f} GB needed" if need else text)


def _seen(place: Path, probe: Path) -> Finding:
    """File systems may show a new file late, but not never."""
    deadline = time.monotonic() + SEEN_WITHIN_SECONDS
    while True:
        os.listdir(place) if place.is_dir() else None  # makes NFS look again
        if probe.exists() and probe.stat().st_size == PROBE_BYTES:
            return ok("shared file system", f"{place} is the same folder as on rank 0")
        if time.monotonic() > deadline:
            return fault(
                "shared file system",
                f"{place} here is not the folder that rank 0 wrote to",
                "give --train.run_dir on a file system that all nodes share",
            )
        time.sleep(0.2)
