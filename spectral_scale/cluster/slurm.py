"""A job's hosts, tasks per host and port of its own, read from SLURM's variables."""

import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping

from spectral_scale.errors import ConfigError

SCONTROL_SECONDS = 10.0
_MAX_HOSTS = 100_000


def expand_hosts(nodelist: str) -> list[str]:
    """Host names of a SLURM node list such as `gpu[01-03,7],login1`, in its order.

    Raises ConfigError for what is no node list.
    """
    hosts: list[str] = []
    for item in _split(nodelist):
        parts = re.split(r"\[([^\[\]]*)\]", item)
        if any(c in "[]" for part in parts[::2] for c in part) or not item:
            raise ConfigError(f"{nodelist!r} is no SLURM node list: {item!r} cannot be read")
        choices = [[p] if i % 2 == 0 else list(_numbers(p)) for i, p in enumerate(parts)]
        hosts += ["".join(c) for c in itertools.islice(itertools.product(*choices), _MAX_HOSTS)]
    return hosts


def _split(nodelist: str) -> list[str]:
    """Split a node list at the commas that are outside brackets."""
    return re.split(r",(?![^\[]*\])", nodelist.strip())


def _numbers(ranges: str) -> Iterator[str]:
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise ConfigError(f"[{ranges}] in a SLURM node list must hold numbers and ranges")
        stop = int(last or first)
        yield from (f"{i:0{len(first)}d}" for i in range(int(first), min(stop, _MAX_HOSTS) + 1))


def tasks_on_node(environment: Mapping[str, str]) -> int | None:
    """Tasks of this step on this host, from `2(x3),1` and the host's number; None if unsaid."""
    text, node = environment.get("SLURM_STEP_TASKS_PER_NODE"), environment.get("SLURM_NODEID")
    if text is None or node is None:
        return None
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            return None
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None


def node_address(host: str) -> str | None:
    """The address that SLURM itself reaches a node at, for names that resolve nowhere else."""
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        return None
    command = [scontrol, "--oneliner", "show", "node", host]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SCONTROL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\bNodeAddr=(\S+)", done.stdout)
    return found[1] if found else None
