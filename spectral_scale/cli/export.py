"""`spectral-scale export RUN --output FOLDER`: dense weights as a transformers folder."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_scale.cli.arguments import add_device, add_format, count_or_all, require_one_process
from spectral_scale.config.schema import DataConfig
from spectral_scale.errors import ConfigError

if TYPE_CHECKING:
    from spectral_scale.artifacts.export import ExportResult

DESCRIPTION = """Merge a run's weights into dense ones and write them as a transformers folder:
safetensors, config.json and the run's tokenizer.

It ends with a comparison: what transformers.AutoModelForCausalLM.from_pretrained loads from the
folder must give the training model's logits on validation tokens, to float32 rounding (at most
5e-5 of the largest logit). If it does not, the command fails and there is no folder."""

EPILOG = """examples:
  the newest good checkpoint of a run:
    spectral-scale export runs/first --output exported/first
  perplexity against the share of singular values kept, and a folder with 70 % of them:
    spectral-scale export runs/first --prune 1.0 0.9 0.7 0.5 --keep 0.7 --output exported/pruned"""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "export",
        help="write a run's model as a transformers folder",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", type=Path, metavar="RUN", help="run folder, or one checkpoint")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="the folder to make")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the stored weights (fp32)"
    )
    parser.add_argument(
        "--keep",
        type=float,
        default=1.0,
        metavar="FRACTION",
        help="store only this share of each matrix's singular values, the largest (1.0)",
    )
    parser.add_argument(
        "--prune",
        type=float,
        nargs="+",
        default=[],
        metavar="FRACTION",
        help="measure perplexity at these shares (pruning.json and pruning.md in the folder)",
    )
    parser.add_argument(
        "--sequences",
        type=count_or_all,
        default=DataConfig.validation_sequences,
        metavar="N|all",
        help=f"validation sequences for --prune ({DataConfig.validation_sequences})",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="token folder of the same tokenizer, instead of the run's validation data",
    )
    parser.add_argument(
        "--no-tokenizer",
        action="store_true",
        help="weights only; needs no data, compares on random token ids",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a FRoD run: write what it trained as an adapter, without the base weights",
    )
    add_device(parser)
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export, then print the comparison and the curve. Returns exit code 0."""
    # Imported here, because torch takes seconds, and `--help` and wrong arguments need none of it.
    from spectral_scale.artifacts.export import ExportRequest, export_run
    from spectral_scale.cli.progress import watch_batches

    require_one_process("export")
    if arguments.adapter:
        return _export_adapter(arguments)
    request = ExportRequest(
        target=arguments.target,
        output=arguments.output,
        dtype=arguments.dtype,
        keep=arguments.keep,
        prune=tuple(arguments.prune),
        data=arguments.data,
        with_tokenizer=not arguments.no_tokenizer,
        sequences=arguments.sequences,
        device=arguments.device,
    )
    result = export_run(request, watch_batches("pruning"))
    if arguments.format == "json":
        print(json.dumps(asdict(result), default=str))
    else:
        _print(request.dtype, request.keep, result)
    return 0


def _export_adapter(arguments: argparse.Namespace) -> int:
    from spectral_scale.artifacts.export_adapter import export_adapter

    if arguments.output is None:
        raise ConfigError("--adapter needs --output FOLDER")
    result = export_adapter(arguments.target, arguments.output, device=arguments.device)
    if arguments.format == "json":
        print(json.dumps(asdict(result), default=str))
        return 0
    print(f"step {result.step}: an adapter of {result.coefficients:,} trained coefficients")
    print(f"  base with adapter - trained: at most {_shown(result.difference)}")
    print(f"written: {result.output}")
    return 0


def _print(dtype: str, keep: float, result: "ExportResult") -> None:
    """The curve, and as many comparisons as there are models to compare.

    Without a folder, only the merged model was held against the one that trained. A folder of fp32
    weights, unpruned, must equal the trained model. Where bf16 or pruning were asked for, the
    folder must equal what was to be written, and its distance from the trained model is shown
    beside, as what the request cost.
    """
    if result.curve:
        from spectral_scale.artifacts.prune import curve_table

        print(curve_table(result.curve))
    print(f"step {result.step}: {result.merged} converted matrices merged into dense ones")
    shown = result.stored or result.merge
    print(f"logits compared at {shown.positions} positions on {result.compared_on}")
    if result.output is None or result.stored is None or result.trained is None:
        print(f"  merged - trained: at most {_shown(result.merge)}")
        return
    if dtype == "fp32" and keep == 1.0:
        print(f"  folder - trained: at most {_shown(result.trained)}")
    else:
        print(f"  folder - what was to be written: at most {_shown(result.stored)}")
        changed = [f"{keep:.3g} of the singular values"] if keep < 1 else []
        changed += ["bf16 weights"] if dtype == "bf16" else []
        moved = f"{result.trained.max_abs:.3g} of {result.trained.largest:.3g}"
        print(f"  folder - trained: at most {moved}, by {' and '.join(changed)}")
    print(f"written: {result.output}")


def _shown(difference: Any) -> str:
    return (
        f"{difference.max_abs:.3g} of {difference.largest:.3g} "
        f"(tolerance {difference.tolerance:.3g})"
    )
