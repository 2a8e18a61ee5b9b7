"""The command of the table of graphs, and the example, on a graph of two communities."""

import importlib.util
import json
from pathlib import Path

import pytest
from papers import graphs
from papers.graph_runs import METHODS, Trial, run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two rings of 12 nodes with a flag each that half of the nodes show."""
    folder = tmp_path / "data" / "cora"
    folder.mkdir(parents=True)
    edges = [(i, j) for i in range(24) for j in (i + 1, i + 2) if j < 24 and i // 12 == j // 12]
    (folder / "edges.csv").write_text("source,target\n" + "".join(f"{i},{j}\n" for i, j in edges))
    (folder / "labels.txt").write_text("".join(f"{i // 12}\n" for i in range(24)))
    flags = (f"{i // 12} {2 + i % 5}" if i % 2 else f"{2 + i % 5}" for i in range(24))
    (folder / "features.txt").write_text("\n".join(flags) + "\n")
    nodes = {"train": [1, 3, 13, 15], "validation": [5, 6, 17, 18], "test": [8, 9, 20, 21]}
    (folder / "node_splits.json").write_text(json.dumps(nodes))
    far = [[0, 20], [3, 15], [5, 23]]
    pairs = {"validation": edges[::9], "test": edges[4::9]}
    pairs |= {"validation_non_edges": far, "test_non_edges": far}
    (folder / "edge_splits.json").write_text(json.dumps(pairs))
    return folder.parent


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(data: Path, method: str) -> None:
    found = run(Trial(task="cora-nodes", method=method, seed=0), data, steps=3)
    assert found["steps"] == 3 and 0 <= found["test"] <= 1


def test_finished_runs_are_not_run_again(data: Path, tmp_path: Path, capsys) -> None:
    words = ["--data", str(data), "--only", "cora-links.sst-1.0", "--steps", "2"]
    words += ["--results", str(tmp_path / "results")]
    assert graphs.main(words) == 0 and "cora-links.sst-1.0" in capsys.readouterr().out
    assert graphs.main(words) == 0 and capsys.readouterr().out == ""
    results = graphs.read(tmp_path / "results")
    assert list(results) == ["cora-links.sst-1.0"]
    assert "(91.11)" in graphs.render(results) and "not run" in graphs.render(results)


def test_the_example_tells_the_communities_apart(data: Path) -> None:
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "graph_nodes.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(str(data / "cora"), 60) >= 0.75
