"""`spectral-scale COMMAND ...`: finds the command, turns errors into messages and exit codes."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from typing import Any

from spectral_scale import __version__
from spectral_scale.errors import ConfigError, SpectralScaleError
from spectral_scale.files.paths import user_path

COMMANDS = (
    "train",
    "finetune",
    "plan",
    "doctor",
    "prepare",
    "evaluate",
    "report",
    "export",
    "import",
    "count",
    "verify",
    "status",
    "stop",
    "bench",
    "slurm",
)
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; each adds itself and names its `run`."""
    parser = argparse.ArgumentParser(
        prog="spectral-scale",
        description="Pretrain language models through the spectrum of their weights.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"spectral-scale {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        _module(name).add_parser(commands)
    return parser


def _module(command: str) -> Any:
    """The command's file; `import` and other keywords have an underscore behind."""
    return import_module(f"spectral_scale.cli.{command}{'_' if iskeyword(command) else ''}")


def _expanded(word: str) -> str:
    """A word of the command line with `~` expanded, also after `--option=`, where shells do not."""
    option, equals, value = word.partition("=")
    if option.startswith("--") and equals and value.startswith("~"):
        return f"{option}={user_path(value, what=option)}"
    return user_path(word, what="argument") if word.startswith("~") else word


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code (0 done, 75 resumable, 78 configuration error)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file's name may hold bytes that are no UTF-8: shown as escapes, never a failure.
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = build_parser()
    try:
        words = [_expanded(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    except ConfigError as error:
        print(f"spectral-scale: error: {error}", file=sys.stderr)
        return error.exit_code
    parsed, rest = parser.parse_known_args(words)
    if rest and not getattr(parsed, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    parsed.overrides = rest
    try:
        code: int = _module(parsed.command).run(parsed)
    except SpectralScaleError as error:
        print(f"spectral-scale {parsed.command}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
