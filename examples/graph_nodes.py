"""Classify the nodes of a graph with a hyperbolic network that trains by SST, in your own loop.

python examples/graph_nodes.py FOLDER [STEPS]
"""

import sys

import torch

from spectral_scale import SpectralConfig, SpectralController, convert, param_groups
from spectral_scale.hyperbolic import ClassPoints, LorentzGraphLayer, exp_at_origin, node_loss
from spectral_scale.tasks.graphs import mean_adjacency, micro_f1, read_graph


class Network(torch.nn.Module):
    """Two graph layers, and a point for each class."""

    def __init__(self, features: int, classes: int, width: int = 16) -> None:
        super().__init__()
        sizes = ((features + 1, width), (width, width))
        self.layers = torch.nn.ModuleList(LorentzGraphLayer(*s, dropout=0.5) for s in sizes)
        self.head = ClassPoints(classes, width)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, adjacency)
        return self.head(x)


def main(folder: str, steps: int = 500) -> float:
    """F1 of the test nodes after training."""
    torch.manual_seed(0)
    graph = read_graph(folder)
    x = exp_at_origin(torch.nn.functional.normalize(graph.features, p=1.0))
    adjacency = mean_adjacency(graph.edges, len(x))
    model = Network(graph.features.shape[1], int(graph.labels.max()) + 1)
    config = SpectralConfig(spectral_rank=1, storage="factored", steps_per_iteration=100)
    convert(model, config)
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.02, spectral_lr=0.02, weight_decay=0.01))
    controller = SpectralController(model, optimizer, config)
    train, test = graph.splits["train"], graph.splits["test"]
    for _ in range(steps):
        loss = node_loss(model(x, adjacency)[train], graph.labels[train], margin=1.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        controller.after_step()
    with torch.no_grad():
        return micro_f1(model.eval()(x, adjacency)[test].argmax(1), graph.labels[test])


if __name__ == "__main__":
    print(f"F1 of the test nodes: {main(sys.argv[1], *map(int, sys.argv[2:])):.3f}")
