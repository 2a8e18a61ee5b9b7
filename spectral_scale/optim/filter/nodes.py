"""Plans the nodes: the groups of parameters that are filtered together, along which axis."""

import fnmatch
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from spectral_scale.config.families import linears_reading
from spectral_scale.config.schema import FilterConfig
from spectral_scale.errors import ConfigError
from spectral_scale.parallel.shard_geometry import Shape

logger = logging.getLogger(__name__)

ALIKE = ("matrix", "value", "mixing", "value_delta")
"""Parts whose entries mean the same in every layer: dense weights, sigma, FRoD's coefficients."""
OWN_BASES = (
    "directions (U, V) and low-rank factors of two matrices lie in bases of their own, so that "
    "entry ij of one has nothing to do with entry ij of the other"
)
ROW_HEADS = linears_reading("attention")
"""Linears whose rows are those of attention heads."""
COLUMN_HEADS = linears_reading("heads")
"""Linears whose columns are those of attention heads."""


@dataclass(frozen=True)
class Member:
    """A trained parameter, as planning sees it."""

    shape: Shape
    """Logical shape."""
    role: str
    """Role of the parameter; see `parallel.table.Role`."""


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """The nodes of one graph: parameters, or blocks of one parameter."""

    name: str
    """Unique: the parameter's fqn, its layer number replaced by * where the nodes are layers."""
    fqns: tuple[str, ...]
    """`layers`, `block_gains`: one a node, by depth; `rows`, `heads`: the one matrix."""
    num_nodes: int
    """Number of nodes, at least 2."""
    blocks: tuple[int, int, int] | None = None
    """`rows`, `heads`: the matrix seen as (before, nodes, after) in row-major order."""

    @property
    def kind(self) -> str:
        """Name of the group's kind in metrics: q_proj, fc1, q_proj.sigma, ..."""
        parts = self.name.removesuffix(".weight").split(".")
        return parts[-1] if self.name.endswith(".weight") else ".".join(parts[-2:])


def plan_groups(
    members: Mapping[str, Member], config: FilterConfig, *, head_size: int | None
) -> list[NodeGroup]:
    """The groups that a filter works on, in an order that does not depend on the rank.

    What is left out is logged with its reason.

    Args:
        members: trained parameters by fqn.
        config: `nodes` and `targets`.
        head_size: rows of one attention head; needed for `heads`.

    Raises:
        ConfigError: a target that is no trained parameter or cannot be filtered; nothing to filter.
    """
    chosen = _chosen(members, config)
    refused = {fqn: why for fqn in chosen if (why := _refusal(fqn, members[fqn], config.nodes))}
    if config.targets and refused:
        fqn, why = next(iter(refused.items()))
        raise ConfigError(f"filter.targets names {fqn}, which cannot be filtered: {why}")
    kept = {fqn: members[fqn] for fqn in chosen if fqn not in refused}
    if config.nodes == "heads" and head_size is None:
        raise ConfigError("filter.nodes=heads needs the size of an attention head: give head_size=")
    builders = {
        "layers": lambda: _layers(kept, refused),
        "rows": lambda: _rows(kept, refused),
        "heads": lambda: _heads(kept, refused, head_size or 1),
        "block_gains": lambda: _gains(kept, refused),
    }
    groups = list(builders[config.nodes]())
    _log_left_out(refused)
    if not groups:
        reasons = "; ".join(sorted(set(refused.values()))) or "no parameter was given"
        raise ConfigError(f"filter.nodes={config.nodes} finds nothing to filter: {reasons}")
    return groups


def _chosen(members: Mapping[str, Member], config: FilterConfig) -> list[str]:
    if not config.targets:
        return list(members)
    for pattern in config.targets:
        if not fnmatch.filter(members, pattern):
            raise ConfigError(
                f"filter.targets: {pattern!r} matches no trained parameter; there are "
                f"{', '.join(list(members)[:8])}, ..."
            )
    return [fqn for fqn in members if any(fnmatch.fnmatch(fqn, t) for t in config.targets)]


def _refusal(fqn: str, member: Member, nodes: str) -> str | None:
    """The reason why a parameter cannot be filtered with these nodes, or None."""
    if _layer(fqn) is None:
        return "it lies outside the numbered blocks (embeddings, output layer, last norm)"
    if member.role == "vector":
        return "norms and biases are not filtered"
    if nodes == "block_gains":
        return None
    if member.role in ("direction", "factor"):
        return OWN_BASES + "; filter.nodes=block_gains works for them"
    if nodes in ("rows", "heads") and (member.role != "matrix" or len(member.shape) != 2):
        return f"filter.nodes={nodes} needs dense matrices; use layers or block_gains"
    return None if member.role in ALIKE else f"parameters of role {member.role} are not filtered"


def _layers(kept: Mapping[str, Member], refused: dict[str, str]) -> Iterator[NodeGroup]:
    """Groups of the equally shaped parameters of one name, ordered by depth."""
    found: dict[tuple[str, Shape], list[tuple[int, str]]] = {}
    for fqn, member in kept.items():
        depth, pattern = _layer(fqn) or (0, fqn)
        found.setdefault((pattern, member.shape), []).append((depth, fqn))
    names = [pattern for pattern, _ in found]
    for (pattern, shape), nodes in found.items():
        fqns = tuple(fqn for _, fqn in sorted(nodes))
        if len(fqns) < 2 or not prod(shape):
            refused |= dict.fromkeys(fqns, "no other layer has a parameter of that name and shape")
            continue
        sizes = "x".join(map(str, shape))
        name = pattern if names.count(pattern) == 1 else f"{pattern} ({sizes})"
        yield NodeGroup(name=name, fqns=fqns, num_nodes=len(fqns))


def _rows(kept: Mapping[str, Member], refused: dict[str, str]) -> Iterator[NodeGroup]:
    for fqn, member in kept.items():
        m, n = member.shape
        if m < 2:
            refused[fqn] = "it has one row"
        else:
            yield NodeGroup(name=fqn, fqns=(fqn,), num_nodes=m, blocks=(1, m, n))


def _heads(
    kept: Mapping[str, Member], refused: dict[str, str], head_size: int
) -> Iterator[NodeGroup]:
    """Rows of q, k and v, and columns of the output projection, by the head that they belong to."""
    for fqn, member in kept.items():
        module, (m, n) = fqn.removesuffix(".weight").rpartition(".")[2], member.shape
        size = m if module in ROW_HEADS else n if module in COLUMN_HEADS else 0
        if not size:
            refused[fqn] = f"it has no heads (those of {', '.join((*ROW_HEADS, *COLUMN_HEADS))} do)"
        elif size % head_size or size // head_size < 2:
            refused[fqn] = f"{size} is not at least two heads of {head_size}"
        else:
            heads = size // head_size
            blocks = (1, heads, head_size * n) if module in ROW_HEADS else (m, heads, head_size)
            yield NodeGroup(name=fqn, fqns=(fqn,), num_nodes=heads, blocks=blocks)


def _gains(kept: Mapping[str, Member], refused: dict[str, str]) -> Iterator[NodeGroup]:
    fqns = tuple(fqn for fqn, member in kept.items() if prod(member.shape))
    if len(fqns) < 2:
        refused |= dict.fromkeys(fqns, "there is no other block")
    else:
        yield NodeGroup(name="blocks", fqns=fqns, num_nodes=len(fqns))


def _layer(fqn: str) -> tuple[int, str] | None:
    """The first number in a name and the name with * in its place, or None without one."""
    parts = fqn.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join([*parts[:place], "*", *parts[place + 1 :]])
    return None


def _log_left_out(refused: Mapping[str, str]) -> None:
    by_reason: dict[str, list[str]] = {}
    for fqn, why in refused.items():
        by_reason.setdefault(why, []).append(fqn)
    for why, fqns in by_reason.items():
        logger.info("not filtered: %d parameters (%s, ...): %s", len(fqns), fqns[0], why)
