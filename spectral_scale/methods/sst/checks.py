"""Checks of a swap: the counts of what every swap must touch, and that the first one arrived."""

import logging
import math
from collections.abc import Mapping

import torch

from spectral_scale.errors import SpectralError
from spectral_scale.methods.sst.bank import SpectralBank
from spectral_scale.methods.sst.layer import SpectralLinear
from spectral_scale.methods.sst.report import SwapReport
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.store import ParameterStore

logger = logging.getLogger(__name__)


def check_counts(
    report: SwapReport, layers: Mapping[str, SpectralLinear], spectral_rank: int
) -> None:
    """Raise SpectralError if a swap touched less or more than it should have.

    A method that is silently off is the field's worst defect: count, every time.
    """
    shapes = [s for layer in layers.values() for s in layer.trained_shapes().values()]
    moments = 2 * sum(math.prod(shape) for shape in shapes)
    expected = {
        "layers": len(layers),
        "active_triplets": len(layers) * spectral_rank,
        "moments_reset": moments - report.moments_kept,
    }
    for what, count in expected.items():
        if getattr(report, what) != count:
            raise SpectralError(
                f"swap {report.iteration} touched {getattr(report, what)} {what}, "
                f"expected {count}; the optimizer must hold the converted parameters and have "
                "taken a step"
            )
    k = min(min(m.in_features, m.out_features) for m in layers.values())
    if report.swapped_triplets == 0 and spectral_rank < k:
        logger.warning("swap %d replaced no triplet", report.iteration)


def prove_scattered(
    report: SwapReport,
    *,
    bank: SpectralBank,
    owners: Mapping[str, int],
    store: ParameterStore,
    collective: Collective,
    device: torch.device,
) -> None:
    """Read every scattered direction back, and log what was touched. Collective.

    Raises SpectralError if the model holds other directions than the bank.
    """
    found = torch.zeros((), dtype=torch.int64, device=device)
    for name, owner in owners.items():
        in_model = store.gather(f"{name}.u", owner=owner)
        if in_model is not None:
            entry = bank[name]
            expected = entry.u[:, entry.active].to(in_model)
            found += torch.isclose(in_model, expected, atol=1e-2, rtol=0).all(dim=0).sum()
    count = int(collective.all_reduce_sum(found))
    if count != report.active_triplets:
        raise SpectralError(
            f"swap {report.iteration} scattered {count} of {report.active_triplets} "
            "triplets; the store does not write where the model reads"
        )
    logger.info(
        "first swap: %d layers, %d active triplets (%d swapped in), %d moments reset",
        report.layers,
        report.active_triplets,
        report.swapped_triplets,
        report.moments_reset,
    )
