"""`spectral-scale finetune`: `train` from the weights of a folder."""

import argparse
from typing import Any

from spectral_scale.cli import train
from spectral_scale.cli.arguments import load_run_config
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError

DESCRIPTION = """Fine-tune a local transformers folder (model.path), or resume the run that its
folder holds. Configuration, run folder, resume and reports are those of `train`; any method works
(full, sst, lora, frod ...), with or without the filter:
  spectral-scale finetune --config run.yaml --model.path exported/first --spectral.method frod
--spectral.train_dense false trains what the method adds and nothing else;
--data.examples 64 trains on 64 sequences of data.train."""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "finetune",
        help="train from the weights of a transformers folder",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train with the exit codes of `train`. Raises ConfigError without weights to start from."""
    if not (arguments.help_config or arguments.print_config):
        require_weights(load_run_config(arguments).config)
    return train.run(arguments)


def require_weights(config: RunConfig) -> None:
    """Raise ConfigError unless the run starts from the weights of a folder."""
    if config.model.path is None:
        raise ConfigError(
            "finetune starts from weights, and model.path is not given; set it to a transformers "
            "folder (`spectral-scale export RUN --output FOLDER` makes one), or use train"
        )
