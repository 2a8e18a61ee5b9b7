"""Command-line arguments that several commands share."""

import argparse
import os

from spectral_scale.cluster.detect import LauncherFlags, detect
from spectral_scale.config.load import ResolvedConfig, load_config
from spectral_scale.errors import ConfigError


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option `--device`, which chooses where to compute."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute"
    )


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add the option `--format`, which chooses how the result is printed."""
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="how the result is printed"
    )


def add_run_config(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that describe a run: files, DeepSpeed's customary flags, --section.key."""
    parser.set_defaults(takes_overrides=True)
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file")
    parser.add_argument(
        "--deepspeed",
        nargs="?",
        const="",
        metavar="FILE",
        help="the same as --parallel.backend deepspeed; a FILE as --deepspeed_config gives it",
    )
    parser.add_argument(
        "--deepspeed_config",
        metavar="FILE",
        help="the same as --parallel.deepspeed_config: DeepSpeed's JSON (ds_configs/ has some)",
    )


def load_run_config(arguments: argparse.Namespace) -> ResolvedConfig:
    """The configuration that `add_run_config`'s arguments give. Raises ConfigError."""
    return load_config(arguments.config, _deepspeed_flags(arguments) + arguments.overrides)


def _deepspeed_flags(arguments: argparse.Namespace) -> list[str]:
    """DeepSpeed's customary flags as overrides; keys of ours, given too, win."""
    files = [f for f in (arguments.deepspeed, arguments.deepspeed_config) if f]
    if len(files) > 1 and files[0] != files[1]:
        raise ConfigError(f"--deepspeed {files[0]} and --deepspeed_config {files[1]}: give one")
    flags = [] if arguments.deepspeed is None and not files else ["--parallel.backend=deepspeed"]
    return flags + [f"--parallel.deepspeed_config={file}" for file in files[:1]]


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """Add the flags of rank and rendezvous, for launchers that set no environment variables."""
    group = parser.add_argument_group("ranks (found by themselves under every known launcher)")
    group.add_argument("--rank", type=int, metavar="R", help="0 to below the world size")
    group.add_argument("--world-size", type=int, metavar="N", help="processes of the run")
    for words, name, text in (
        (("--local-rank", "--local_rank"), "L", "position on this host"),
        (("--master-port", "--master_port"), "PORT", "port of the rendezvous"),
    ):
        group.add_argument(*words, type=int, metavar=name, help=text)
    group.add_argument("--master-addr", "--master_addr", metavar="HOST", help="rank 0's host")
    group.add_argument("--network-interface", metavar="NAME", help="for gloo and NCCL, as eth0")


def launcher_flags(arguments: argparse.Namespace) -> LauncherFlags:
    """The values of `add_launcher`'s arguments."""
    return LauncherFlags(
        rank=arguments.rank,
        world_size=arguments.world_size,
        local_rank=arguments.local_rank,
        master_addr=arguments.master_addr,
        master_port=arguments.master_port,
        network_interface=arguments.network_interface,
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
    found = detect(LauncherFlags(), os.environ)
    if found.world_size > 1:
        raise ConfigError(
            f"{command} runs in one process, but {found.source} says {found.world_size}; "
            f"start it without a launcher: spectral-scale {command} ..."
        )
