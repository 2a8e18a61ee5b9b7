"""The runs of SST's table of graph networks: what each trains, and one run as an own loop.

Settings are HyboNet's published ones at width 16; dropout 0.5 on Cora's nodes for all methods but
full training is the SST paper's.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_scale import (
    GaLoreAdamW,
    LowRankController,
    OptimizerConfig,
    SpectralConfig,
    SpectralController,
    convert,
    convert_lora,
    galore_groups,
    param_groups,
)
from spectral_scale.hyperbolic import (
    ClassPoints,
    LorentzGraphLayer,
    exp_at_origin,
    link_loss,
    link_scores,
    node_loss,
)
from spectral_scale.tasks.graphs import (
    LabelledGraph,
    area_under_curve,
    mean_adjacency,
    micro_f1,
    read_graph,
)

WIDTH = 16
SEEDS = (0, 1, 2)
T3, RAMP = 100, 20


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set with its task and HyboNet's settings."""

    folder: str
    links: bool = False
    splits: str = "node_splits.json"
    lr: float
    layers: int
    dropout: float = 0.0
    method_dropout: float | None = None
    decay: float = 0.0
    margin: float = 2.0
    clip: float | None = None
    normalised: bool = True
    relu: bool = False


_CORA = {"folder": "cora", "lr": 0.02, "layers": 2}
_AIRPORT = {"folder": "airport", "lr": 0.02, "layers": 5, "decay": 1e-4, "clip": 1.0, "relu": True}
TASKS = {
    "cora-nodes": Task(**_CORA, dropout=0.9, method_dropout=0.5, decay=0.01, margin=1.0, clip=1.0),
    "cora-links": Task(
        **_CORA,
        links=True,
        splits="edge_splits.json",
        dropout=0.7,
        decay=0.001,
        margin=0.1,
        clip=0.5,
    ),
    "airport-nodes": Task(**_AIRPORT),
    "airport-nodes-clean": Task(**_AIRPORT, splits="node_splits_clean.json"),
    "airport-links": Task(
        folder="airport", links=True, splits="edge_splits.json", lr=0.01, layers=2
    ),
    "disease-links": Task(
        folder="disease_lp",
        links=True,
        splits="edge_splits.json",
        lr=0.005,
        layers=2,
        margin=30.0,
        clip=0.5,
        normalised=False,
    ),
}
METHODS = (
    "full",
    "lora-1",
    "lora-2",
    "relora-1",
    "relora-2",
    "galore-1",
    "galore-2",
    "sst-1",
    "sst-2",
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run."""

    task: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of its result."""
        return f"{self.task}.{self.method}.{self.seed}"


def trials() -> Iterator[Trial]:
    """All runs of the table, seed by seed, so that a part of them is a table, too."""
    for seed in SEEDS:
        for task in TASKS:
            for method in METHODS:
                yield Trial(task=task, method=method, seed=seed)


class Network(nn.Module):
    """Graph layers, and class points where nodes are classified."""

    def __init__(self, features: int, classes: int, task: Task, dropout: float) -> None:
        super().__init__()
        widths = [features, *[WIDTH] * task.layers]
        self.layers = nn.ModuleList(
            LorentzGraphLayer(
                a, b, dropout=dropout, activation=torch.relu if task.relu and i else None
            )
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.head = None if task.links else ClassPoints(classes, WIDTH)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Points of the nodes."""
        for layer in self.layers:
            x = layer(x, adjacency)
        return x


def prepare(graph: LabelledGraph, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Points of the features, the adjacency without held-out edges, and the edges to train on."""
    x, edges = graph.features, graph.edges
    if task.links:
        held = {tuple(e) for k in ("validation", "test") for e in graph.splits[k].tolist()}
        edges = torch.tensor([e for e in edges.tolist() if tuple(e) not in held])
    elif task.folder == "airport":
        x = x[:, :4]  # the label is made of the fifth
    if task.normalised:
        total = x.sum(1, keepdim=True)
        x = torch.where(total == 0, 0.0, x / total)
    adjacency = mean_adjacency(edges, len(x))
    if task.folder == "airport":
        degree = torch.bincount(adjacency.indices()[0], minlength=len(x))
        flags = nn.functional.one_hot((degree - 1).clamp_max(5), 6).float()
        x = torch.cat([x, flags, torch.ones(len(x), 1)], 1)
    return exp_at_origin(x), adjacency, edges


def open_method(model: nn.Module, task: Task, method: str, seed: int) -> tuple[Any, Any]:
    """The optimizer and the controller, None for full training and GaLore."""
    name, _, rank = method.partition("-")
    rates = {"lr": task.lr, "spectral_lr": task.lr, "weight_decay": task.decay}
    if name == "full":
        return torch.optim.AdamW(param_groups(model, **rates)), None
    config = SpectralConfig(
        method=name,
        spectral_rank=int(rank),
        storage="factored",
        steps_per_iteration=T3,
        iteration_warmup_steps=RAMP,
    )
    if name == "galore":
        return GaLoreAdamW(galore_groups(model, config, OptimizerConfig(**rates))), None
    (convert if name == "sst" else convert_lora)(model, config)
    decay = {"spectral_weight_decay": task.decay} if name == "sst" else {}
    optimizer = torch.optim.AdamW(param_groups(model, **rates, **decay))
    controller = SpectralController if name == "sst" else LowRankController
    return optimizer, controller(model, optimizer, config, seed=seed)


def run(trial: Trial, data: Path, *, steps: int = 5000, patience: int = 500) -> dict[str, Any]:
    """Train until validation has not improved for `patience` steps; the result at its best."""
    started, task = time.perf_counter(), TASKS[trial.task]
    torch.manual_seed(trial.seed)
    graph = read_graph(data / task.folder, splits=task.splits)
    x, adjacency, edges = prepare(graph, task)
    own = trial.method == "full" or task.method_dropout is None
    dropout = task.dropout if own else task.method_dropout
    model = Network(x.shape[1], int(graph.labels.max()) + 1, task, dropout)
    optimizer, controller = open_method(model, task, trial.method, trial.seed)
    best = {"validation": -1.0, "test": 0.0, "step": 0}
    for step in range(1, steps + 1):
        model.train()
        loss = _loss(model, x, adjacency, graph, edges, task)
        optimizer.zero_grad()
        loss.backward()
        if task.clip:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        if controller is not None:
            controller.after_step()
        validation, test = _scores(model, x, adjacency, graph, task)
        if validation > best["validation"]:
            best = {"validation": validation, "test": test, "step": step}
        elif step - best["step"] >= patience and step > 100:
            break
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds = round(time.perf_counter() - started, 1)
    return best | {"steps": step, "trained_parameters": trained, "seconds": seconds}


def _loss(
    model: Network, x: Tensor, adjacency: Tensor, graph: LabelledGraph, edges: Tensor, task: Task
) -> Tensor:
    points = model(x, adjacency)
    if model.head is not None:
        train = graph.splits["train"]
        scores = model.head(points[train])
        return node_loss(scores, graph.labels[train], margin=task.margin)
    drawn = torch.randint(len(x), edges.shape)
    return link_loss(link_scores(points, edges), link_scores(points, drawn), margin=task.margin)


@torch.no_grad()
def _scores(
    model: Network, x: Tensor, adjacency: Tensor, graph: LabelledGraph, task: Task
) -> tuple[float, float]:
    """F1 of nodes or AUC of links, of validation and test."""
    points = model.eval()(x, adjacency)
    splits = graph.splits
    if model.head is not None:
        guess = model.head(points).argmax(1)
        validation, test = (
            micro_f1(guess[splits[k]], graph.labels[splits[k]]) for k in ("validation", "test")
        )
    else:
        validation, test = (
            area_under_curve(
                link_scores(points, splits[k]), link_scores(points, splits[f"{k}_non_edges"])
            )
            for k in ("validation", "test")
        )
    return validation, test
