"""incidents.jsonl: what went wrong in a run and what was done about it, one object a line."""

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectral_scale.data.loader import TrainLoader  # needs torch; `status` reads without it

logger = logging.getLogger(__name__)

INCIDENTS_NAME = "incidents.jsonl"
MAX_SAMPLES = 64
"""Largest number of samples of a step that are named; `data_step` determines the others."""


def record(run_dir: Path, kind: str, step: int, **facts: Any) -> None:
    """Append one incident; rank 0 only. A failure to write is logged, never raised."""
    line = {"kind": kind, "step": step, "time": round(time.time(), 3)} | facts
    try:
        with open(run_dir / INCIDENTS_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        logger.warning("%s could not be written: %s", INCIDENTS_NAME, error)


def read_incidents(run_dir: Path) -> list[dict[str, Any]]:
    """Read all complete lines; without a file the list is empty."""
    found = []
    try:
        text = (run_dir / INCIDENTS_NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def step_data(loader: "TrainLoader", data_step: int) -> dict[str, Any]:
    """Which samples and documents a step's global batch holds, for people who look into it.

    `documents` are the numbers of the documents in which the samples begin, `token_offsets` where
    the samples begin in the token stream.
    """
    samples = loader.sample_ids(data_step)[:MAX_SAMPLES]
    offsets = samples * loader.sequence_length
    documents = loader.folder.document_starts.searchsorted(offsets, side="right") - 1
    return {
        "data_step": data_step,
        "samples": samples.tolist(),
        "token_offsets": offsets.tolist(),
        "documents": documents.tolist(),
    }
