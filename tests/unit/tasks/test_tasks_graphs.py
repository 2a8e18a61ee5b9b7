"""Folders of graphs: what they hold, faults that are named, and scores on fixed data."""

import json
from pathlib import Path

import pytest
import torch

from spectral_scale.errors import DataError
from spectral_scale.tasks.graphs import area_under_curve, mean_adjacency, micro_f1, read_graph

FILES = {
    "edges.csv": "source,target\n0,1\n1,2\n",
    "labels.txt": "0\n1\n1\n",
    "features.txt": "0 2\n\n1\n",
    "node_splits.json": json.dumps({"train": [0], "validation": [1], "test": [2]}),
}


def folder(path: Path, **changes: str) -> Path:
    for name, text in (FILES | changes).items():
        (path / name).write_text(text)
    return path


def test_a_folder_becomes_a_graph(tmp_path: Path) -> None:
    graph = read_graph(folder(tmp_path))
    assert graph.features.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert graph.edges.tolist() == [[0, 1], [1, 2]] and graph.labels.tolist() == [0, 1, 1]
    dense = mean_adjacency(graph.edges, 3).to_dense()
    expected = torch.tensor([[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 2, 1 / 2]])
    torch.testing.assert_close(dense, expected)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("edges.csv", "source,target\n0,1\n1,3\n", r"edges.csv, line 3: 3 does not exist"),
        ("edges.csv", "source,target\n0\n", r"edges.csv, line 2: '0'; 2 whole number"),
        ("labels.txt", "0\none\n1\n", r"labels.txt, line 2: 'one'"),
        ("features.txt", "0\n1\n", r"features.txt holds 2 nodes, labels.txt 3"),
        ("node_splits.json", '{"train": [9]}', r"train holds what is no node from 0 to 2"),
        ("node_splits.json", "[1]", r"node_splits.json: .*lists of nodes by name"),
    ],
)
def test_faults_are_named_with_file_and_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_graph(folder(tmp_path, **{name: text}))


def test_features_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    folder(tmp_path, **{"features.csv": "1.5,2\n0,nan\n1,1\n"})
    (tmp_path / "features.txt").unlink()
    with pytest.raises(DataError, match=r"features.csv, line 2: '0,nan'; finite numbers"):
        read_graph(tmp_path)


def test_scores_on_fixed_data() -> None:
    positive, negative = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 0.0])
    # of six pairs, five are in order and one is a tie
    assert area_under_curve(positive, negative) == pytest.approx(5.5 / 6)
    assert area_under_curve(negative, positive) == pytest.approx(0.5 / 6)
    assert micro_f1(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2])) == 0.75
