"""The report of a swap: its counts, made by the protocol, checked and logged."""

from dataclasses import dataclass, field
from typing import Any

from spectral_scale.methods.sst.spectrum import LayerSpectrum, errors_by_kind, spectra_by_kind


@dataclass(kw_only=True)
class SwapReport:
    """Counts of what one swap touched; `check_counts` holds them against the expected ones."""

    iteration: int
    """The iteration that begins."""
    layers: int = 0
    """Matrices that were given triplets to train."""
    active_triplets: int = 0
    """Triplets that train now, over all matrices."""
    swapped_triplets: int = 0
    """Active triplets that did not train before."""
    moments_reset: int = 0
    """Entries of exp_avg and exp_avg_sq set to zero."""
    moments_kept: int = 0
    """Entries that stayed with their triplets (`boundary_moments`)."""
    redecomposed: int = 0
    """Matrices that were decomposed again because their round ended."""
    kept_factors: int = 0
    """Matrices whose SVD did not converge and that kept their old, still exact, factors."""
    seconds: float = 0.0
    """Wall time on this rank."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds in each phase of the protocol on this rank."""
    spectra: dict[str, LayerSpectrum] = field(default_factory=dict)
    """Spectrum and orthogonality by matrix, on rank 0."""
    quantisation_errors: dict[str, float] = field(default_factory=dict)
    """Relative error of a residual of whole numbers by matrix, on rank 0."""

    def metrics(self) -> dict[str, Any]:
        """The counts and seconds, and spectra averaged over the layers of a kind."""
        values: dict[str, Any] = {
            "spectral/iteration": self.iteration,
            "spectral/layers": self.layers,
            "spectral/active_triplets": self.active_triplets,
            "spectral/swapped_vectors": self.swapped_triplets,
            "spectral/moments_reset": self.moments_reset,
            "spectral/moments_kept": self.moments_kept,
            "spectral/redecomposed": self.redecomposed,
            "spectral/kept_factors": self.kept_factors,
            "spectral/boundary_seconds": self.seconds,
        }
        phases = {f"spectral/boundary_seconds/{k}": v for k, v in self.phase_seconds.items()}
        errors = errors_by_kind(self.quantisation_errors)
        return values | phases | spectra_by_kind(self.spectra) | errors
