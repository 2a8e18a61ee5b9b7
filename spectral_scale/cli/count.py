"""`spectral-scale count MODEL...`: how many parameters each method trains at a time."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectral_scale.config.check import check_spectral
from spectral_scale.config.methods import METHOD_SPECS, chosen_spec
from spectral_scale.config.presets import PRESETS, Architecture, resolve_architecture
from spectral_scale.config.schema import ModelConfig, SpectralConfig
from spectral_scale.errors import ConfigError

DESCRIPTION = (
    "Count the parameters that train at a time, embeddings and norms included unless they are "
    "frozen, for full training, LoRA (ReLoRA has as many), SST in both storages and, given "
    "--sparsity, FRoD. Models are presets "
    f"({', '.join(PRESETS)}) or local transformers folders; nothing is loaded."
)


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "count", help="count the parameters each method trains", description=DESCRIPTION
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a preset or a folder")
    parser.add_argument("--spectral-rank", type=int, metavar="R", help="spectral.spectral_rank")
    parser.add_argument("--sparsity", type=float, metavar="S", help="spectral.sparsity, for FRoD")
    parser.add_argument(
        "--targets", default="", metavar="A,B", help="spectral.targets: convert only these linears"
    )
    parser.add_argument(
        "--freeze-dense", action="store_true", help="spectral.train_dense=false: count factors only"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of the result")


def run(arguments: argparse.Namespace) -> int:
    """Print a row for each model and method. Raises ConfigError for unknown models and ranks."""
    variants = _variants(arguments)
    models = [_resolve(name, list(variants.values())) for name in arguments.models]
    rows = [
        row
        for name, (model, architecture) in zip(arguments.models, models, strict=True)
        for row in _count(name, model, architecture, variants)
    ]
    print(json.dumps(rows, indent=2) if arguments.format == "json" else _table(rows))
    return 0


def _variants(arguments: argparse.Namespace) -> dict[str, SpectralConfig]:
    """Find what is to be counted, by its name in the table. Raises ConfigError."""
    rank, sparsity = arguments.spectral_rank, arguments.sparsity
    if rank is None and sparsity is None:
        raise ConfigError("give --spectral-rank R (for LoRA and SST), --sparsity S (FRoD) or both")
    if rank is not None and rank < 1:
        raise ConfigError(f"--spectral-rank {rank} must be at least 1")
    if sparsity is not None and not 0 < sparsity <= 1:
        raise ConfigError(f"--sparsity {sparsity} must lie in (0, 1]")
    common: dict[str, Any] = {
        "targets": [name for name in arguments.targets.split(",") if name],
        "train_dense": not arguments.freeze_dense,
    }
    given: dict[str | None, dict[str, Any]] = {
        None: {},
        "spectral_rank": {} if rank is None else {"spectral_rank": rank},
        "sparsity": {} if sparsity is None else {"sparsity": sparsity},
    }
    chosen: dict[str, SpectralConfig] = {}
    for key, size in given.items():
        for spec in sorted(METHOD_SPECS.values(), key=lambda spec: spec.title):
            if spec.counted_by == key and (size or key is None):
                values = {"method": spec.name} | size | (common if spec.converts else {})
                chosen |= {
                    label: SpectralConfig(**values, **changes)
                    for label, changes in spec.counted.items()
                }
    return chosen


def _resolve(name: str, variants: list[SpectralConfig]) -> tuple[ModelConfig, Architecture]:
    is_folder = name not in PRESETS and Path(name).is_dir()
    model = ModelConfig(name=None, path=name) if is_folder else ModelConfig(name=name)
    architecture = resolve_architecture(replace(model, sequence_length=1))
    for spectral in variants:
        for problem in check_spectral(spectral, architecture, chosen_spec(spectral)):
            raise ConfigError(f"{name}: {problem}")
    return model, architecture


def _count(
    name: str,
    model: ModelConfig,
    architecture: Architecture,
    variants: dict[str, SpectralConfig],
) -> list[dict[str, Any]]:
    from spectral_scale.engine.counts import counts_of

    rows = []
    for variant, spectral in variants.items():
        counts = counts_of(architecture, model, spectral)
        by_rank = chosen_spec(spectral).counted_by == "spectral_rank"
        rows.append(
            {
                "model": name,
                "method": variant,
                "spectral_rank": spectral.spectral_rank if by_rank else None,
                "trained": counts.trained,
                "dense": counts.dense,
                "share": counts.trained_fraction,
            }
        )
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    width = max(len("model"), *(len(row["model"]) for row in rows))
    lines = [f"{'model':<{width}}  {'method':<12}  {'r':>5}  {'trained':>15}  {'share':>7}"]
    for row in rows:
        rank = "-" if row["spectral_rank"] is None else row["spectral_rank"]
        lines.append(
            f"{row['model']:<{width}}  {row['method']:<12}  {rank:>5}  {row['trained']:>15,}  "
            f"{100 * row['share']:>6.2f}%"
        )
    return "\n".join(lines)
