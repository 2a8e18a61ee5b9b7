"""Command-line arguments that several commands share."""

import argparse

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.facts import detect_rank_facts


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute"
    )


def add_format(parser: argparse.ArgumentParser) -> None:
    """--format."""
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="how the result is printed"
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def count_or_all(text: str) -> int | None:
    """A number of at least 1, or None for `all`."""
    return None if text == "all" else positive(text)


def require_one_process(command: str) -> None:
    """Raise ConfigError under a launcher of several processes, which would repeat the work."""
    facts = detect_rank_facts()
    if facts.world_size > 1:
        raise ConfigError(
            f"{command} runs in one process, but {facts.source} says {facts.world_size}; "
            f"start it without a launcher: spectral-scale {command} ..."
        )
