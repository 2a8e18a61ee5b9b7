"""The memory of a start: what FSDP2 needs before the first step, against the plan."""

from typing import Any

from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.gpu_checks.findings import CheckFinding, recorded
from spectral_scale.gpu_checks.place import Place
from spectral_scale.gpu_checks.rank_processes import Ranks
from spectral_scale.gpu_checks.runs import make_corpus, words_of
from spectral_scale.gpu_checks.training import peak_figures
from spectral_scale.metrics.history import load_history
from spectral_scale.plan.build import RESERVED_BYTES, plan_run

SECONDS = 400.0
MOST_RANKS = 8


def check_start_peak(place: Place) -> CheckFinding:
    """A wide OPT on all GPUs of this machine: rank 0's peak after it was built and decomposed."""
    corpus, run_dir = make_corpus(place.folder / "corpus"), place.folder / "run"
    world_size = min(place.gpus, MOST_RANKS)
    changes: dict[str, Any] = {
        "parallel.backend": "fsdp2",
        "train.precision": "bf16",
        "train.steps": 1,
        "train.global_batch_size": world_size,
        "train.micro_batch_size": 1,
    }
    if not place.rehearsal:
        changes |= {
            "model.name": "opt-1.3b",
            "model.hidden_size": "null",
            "model.num_layers": 12,
            "model.num_heads": "null",
            "model.vocab_size": 50272,
            "spectral.spectral_rank": 64,
        }
    words = words_of(corpus, run_dir, place.device.type, changes)
    with Ranks(
        ["spectral_scale", "train", *words], world_size=world_size, folder=run_dir / "output"
    ) as ranks:
        codes = ranks.exit_codes(SECONDS)
        if codes != [0] * world_size:
            raise RuntimeError(f"the run ended with exit codes {codes}: {ranks.tails()}")
    first = load_history(run_dir).current()[0]
    peak = None if place.rehearsal else int(first["memory/peak_bytes"])
    run = resolve(load_config([], words).config, world_size=world_size)
    planned = plan_run(run, gpu_memory_bytes=80e9).start_peak_bytes - RESERVED_BYTES
    figures = peak_figures(f"start on {world_size} ranks", peak, planned)
    weights = recorded("weights of rank 0, MB", first["memory/weights_bytes"] / 1e6)
    return CheckFinding(figures=[*figures, weights])
