"""Folders that hold a graph as text, and the scores of its two tasks.

A folder holds `edges.csv` (a heading, then `source,target`, each undirected edge once),
`labels.txt` (a class a line), `features.txt` (the numbers of the flags that are set, a node a line)
or `features.csv` (numbers, a node a line), `node_splits.json` (`train`, `validation` and `test`
nodes) and `edge_splits.json` (`validation` and `test` edges, and as many pairs without an edge
under `validation_non_edges` and `test_non_edges`).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectral_scale.errors import DataError
from spectral_scale.files.json_text import parse_json


@dataclass(frozen=True, kw_only=True)
class LabelledGraph:
    """A graph of n nodes."""

    features: Tensor
    """Features (n, f), float32."""
    labels: Tensor
    """Class of each node (n,), int64."""
    edges: Tensor
    """Undirected edges (e, 2), int64."""
    splits: dict[str, Tensor]
    """Nodes (k,) or pairs of nodes (k, 2) by the name of their split, int64."""


def read_graph(folder: Path | str, *, splits: str = "node_splits.json") -> LabelledGraph:
    """The graph of a folder, with the splits of this file.

    Raises DataError, which names file and line, for what is no number, for a node that does not
    exist, and for nodes without features.
    """
    folder = Path(folder)
    labels = torch.tensor(_whole_numbers(folder / "labels.txt", count=1), dtype=torch.int64)[:, 0]
    count = len(labels)
    features = _features(folder, count)
    edges = torch.tensor(
        _whole_numbers(folder / "edges.csv", count=2, below=count, heading=True), dtype=torch.int64
    )
    return LabelledGraph(
        features=features,
        labels=labels,
        edges=edges.view(-1, 2),
        splits=_splits(folder / splits, count),
    )


def mean_adjacency(edges: Tensor, nodes: int) -> Tensor:
    """Sparse (nodes, nodes): each row averages over a node's neighbours and itself."""
    loops = torch.arange(nodes)[:, None].expand(-1, 2)
    both = torch.cat([edges, edges.flip(1), loops])
    degree = torch.bincount(both[:, 0], minlength=nodes)
    values = 1.0 / degree[both[:, 0]]
    return torch.sparse_coo_tensor(
        both.t(), values, (nodes, nodes), check_invariants=True
    ).coalesce()


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive's score exceeds a negative's; equal scores count a half."""
    order, negative = positive.double(), negative.double().sort().values
    below = torch.searchsorted(negative, order, right=False)
    not_above = torch.searchsorted(negative, order, right=True)
    return float((below + not_above).sum()) / (2 * len(order) * len(negative))


def micro_f1(predicted: Tensor, labels: Tensor) -> float:
    """F1 summed over all classes, which is the fraction of labels that are met."""
    return float((predicted == labels).double().mean())


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); give the folder of a graph") from None


def _whole_numbers(
    file: Path, *, count: int | None, below: int | None = None, heading: bool = False
) -> list[list[int]]:
    """`count` whole numbers of each line (any, if None), each at least 0 and less than `below`."""
    rows = []
    for number, line in list(enumerate(_lines(file), start=1))[heading:]:
        words = line.replace(",", " ").split()
        if not all(word.isdecimal() for word in words) or len(words) != (count or len(words)):
            wanted = "whole numbers" if count is None else f"{count} whole number(s)"
            raise DataError(f"{file}, line {number}: {line[:60]!r}; {wanted} are required")
        row = [int(word) for word in words]
        if below is not None and max(row, default=0) >= below:
            raise DataError(
                f"{file}, line {number}: {max(row)} does not exist; numbers run from 0 to "
                f"{below - 1}"
            )
        rows.append(row)
    return rows


def _features(folder: Path, nodes: int) -> Tensor:
    file = folder / "features.txt"
    if file.exists():
        flags = _whole_numbers(file, count=None)
        found = torch.zeros(len(flags), 1 + max((max(row, default=0) for row in flags), default=0))
        for node, ones in enumerate(flags):
            found[node, ones] = 1
    else:
        file = folder / "features.csv"
        rows = [_floats(file, n, line) for n, line in enumerate(_lines(file), start=1)]
        for number, row in enumerate(rows, start=1):
            if len(row) != len(rows[0]):
                raise DataError(
                    f"{file}, line {number}: {len(row)} numbers; the first line has {len(rows[0])}"
                )
        found = torch.tensor(rows, dtype=torch.float32)
    if len(found) != nodes:
        raise DataError(f"{file} holds {len(found)} nodes, labels.txt {nodes}; both need all nodes")
    return found


def _floats(file: Path, number: int, line: str) -> list[float]:
    try:
        row = [float(word) for word in line.split(",")]
    except ValueError:
        row = [math.nan]
    if not all(map(math.isfinite, row)):
        raise DataError(f"{file}, line {number}: {line[:60]!r}; finite numbers are required")
    return row


def _splits(file: Path, nodes: int) -> dict[str, Tensor]:
    try:
        raw = parse_json("\n".join(_lines(file)))
        found = {str(name): torch.tensor(members) for name, members in raw.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: {error}; lists of nodes by name are required") from None
    for name, members in found.items():
        if members.dtype != torch.int64 or not bool(((0 <= members) & (members < nodes)).all()):
            raise DataError(f"{file}: {name} holds what is no node from 0 to {nodes - 1}")
    return found
