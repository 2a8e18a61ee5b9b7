"""A graph of blocks, and what is applied to their gradients: exact for small graphs, Chebyshev
polynomials for large ones."""

import torch
from torch import Tensor

from spectral_scale.config.schema import FilterConfig
from spectral_scale.errors import ConfigError
from spectral_scale.ops.chebyshev import apply_polynomial, coefficients, scaled_laplacian
from spectral_scale.ops.filters import filter_matrix, response
from spectral_scale.ops.graphs import Graph, complete_graph, knn_graph, path_graph, permuted
from spectral_scale.ops.keyed_random import keyed_generator
from spectral_scale.ops.laplacian import (
    Eigenbasis,
    dense_laplacian,
    eigenbasis,
    sparse_laplacian,
    spectral_bound,
)
from spectral_scale.ops.precision import exact_products

EXACT_NODES = 256
"""Largest number of nodes with a dense filter matrix; above it, a polynomial costs less."""


def check_filter(config: FilterConfig, num_nodes: int, name: str) -> None:
    """Raise ConfigError for a response or graph that cannot be had on so many nodes."""
    response("identity" if config.kind == "none" else config.kind, config.strength)
    if num_nodes <= EXACT_NODES:
        return
    if config.kind == "ideal":
        raise ConfigError(
            f"filter.kind=ideal needs the eigenvectors of the graph, and that of {name} has "
            f"{num_nodes} nodes (at most {EXACT_NODES}); use rational or heat"
        )
    if config.graph == "complete":
        raise ConfigError(
            f"filter.graph=complete joins every pair of the {num_nodes} nodes of {name}; up to "
            f"{EXACT_NODES} nodes are supported: use filter.nodes=layers or heads"
        )


def num_frequencies(num_nodes: int) -> int:
    """Frequencies that are known one by one: all of a small graph, none of a large one."""
    return num_nodes if num_nodes <= EXACT_NODES else 0


def build_graph(
    config: FilterConfig, num_nodes: int, features: Tensor | None, *key: object
) -> Graph:
    """The configured graph; `key` fixes the permutation of the control.

    Args:
        config: `graph`, `neighbors`, `permute_nodes`.
        num_nodes: nodes.
        features: (num_nodes, q) mean gradients; for knn only.
        key: for instance the seed and the group's name.

    Raises SpectralError for features that are not finite.
    """
    if config.graph == "knn" and features is not None:
        graph = knn_graph(features, config.neighbors)
    else:
        graph = {"path": path_graph, "complete": complete_graph}[config.graph](num_nodes)
    if config.permute_nodes:
        generator = keyed_generator(*key, "permutation")
        graph = permuted(graph, torch.randperm(num_nodes, generator=generator))
    return graph


class GraphOperator:
    """H and L of one graph, on the device and in the precision of the gradients.

    Args:
        graph: the nodes.
        config: the response and the kind of Laplacian.
        device: the device of the gradients.
        dtype: float32 or float64. H and L are computed in float64 and rounded once.
    """

    def __init__(
        self, graph: Graph, config: FilterConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.graph = graph
        self.basis: Eigenbasis | None = None
        self._matrix: Tensor | None = None
        self._weights: Tensor | None = None
        identity = config.kind in ("identity", "none")
        respond = response("identity" if config.kind == "none" else config.kind, config.strength)
        if graph.num_nodes <= EXACT_NODES:
            laplacian = dense_laplacian(graph, config.laplacian)
            self.basis = eigenbasis(laplacian)
            self._modes = self.basis.vectors.t().to(device, dtype)
            if not identity:
                self._matrix = filter_matrix(self.basis, respond).to(device, dtype)
        else:
            laplacian = sparse_laplacian(graph, config.laplacian)
            bound = spectral_bound(graph, config.laplacian)
            if not identity:
                self._weights = coefficients(respond, bound)
                self._scaled = scaled_laplacian(laplacian, bound).to(device=device, dtype=dtype)
        self._laplacian = laplacian.to(device=device, dtype=dtype)

    @exact_products()
    def filter(self, block: Tensor) -> Tensor:
        """H X of (n, c); X itself where h is 1."""
        if self._matrix is not None:
            return self._matrix @ block
        if self._weights is not None:
            return apply_polynomial(self._scaled, self._weights, block)
        return block

    @exact_products()
    def laplacian(self, block: Tensor) -> Tensor:
        """L X of (n, c)."""
        return self._laplacian @ block

    @exact_products()
    def modes(self, block: Tensor) -> Tensor:
        """Phi^T X of (n, c), by ascending frequency; for graphs with a `basis` only."""
        return self._modes @ block

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices kept."""
        kept = [self._laplacian, self._matrix]
        kept += [self._scaled] if self._weights is not None else []
        kept += [self._modes] if self.basis is not None else []
        return sum(_nbytes(t) for t in kept if t is not None)


def _nbytes(tensor: Tensor) -> int:
    if tensor.layout is torch.sparse_csr:
        parts = (tensor.values(), tensor.col_indices(), tensor.crow_indices())
        return sum(part.nbytes for part in parts)
    return tensor.nbytes
