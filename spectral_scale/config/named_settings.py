"""`spectral.settings: paper`: Sparse Spectral Training as published, under one name.

Zhao et al., arXiv 2405.15481 (ICML 2025): section 4 and the OPT experiments. What the paper leaves
open (Adam's betas, weight decay, clipping, batch size) is not part of it. `paper_translation` and
`paper_graph` are the method's settings of its other tasks, whose learning rates are those of the
baseline.
"""

from collections.abc import MutableMapping
from typing import Any

PAPER: dict[str, Any] = {
    "spectral.method": "sst",
    "spectral.storage": "factored",
    "spectral.trained_sigma": "all",
    "spectral.steps_per_iteration": 200,
    "spectral.iterations_per_round": "auto",
    "spectral.iteration_warmup_steps": 20,
    "spectral.sampling": "mixed",
    "spectral.gradient": "enhanced",
    "spectral.extra_sigma": 0,
    "spectral.boundary_moments": "reset",
    "spectral.stagger_rounds": False,
    "spectral.direction_lr_scaling": "none",
    "optimizer.spectral_lr": 1.0e-3,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 2000,
}
"""Dotted key -> the published value."""
_TASK = {key: value for key, value in PAPER.items() if not key.startswith("optimizer.")}
PAPER_TRANSLATION: dict[str, Any] = _TASK
"""IWSLT'14 and Multi30K; for IWSLT'17 the paper sets steps_per_iteration to 400."""
PAPER_GRAPH: dict[str, Any] = _TASK | {
    "spectral.steps_per_iteration": 100,
    "spectral.iteration_warmup_steps": 100,
}
"""Nodes and links of the hyperbolic graph networks."""
NAMED: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": PAPER,
    "paper_translation": PAPER_TRANSLATION,
    "paper_graph": PAPER_GRAPH,
}


def add_named_settings(values: MutableMapping[str, Any], sources: MutableMapping[str, str]) -> None:
    """Give every key of the named settings its value unless a file or the command line did.

    `values` and `sources` are changed in place. An unknown name is left to the schema's check.
    """
    name = str(values.get("spectral.settings", "default"))
    for key, value in NAMED.get(name, {}).items():
        if key not in values:
            values[key], sources[key] = value, f"spectral.settings {name}"
