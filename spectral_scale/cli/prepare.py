"""`spectral-scale prepare`: text files or datasets to a token folder."""

import argparse
import json
import os

from spectral_scale.data.prepare import PrepareResult, prepare
from spectral_scale.data.prepare_settings import SHARD_TOKENS
from spectral_scale.data.tokens import TokenFolder
from spectral_scale.supervision.launcher_watch import end_with_launcher

_DESCRIPTION = """\
Turn text into a token folder: memory-mapped shards of token ids, an index with checksums, and
the tokenizer. The folder appears whole or not at all; running the same command again finds it
done, and an interrupted run starts over. A document is written as the ids of its text and one
end-of-text token: a begin-of-text token (LLaMA's <s>) or others that a tokenizer adds by itself are
left out, and text that spells a special token stays text.
"""

_EXAMPLES = """\
examples:
  a folder of JSON lines, with a byte-level BPE of 8192 entries trained on them:
    spectral-scale prepare --input texts/ --train-bpe 8192 --output prepared/train
  validation text with the same tokenizer:
    spectral-scale prepare --input valid.jsonl --tokenizer prepared/train --output prepared/valid
  a dataset of the Hugging Face hub, streamed, one document in a hundred held out
  (writes prepared/web/train and prepared/web/valid):
    spectral-scale prepare --input hf:HuggingFaceFW/fineweb:sample-10BT:train --streaming \\
        --tokenizer gpt2_tokenizer/ --split-validation 0.01 --output prepared/web
"""


def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> argparse.ArgumentParser:
    """Add the `prepare` command; its parsed arguments go to `run`."""
    parser = subparsers.add_parser(
        "prepare",
        help="turn text into token folders",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_inputs(parser)
    _add_choices(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Prepare, and print what was made. Errors propagate.

    Returns:
        The exit code, 0.
    """
    end_with_launcher()
    result = prepare(
        args.input,
        args.output,
        tokenizer=args.tokenizer,
        train_bpe=args.train_bpe,
        text_field=args.text_field,
        on_bad=args.on_bad,
        on_unknown=args.on_unknown,
        shard_tokens=args.shard_tokens,
        split_validation=args.split_validation,
        seed=args.seed,
        streaming=args.streaming,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    print(json.dumps(_summary(result), indent=1) if args.format == "json" else _text(result))
    return 0


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".txt (a file is one document) or .jsonl files, both also compressed (.gz, .bz2, .xz, "
        ".zst, .lz4), .parquet files, folders of these, or datasets as hf:NAME[:CONFIG][:SPLIT]",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the folder to make")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="a local tokenizer folder (transformers), or a token folder whose tokenizer is used",
    )
    tokenizer.add_argument(
        "--train-bpe",
        type=int,
        metavar="N",
        help="train a byte-level BPE tokenizer of N entries on the inputs",
    )


def _add_choices(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--text-field", default="text", metavar="NAME", help="field or column of the text (text)")
    add(
        "--on-bad",
        choices=("error", "skip"),
        default="error",
        help="an unusable document: stop and name it (error), or count and leave it out (skip)",
    )
    add(
        "--on-unknown",
        choices=("error", "skip"),
        default="error",
        help="a file of an unknown kind in a folder of inputs: refuse it (error), or pass over it "
        "with a warning (skip); README and hidden files are always passed over",
    )
    add(
        "--split-validation",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="hold out this share of the documents: OUTPUT/train and OUTPUT/valid are written",
    )
    add("--seed", type=int, default=0, help="chooses the documents held out (0)")
    add(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        metavar="N",
        help=f"tokens after which a shard is closed ({SHARD_TOKENS})",
    )
    add("--streaming", action="store_true", help="read datasets without downloading them first")
    add(
        "--workers",
        type=int,
        default=_usable_cores(),
        metavar="N",
        help="processes that tokenise (one a core); the result does not depend on it",
    )
    add("--overwrite", action="store_true", help="replace a token folder made from something else")
    add("--format", choices=("text", "json"), default="text", help="how the result is printed")


def _usable_cores() -> int:
    """Cores that this process may use: a job that was given 4 of 64 starts 4 workers, not 64."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _summary(result: PrepareResult) -> dict[str, object]:
    """What `--format json` prints; two folders, `train` and `valid`, if documents were held out."""
    folders = [_folder_summary(folder) for folder in result.folders]
    return {"already_done": result.already_done, "folders": folders}


def _folder_summary(folder: TokenFolder) -> dict[str, object]:
    return {
        "folder": str(folder.path),
        "num_tokens": folder.num_tokens,
        "num_documents": folder.index.num_documents,
        "num_shards": len(folder.index.shards),
        "vocab_size": folder.vocab_size,
        "skipped": folder.index.skipped,
        "fingerprint": folder.fingerprint,
        "tokenizer_sha256": folder.tokenizer_sha256,
    }


def _text(result: PrepareResult) -> str:
    return "\n".join(_folder_text(folder, result.already_done) for folder in result.folders)


def _folder_text(folder: TokenFolder, already_done: bool) -> str:
    counts = [f"{count} {reason}" for reason, count in folder.index.skipped.items()]
    left_out = f", left out: {', '.join(counts)}" if counts else ""
    done = "already prepared, " if already_done else ""
    return (
        f"{folder.path}: {done}{folder.num_tokens:,} tokens in {folder.index.num_documents:,} "
        f"documents, vocabulary {folder.vocab_size:,}{left_out}"
    )
