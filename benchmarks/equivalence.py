"""The equivalence matrix: every backend against one process, as a table.

    python benchmarks/equivalence.py --output docs/equivalence.md

Trains a tiny OPT, and on megatron-core also a LLaMA with grouped-query attention, with SST in fp32
for ten steps that include two swaps and a re-SVD, on 1 to 8 processes of this machine. This takes
half an hour on two cores. TP: tensor-parallel ranks; SP: with sequence parallelism; DP: replicas.
On megatron-core, replicated tensors are also compared bit for bit after every step. Losses must
agree with those of one process within 1e-5; in bf16, where DeepSpeed computes everything in bf16
and one process only products, within 1e-3.

The rows in fp64 train for 45 steps that include two swaps and a re-SVD, and must agree within
1e-12: the backends compute the same, and what differs in fp32 is rounding alone. Rounding grows
with steps, rates and width in any training: [equivalence_rounding.md](equivalence_rounding.md)
measures how fast.
"""

import argparse
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from spectral_scale.data.prepare import prepare
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import Distance, distance
from spectral_scale.testing.megatron import train_in_turn_on_cpu
from spectral_scale.testing.tiny import save_tiny_llama, tiny_config, train_in_turn

BATCH = 48
SETTINGS: dict[str, Any] = {
    "train__steps": 10,
    "train__global_batch_size": BATCH,
    "model__num_heads": 4,
    # Above rounding errors, which Adam would otherwise amplify to full steps.
    "optimizer__eps": 1e-5,
    # Low enough that sigma stays above zero, as it does in runs of useful length.
    "optimizer__spectral_lr": 1e-4,
}
FSDP2 = {"parallel__backend": "fsdp2"}
ZERO = {"parallel__backend": "deepspeed"}
OFFLOAD = {"parallel__offload": "cpu"}
BF16 = {"train__precision": "bf16"}
FP64 = {"train__precision": "fp64"}
LONGER = {"train__steps": 45, "spectral__steps_per_iteration": 16}
"""Settings of the runs in fp64, which need not stay short: swaps after 16 and 32 steps, the second
with a re-SVD."""
BACKENDS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP in fp64": FP64,
    "FSDP2": FSDP2,
    "FSDP2 in fp64": FSDP2 | FP64,
    "HSDP 2x2": FSDP2 | {"parallel__shard_group": 2},
    "FSDP2, residual replicated": FSDP2 | {"parallel__residual": "replicated"},
    "FSDP2, tensor parallel 2": FSDP2 | {"parallel__tensor_parallel": 2},
    **{f"ZeRO-{stage}": ZERO | {"parallel__zero_stage": stage} for stage in range(4)},
    "ZeRO-1 in bf16 (BF16_Optimizer)": ZERO | {"parallel__zero_stage": 1} | BF16,
    "ZeRO-2 + offload": ZERO | {"parallel__zero_stage": 2} | OFFLOAD,
    "ZeRO-3 + offload": ZERO | {"parallel__zero_stage": 3} | OFFLOAD,
}
CASES = [(1, 4, 0.1, "residual"), (2, 1, 0.0, "factored"), (3, 4, 0.1, "residual")]
CASES += [(4, 4, 0.1, "factored"), (4, 1, 0.0, "residual")]
MEGATRON = {"Megatron, OPT": "opt", "Megatron, LLaMA": "llama"}
LARGEST = {"fp32": 1e-5, "bf16": 1e-3, "fp64": 1e-12}
"""Largest accepted difference of a loss, by precision."""
Shared = tuple[str, float, str, str]
"""Model, clipping, storage, precision."""
HEADER = ["backend", "processes", "accumulation", "clipping", "storage"]
HEADER += ["largest difference of a loss", "of a weight", "same triplets"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run on several processes: one row of the table."""

    backend: str
    processes: int
    accumulation: int
    clip: float
    storage: str
    parallel: dict[str, Any]
    """Settings of the run that the run in one process does not have."""
    model: str = "opt"

    @property
    def precision(self) -> str:
        """The precision of this run and of the run in one process."""
        return self.parallel.get("train__precision", "fp32")

    @property
    def alone(self) -> Shared:
        """The settings in common with the run in one process."""
        return self.model, self.clip, self.storage, self.precision

    def settings(self) -> dict[str, Any]:
        copies = self.processes // self.parallel.get("parallel__tensor_parallel", 1)
        micro = BATCH // (copies * self.accumulation)
        return self.parallel | {"train__micro_batch_size": micro}

    def cells(self) -> list[str]:
        clipping = "on" if self.clip else "off"
        return [
            self.backend, str(self.processes), str(self.accumulation), clipping, self.storage
        ]  # fmt: skip


def rows(name: str) -> Iterator[Row]:
    """The rows of one entry of BACKENDS or MEGATRON, ordered by number of processes."""
    if name in MEGATRON:
        yield from sorted(_megatron_rows(name), key=lambda row: row.processes)
        return
    for processes, accumulation, clip, storage in CASES:
        shared = BACKENDS[name].get("parallel__tensor_parallel", 1)
        if (name.startswith("HSDP") and processes != 4) or processes % shared:
            continue
        yield Row(
            backend=name,
            processes=processes,
            accumulation=accumulation,
            clip=clip,
            storage=storage,
            parallel=BACKENDS[name],
        )


def _megatron_rows(name: str) -> Iterator[Row]:
    """Every combination of layouts; sequence parallelism needs several tensor-parallel ranks."""
    for tensor, sequence, data, storage in product(
        (1, 2, 4), (False, True), (1, 2), ("residual", "factored")
    ):
        if sequence and tensor == 1:
            continue
        yield Row(
            backend=f"{name}: TP {tensor}{' SP' if sequence else ''} x DP {data}",
            processes=tensor * data,
            accumulation=3 - data,
            clip=0.1 if storage == "residual" else 0.0,
            storage=storage,
            parallel={
                "parallel__backend": "megatron",
                "parallel__tensor_parallel": tensor,
                "parallel__sequence_parallel": sequence,
                "health__replica_interval": 1,  # compares replicated tensors at every step
            },
            model=MEGATRON[name],
        )


def main() -> int:
    """Print the table and optionally write the page; return 1 if a row exceeds the bounds."""
    known = [*BACKENDS, *MEGATRON]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backends", nargs="*", default=known, choices=known)
    parser.add_argument("--output", type=Path, help="markdown file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = [_line(HEADER), _line(["---"] * len(HEADER))]
        print("\n".join(lines), flush=True)
        good = True
        for row, found in Measurement(Path(folder)).of(arguments.backends):
            good &= found.loss < LARGEST[row.precision]
            good &= found.indices_equal and found.steps_equal
            lines.append(_line([*row.cells(), *_shown(found)]))
            print(lines[-1], flush=True)
    if arguments.output is not None:
        title = f"# Every backend against one process\n\n{(__doc__ or '').split(chr(10), 2)[2]}\n"
        arguments.output.write_text(title + "\n".join(lines) + "\n", encoding="utf-8")
    return 0 if good else 1


class Measurement:
    """Runs several rows in the same processes, and the runs in one process to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.corpus = folder, small_corpus(folder)
        self._models: dict[str, dict[str, Any]] = {"opt": {}}
        self._models["llama"] = save_tiny_llama(folder / "llama", self.corpus)
        self._alone: dict[Shared, dict[str, Any]] = {}

    def of(self, backends: list[str]) -> Iterator[tuple[Row, Distance]]:
        """Yield each row with its distance from one process."""
        self._train_alone({row.alone for name in backends for row in rows(name)})
        for name in backends:
            train = train_in_turn_on_cpu if name in MEGATRON else train_in_turn
            for world, group in groupby(rows(name), key=lambda row: row.processes):
                together = list(group)
                runs = [(self._config(row.alone, row.settings()), None) for row in together]
                ranks = run_distributed(train, world, runs, timeout_seconds=500)
                for row, results in zip(together, zip(*ranks, strict=True), strict=True):
                    yield row, distance(results, self._alone[row.alone])

    def _train_alone(self, wanted: set[Shared]) -> None:
        keys = sorted(wanted)
        runs = [(self._config(key, {"train__micro_batch_size": BATCH // 2}), None) for key in keys]
        found = run_distributed(train_in_turn, 1, runs, timeout_seconds=500)[0]
        self._alone = dict(zip(keys, found, strict=True))

    def _config(self, shared: Shared, own: dict[str, Any]) -> Any:
        model, clip, storage, precision = shared
        common = {"optimizer__clip_grad_norm": clip, "spectral__storage": storage}
        common["train__precision"] = precision
        common |= LONGER if precision == "fp64" else {}
        run_dir = Path(tempfile.mkdtemp(dir=self.folder)) / "run"
        settings = SETTINGS | self._models[model] | common | own
        return tiny_config(self.corpus, run_dir, **settings)


def _shown(found: Distance) -> list[str]:
    same = "yes" if found.indices_equal and found.steps_equal else "NO"
    return [f"{found.loss:.0e}", f"{found.weights:.0e}", same]


def _line(cells: list[str]) -> str:
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
