"""Laplacians of graphs: L = D - A, or L_n = D^-1/2 (D - A) D^-1/2, and their eigenbases.

The combinatorial form is that of Zhang et al. (arXiv 2504.19583); the normalised one has
eigenvalues in [0, 2] whatever the weights, so that a strength carries over between graphs. A node
without an edge has a row of zeros in both: frequency 0, which no filter changes.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spectral_scale.errors import ConfigError
from spectral_scale.ops.graphs import Graph

LaplacianKind = Literal["combinatorial", "normalized"]


@dataclass(frozen=True)
class Eigenbasis:
    """L = vectors diag(values) vectors^T."""

    values: Tensor
    """(n,) float64 graph frequencies, ascending, at least 0."""
    vectors: Tensor
    """(n, n) float64, orthonormal columns."""


def sparse_laplacian(graph: Graph, kind: LaplacianKind) -> Tensor:
    """L (n, n), float64, in compressed rows, on the CPU."""
    degrees = graph.degrees()
    scale = _scale(degrees, kind)
    start, end = graph.edges
    nodes = torch.arange(graph.num_nodes)
    index = torch.cat([graph.edges, torch.stack([nodes, nodes])], dim=1)
    values = torch.cat([-graph.weights * scale[start] * scale[end], degrees * scale.square()])
    return compressed_rows(index, values, graph.num_nodes)


def compressed_rows(index: Tensor, values: Tensor, n: int) -> Tensor:
    """The sparse (n, n) matrix with `values` (E,) at `index` (2, E), repeated places added up."""
    with warnings.catch_warnings():  # torch calls the format a beta; products with it are tested
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        places = torch.sparse_coo_tensor(index, values, (n, n), check_invariants=True)
        return places.coalesce().to_sparse_csr()


def dense_laplacian(graph: Graph, kind: LaplacianKind) -> Tensor:
    """L (n, n), float64, exactly symmetric."""
    degrees = graph.degrees()
    scale = _scale(degrees, kind)
    laplacian = -graph.adjacency() * torch.outer(scale, scale)
    laplacian.diagonal().copy_(degrees * scale.square())
    return laplacian


def eigenbasis(laplacian: Tensor) -> Eigenbasis:
    """All frequencies and modes of a dense Laplacian; about 9 n^3 FLOPs."""
    values, vectors = torch.linalg.eigh(laplacian)
    return Eigenbasis(values.clamp_min(0.0), vectors)


def spectral_bound(graph: Graph, kind: LaplacianKind) -> float:
    """Upper bound of the frequencies: 2, or by Gershgorin twice the largest degree."""
    if kind == "normalized":
        return 2.0
    return max(2.0 * float(graph.degrees().max()), 1e-300)


def quadratic_form(laplacian: Tensor, signal: Tensor) -> Tensor:
    """Tr(X^T L X) of a signal X (n, d), 0-dim: 1/2 sum_ij A_ij |x_i - x_j|^2 if combinatorial."""
    return (signal * (laplacian @ signal)).sum()


def _scale(degrees: Tensor, kind: LaplacianKind) -> Tensor:
    if kind == "combinatorial":
        return torch.ones_like(degrees)
    if kind != "normalized":
        raise ConfigError(f"laplacian={kind!r} is unknown; use combinatorial or normalized")
    return torch.where(degrees > 0, degrees.clamp_min(1e-300).rsqrt(), 0.0)
