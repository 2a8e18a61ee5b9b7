"""The equivalence matrix: every backend against one process, as a table.

    python tests/evidence/equivalence.py --output docs/equivalence.md

Trains a tiny OPT by SST in fp32 for ten steps, two swaps and a re-SVD among them, on 1 to 4
processes of this machine. Takes some minutes on two cores.
"""

import argparse
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from spectral_scale.data.prepare import prepare
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import Distance, distance
from spectral_scale.testing.tiny import tiny_config, train_tiny

BATCH = 48
SETTINGS: dict[str, Any] = {
    "train__steps": 10,
    "train__global_batch_size": BATCH,
    # Above rounding, which Adam would blow up to full steps.
    "optimizer__eps": 1e-5,
    # So low that sigma stays above zero, as in runs of useful length.
    "optimizer__spectral_lr": 1e-4,
}
FSDP2 = {"parallel__backend": "fsdp2"}
ZERO = {"parallel__backend": "deepspeed"}
OFFLOAD = {"parallel__offload": "cpu"}
BACKENDS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "FSDP2": FSDP2,
    "HSDP 2x2": FSDP2 | {"parallel__shard_group": 2},
    "FSDP2, residual replicated": FSDP2 | {"parallel__residual": "replicated"},
    "FSDP2, tensor parallel 2": FSDP2 | {"parallel__tensor_parallel": 2},
    **{f"ZeRO-{stage}": ZERO | {"parallel__zero_stage": stage} for stage in range(4)},
    "ZeRO-2 + offload": ZERO | {"parallel__zero_stage": 2} | OFFLOAD,
    "ZeRO-3 + offload": ZERO | {"parallel__zero_stage": 3} | OFFLOAD,
}
CASES = [(1, 4, 0.1, "residual"), (2, 1, 0.0, "factored"), (3, 4, 0.1, "residual")]
CASES += [(4, 4, 0.1, "factored"), (4, 1, 0.0, "residual")]
HEADER = ["backend", "processes", "accumulation", "clipping", "storage"]
HEADER += ["largest difference of a loss", "of a weight", "same triplets"]


def main() -> int:
    """Print the table, and write it if asked for; 1 if a row misses the bounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backends", nargs="*", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--output", type=Path, help="markdown file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = [_row(HEADER), _row(["---"] * len(HEADER))]
        print("\n".join(lines), flush=True)
        good = True
        for cells, found in _measure(Path(folder), arguments.backends):
            good &= found.loss < 1e-5 and found.indices_equal and found.steps_equal
            lines.append(_row([*cells, *_shown(found)]))
            print(lines[-1], flush=True)
    if arguments.output is not None:
        title = f"# Every backend against one process\n\n{(__doc__ or '').split(chr(10), 2)[2]}\n"
        arguments.output.write_text(title + "\n".join(lines) + "\n", encoding="utf-8")
    return 0 if good else 1


def _measure(folder: Path, backends: list[str]) -> Iterator[tuple[list[str], Distance]]:
    corpus = small_corpus(folder)
    alone: dict[tuple[float, str], dict[str, Any]] = {}
    for name in backends:
        for world, accumulation, clip, storage in CASES:
            shared = BACKENDS[name].get("parallel__tensor_parallel", 1)
            if (name.startswith("HSDP") and world != 4) or world % shared:
                continue
            settings = SETTINGS | {"optimizer__clip_grad_norm": clip, "spectral__storage": storage}
            if (clip, storage) not in alone:
                one = {"train__micro_batch_size": BATCH // 2} | settings
                config = tiny_config(corpus, folder / f"alone_{clip}_{storage}", **one)
                alone[clip, storage] = run_distributed(train_tiny, 1, config)[0]
            micro = {"train__micro_batch_size": BATCH // (world // shared * accumulation)}
            run_dir = folder / f"{name}_{world}_{accumulation}_{clip}_{storage}"
            config = tiny_config(corpus, run_dir, **(settings | BACKENDS[name] | micro))
            ranks = run_distributed(train_tiny, world, config, timeout_seconds=240)
            cells = [name, str(world), str(accumulation), "on" if clip else "off", storage]
            yield cells, distance(ranks, alone[clip, storage])


def _shown(found: Distance) -> list[str]:
    same = "yes" if found.indices_equal and found.steps_equal else "NO"
    return [f"{found.loss:.0e}", f"{found.weights:.0e}", same]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def small_corpus(folder: Path) -> Path:
    """A few sources of the standard library, prepared."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for name in ("argparse.py", "ast.py", "calendar.py"):
        texts.append(folder / f"{name}.txt")
        texts[-1].write_text((stdlib / name).read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    prepare(texts[1:], folder / "train", train_bpe=512, progress=False)
    tokenizer = folder / "train" / "tokenizer"
    prepare(texts[:1], folder / "valid", tokenizer=tokenizer, progress=False)
    return folder


if __name__ == "__main__":
    sys.exit(main())
