"""The report of a swap in the tangent form, and the checks of what it must have touched."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from spectral_scale.errors import SpectralError
from spectral_scale.methods.tangent.basis import Basis
from spectral_scale.methods.tangent.layer import TangentLinear
from spectral_scale.methods.tangent.truth import OwnedWeights
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.store import ParameterStore

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TangentReport:
    """Counts of what one swap touched, over all ranks."""

    iteration: int
    """The iteration that begins."""
    layers: int = 0
    """Matrices that were given bases."""
    moved: int = 0
    """Matrices whose factors had left zero when they were merged."""
    active_vectors: int = 0
    """Columns of c that train now, over all matrices; d has as many."""
    swapped_vectors: int = 0
    """Columns of u0 that were not among those of the last iteration."""
    moments_reset: int = 0
    """Entries of the optimizer's moments set to zero: two of a factor's entry with AdamW, one with
    Muon."""
    redecomposed: int = 0
    """Matrices that were decomposed for their bases."""
    relative_update: float = 0.0
    """|u0 c^T + d v0^T| / |W| in the Frobenius norm, averaged over the matrices."""
    seconds: float = 0.0
    """Wall time on this rank."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds in each phase of the protocol on this rank."""

    def metrics(self) -> dict[str, Any]:
        """The counts, the size of what was merged and the seconds."""
        values: dict[str, Any] = {
            "spectral/iteration": self.iteration,
            "spectral/layers": self.layers,
            "spectral/moved_layers": self.moved,
            "spectral/active_vectors": self.active_vectors,
            "spectral/swapped_vectors": self.swapped_vectors,
            "spectral/moments_reset": self.moments_reset,
            "spectral/redecomposed": self.redecomposed,
            "spectral/relative_update": self.relative_update,
            "spectral/boundary_seconds": self.seconds,
        }
        return values | {f"spectral/boundary_seconds/{k}": v for k, v in self.phase_seconds.items()}


def check_counts(
    report: TangentReport, layers: Mapping[str, TangentLinear], rank: int, moments: int
) -> None:
    """Raise SpectralError if a swap touched less or more than it should have, where the optimizer
    keeps `moments` of each entry of a factor."""
    shapes = [s for layer in layers.values() for s in layer.trained_shapes().values()]
    expected = {
        "layers": len(layers),
        "active_vectors": len(layers) * rank,
        "moments_reset": moments * sum(map(math.prod, shapes)),
    }
    for what, count in expected.items():
        if getattr(report, what) != count:
            raise SpectralError(
                f"swap {report.iteration} touched {getattr(report, what)} {what}, expected "
                f"{count}; the optimizer must hold the converted parameters and have taken a step"
            )
    if report.moved == 0:
        logger.warning("swap %d merged no update: no factor has left zero", report.iteration)
    k = min(min(m.in_features, m.out_features) for m in layers.values())
    if report.swapped_vectors == 0 and rank < k:
        logger.warning("swap %d replaced no vector", report.iteration)


def prove_installed(
    report: TangentReport,
    *,
    layers: Mapping[str, TangentLinear],
    owners: Mapping[str, int],
    weights: OwnedWeights,
    basis: Basis,
    store: ParameterStore,
    collective: Collective,
) -> None:
    """Read every basis and factor back, to the bit, and log what was touched. Collective.

    Raises SpectralError if the model holds other bases than the owners', or factors beside zero.
    """
    device = next(iter(layers.values())).c.device
    found = torch.zeros((), dtype=torch.int64, device=device)
    for name, owner in owners.items():
        held = {k: store.gather(f"{name}.{k}", owner=owner) for k in ("u0", "v0", "c", "d")}
        if owner != collective.rank:
            continue
        u0, v0, c, d = (t for t in held.values() if t is not None)
        expected = basis.vectors(name, weights.present(name), weights[name].basis)
        same = [(a == b.to(a)).all(dim=0) for a, b in zip((u0, v0), expected, strict=True)]
        zero = [(factor == 0).all(dim=0) for factor in (c, d)]
        found += torch.stack([*same, *zero]).all(dim=0).sum()
    count = int(collective.all_reduce_sum(found))
    if count != report.active_vectors:
        raise SpectralError(
            f"swap {report.iteration} installed {count} of {report.active_vectors} vectors; "
            "the store does not write where the model reads"
        )
    logger.info(
        "first swap: %d layers, %d vectors a side train (%d swapped in), %d moments reset",
        report.layers,
        report.active_vectors,
        report.swapped_vectors,
        report.moments_reset,
    )
