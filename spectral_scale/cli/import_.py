"""`spectral-scale import FOLDER`: check that a transformers folder can be trained from."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_scale.cli.arguments import add_device, add_format, positive, require_one_process
from spectral_scale.config.schema import SpectralConfig

if TYPE_CHECKING:
    from spectral_scale.artifacts.import_folder import ImportResult

DESCRIPTION = """Check a local transformers folder (OPT or LLaMA) before training from it.

Nothing is copied: a run reads the folder itself, as `model: {path: FOLDER}`. This command shows
that it will do so rightly: every weight is there as safetensors, and the model built here, dense
and converted to SST, gives the logits of transformers' own from_pretrained to float32 rounding."""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "import",
        help="check a transformers folder before training from it",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="local transformers folder")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="token folder to compare on; its tokenizer must be the model's (random ids)",
    )
    parser.add_argument(
        "--spectral-rank",
        type=positive,
        default=SpectralConfig.spectral_rank,
        metavar="R",
        help=f"rank to convert with ({SpectralConfig.spectral_rank})",
    )
    parser.add_argument(
        "--dense-only", action="store_true", help="skip the conversion to SST and its SVDs"
    )
    add_device(parser)
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the folder's contents, the differences and how to train from it. Returns 0."""
    from spectral_scale.artifacts.import_folder import ImportRequest, check_import

    require_one_process("import")
    request = ImportRequest(
        folder=arguments.folder,
        data=arguments.data,
        spectral_rank=None if arguments.dense_only else arguments.spectral_rank,
        device=arguments.device,
    )
    result = check_import(request)
    model = {"path": str(arguments.folder), "sequence_length": result.sequence_length}
    if arguments.format == "json":
        print(json.dumps(asdict(result) | {"model": model}))
    else:
        _print(request.spectral_rank, result, model)
    return 0


def _print(spectral_rank: int | None, result: "ImportResult", model: dict[str, Any]) -> None:
    a, weights = result.architecture, result.weights
    tied = "tied" if a.tied_embeddings else "separate"
    print(
        f"{model['path']}: {a.family}, {weights.parameters / 1e6:.1f} M weights "
        f"({', '.join(weights.dtypes)}), {a.num_layers} blocks of width {a.hidden_size}, "
        f"{a.vocab_size} tokens, {a.max_positions} positions, {tied} embeddings"
    )
    if weights.unused:
        shown = ", ".join(weights.unused[:5]) + (" ..." if len(weights.unused) > 5 else "")
        print(f"not used ({len(weights.unused)}): {shown}")
    print(f"logits against transformers at {result.dense.positions} positions, on", end=" ")
    print(f"{result.compared_on} (tolerance {result.dense.tolerance:.3g}):")
    print(f"  dense:  at most {result.dense.max_abs:.3g} of {result.dense.largest:.3g}")
    if result.converted is not None:
        print(
            f"  as SST: at most {result.converted.max_abs:.3g} "
            f"({result.layers} matrices, r = {spectral_rank})"
        )
    print("train from it with")
    print(f"  model:\n    path: {model['path']}\n    sequence_length: {model['sequence_length']}")
    if result.tokenizer == "not checked":
        print(
            "and with data prepared by its own tokenizer: "
            f"spectral-scale prepare --tokenizer {model['path']} ..."
        )
