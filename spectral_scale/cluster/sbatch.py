"""A job script for one configuration, made from those of slurm/."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from spectral_scale.errors import ConfigError
from spectral_scale.files.shipped import shipped_folder

SCRIPTS = {
    "srun": "pretrain.sbatch",
    "torchrun": "pretrain_torchrun.sbatch",
    "deepspeed": "pretrain_deepspeed.sbatch",
    "mpi": "pretrain_mpi.sbatch",
}
"""Launcher -> the script that uses it."""
ONE_TASK_A_NODE = frozenset(("torchrun", "deepspeed"))
"""Launchers that start a node's ranks themselves."""
MARK = "# <settings of a rendered script>\n"
FOLDER = shipped_folder("slurm")


def render(
    launcher: str,
    *,
    header: Mapping[str, str],
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path = FOLDER,
) -> str:
    """The script of `launcher`, with these settings in place of its own.

    Args:
        launcher: a key of `SCRIPTS`.
        header: sbatch's options without dashes -> values; new ones are added.
        arguments: of `spectral-scale train`.
        environment: variables that the script sets first.
        folder: where the scripts are.

    Raises:
        ConfigError: the folder is not there.
    """
    path = folder / SCRIPTS[launcher]
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); install spectral_scale again, from its "
            "wheel or its checkout"
        ) from None
    for option, value in header.items():
        text = _with_option(text, option, _one_line(option, value))
    values = {"SPECTRAL_SCALE_SLURM": str(folder.resolve())} | dict(environment)
    settings = [f"export {name}={shlex.quote(_one_line(name, v))}" for name, v in values.items()]
    settings += [f"set -- {shlex.join(arguments)}"] if arguments else []
    return text.replace(MARK, "\n".join(settings) + "\n", 1)


def _with_option(text: str, option: str, value: str) -> str:
    line = f"#SBATCH --{option}={value}"
    pattern = rf"^#SBATCH --{re.escape(option)}(=.*)?$"
    if re.search(pattern, text, flags=re.MULTILINE):
        return re.sub(pattern, line.replace("\\", r"\\"), text, count=1, flags=re.MULTILINE)
    return text.replace(MARK, f"{line}\n{MARK}", 1)


def _one_line(name: str, value: str) -> str:
    if not value.isprintable():
        raise ConfigError(f"{name}={value!r} must be one line of printable characters")
    return value


def tasks_a_node(launcher: str, ranks_a_node: int) -> int:
    """Value of --ntasks-per-node for the given number of ranks on each node."""
    return 1 if launcher in ONE_TASK_A_NODE else ranks_a_node
