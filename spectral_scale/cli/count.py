"""`spectral-scale count MODEL...`: how many parameters each method trains at a time."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectral_scale.config.check import check_spectral_rank
from spectral_scale.config.presets import PRESETS, Architecture, resolve_architecture
from spectral_scale.config.schema import ModelConfig, SpectralConfig
from spectral_scale.errors import ConfigError

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "sst residual": {"method": "sst", "storage": "residual"},
    "sst factored": {"method": "sst", "storage": "factored"},
}
DESCRIPTION = (
    "Count the parameters that train at a time, embeddings and norms included, for full training, "
    "LoRA (ReLoRA has as many) and SST in both storages. Models are presets "
    f"({', '.join(PRESETS)}) or local transformers folders; nothing is loaded."
)


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "count", help="count the parameters each method trains", description=DESCRIPTION
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a preset or a folder")
    parser.add_argument(
        "--spectral-rank", type=int, required=True, metavar="R", help="spectral.spectral_rank"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of the result")


def run(arguments: argparse.Namespace) -> int:
    """Print a row a model and method; 0. Raises ConfigError for unknown models and ranks."""
    if arguments.spectral_rank < 1:
        raise ConfigError(f"--spectral-rank {arguments.spectral_rank} must be at least 1")
    spectral = SpectralConfig(spectral_rank=arguments.spectral_rank)
    models = [_resolve(name, spectral) for name in arguments.models]
    rows = [
        row
        for name, (model, architecture) in zip(arguments.models, models, strict=True)
        for row in _count(name, model, architecture, spectral)
    ]
    print(json.dumps(rows, indent=2) if arguments.format == "json" else _table(rows))
    return 0


def _resolve(name: str, spectral: SpectralConfig) -> tuple[ModelConfig, Architecture]:
    is_folder = name not in PRESETS and Path(name).is_dir()
    model = ModelConfig(name=None, path=name) if is_folder else ModelConfig(name=name)
    architecture = resolve_architecture(replace(model, sequence_length=1))
    for problem in check_spectral_rank(spectral, architecture):
        raise ConfigError(f"{name}: {problem}")
    return model, architecture


def _count(
    name: str, model: ModelConfig, architecture: Architecture, spectral: SpectralConfig
) -> list[dict[str, Any]]:
    from spectral_scale.engine.counts import counts_of

    rows = []
    for variant, changes in VARIANTS.items():
        counts = counts_of(architecture, model, replace(spectral, **changes))
        rows.append(
            {
                "model": name,
                "method": variant,
                "spectral_rank": None if variant == "full" else spectral.spectral_rank,
                "trained": counts.trained,
                "dense": counts.dense,
                "share": counts.share,
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
