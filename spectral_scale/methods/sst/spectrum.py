"""Summary of one matrix's spectrum, taken on its owner at a swap."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from spectral_scale.methods.sst.bank import Triplets
from spectral_scale.ops.decomposition import effective_rank
from spectral_scale.ops.precision import exact_products

NUM_QUANTILES = 17
Of = TypeVar("Of")


@dataclass(frozen=True, kw_only=True)
class LayerSpectrum:
    """The spectrum and orthogonality of one matrix at a swap."""

    effective_rank: float
    """exp of the spectrum's entropy."""
    orthogonality_error: float
    """Largest entry of |U^T U_a - I_a| and |V^T V_a - I_a| over the trained columns U_a, V_a."""
    quantiles: list[float]
    """Singular values at 17 evenly spaced quantiles, largest first."""

    def to_json(self) -> dict[str, object]:
        """Plain values for the wire."""
        return asdict(self)


def describe(entry: Triplets) -> LayerSpectrum:
    """Measure one entry; 2 k r (m + n) multiplications, small beside the residual's rebuild."""
    sigma = entry.sigma.sort(descending=True).values
    positions = torch.linspace(0, sigma.numel() - 1, NUM_QUANTILES).round().long()
    return LayerSpectrum(
        effective_rank=effective_rank(entry.sigma),
        orthogonality_error=max(_column_error(f, entry.active) for f in (entry.u, entry.v)),
        quantiles=sigma[positions.to(sigma.device)].tolist(),
    )


@exact_products()
def _column_error(factor: torch.Tensor, columns: torch.Tensor) -> float:
    gram = factor.t() @ factor[:, columns]
    gram[columns, torch.arange(columns.numel(), device=columns.device)] -= 1.0
    return float(gram.abs().max())


def spectra_by_kind(spectra: Mapping[str, LayerSpectrum]) -> dict[str, Any]:
    """Metrics of matrices grouped by the last part of their name (q_proj, fc1, ...)."""
    values: dict[str, Any] = {}
    for kind, members in _by_kind(spectra).items():
        count = len(members)
        values[f"spectral/effective_rank/{kind}"] = sum(s.effective_rank for s in members) / count
        columns = zip(*(s.quantiles for s in members), strict=True)
        values[f"spectral/spectrum/{kind}"] = [sum(column) / count for column in columns]
        error = max(s.orthogonality_error for s in members)
        values[f"spectral/orthogonality_error/{kind}"] = error
    if spectra:
        worst = max(s.orthogonality_error for s in spectra.values())
        values["spectral/orthogonality_error"] = worst
    return values


def errors_by_kind(errors: Mapping[str, float]) -> dict[str, float]:
    """Metrics of quantised residuals: the mean error of each kind of matrix, and the worst."""
    if not errors:
        return {}
    values = {
        f"spectral/quantisation_error/{kind}": sum(members) / len(members)
        for kind, members in _by_kind(errors).items()
    }
    return values | {"spectral/quantisation_error": max(errors.values())}


def _by_kind(of_layers: Mapping[str, Of]) -> dict[str, list[Of]]:
    """What matrices have, grouped by the last part of their name."""
    kinds: dict[str, list[Of]] = defaultdict(list)
    for name, found in of_layers.items():
        kinds[name.rpartition(".")[2]].append(found)
    return kinds
