"""GaLore in a run: which matrices it projects, and the counts of what it did."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectral_scale.config.schema import OptimizerConfig, SpectralConfig
from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.convert import find_targets
from spectral_scale.methods.galore.optimizer import ProjectedAdamW, ProjectionStats, is_projected
from spectral_scale.methods.galore.sharded_optimizer import ShardedGaLoreAdamW
from spectral_scale.optim.groups import param_groups

PROJECTED = "projected"
"""Name of the group of matrices that GaLore projects."""


def galore_groups(
    model: nn.Module, spectral: SpectralConfig, optimizer: OptimizerConfig
) -> list[dict[str, Any]]:
    """Groups as `param_groups` builds them, the matrices that `convert` would take in their own.

    That group trains at `spectral_lr`, decays as dense matrices do, and renews its projectors every
    `steps_per_iteration` steps. Raises ConfigError if the model has no such matrix.
    """
    groups = param_groups(
        model,
        lr=optimizer.lr,
        spectral_lr=optimizer.spectral_lr,
        weight_decay=optimizer.weight_decay,
    )
    targets = {f"{name}.weight" for name in find_targets(model)}
    dense = next((group for group in groups if group["name"] == "dense"), None)
    if dense is None or not targets <= set(dense["fqns"]):
        raise ConfigError("galore projects dense matrices, but the model's are converted or frozen")
    members = dict(zip(dense["fqns"], dense["params"], strict=True))
    projected = dense | {
        "name": PROJECTED,
        "lr": optimizer.spectral_lr,
        "base_lr": optimizer.spectral_lr,
        "galore_rank": spectral.spectral_rank,
        "update_interval": spectral.steps_per_iteration,
        "scale": optimizer.galore_scale,
    }
    for group, wanted in ((dense, False), (projected, True)):
        group["fqns"] = [fqn for fqn in members if (fqn in targets) == wanted]
        group["params"] = [members[fqn] for fqn in group["fqns"]]
    return [group for group in (*groups, projected) if group["params"]]


@dataclass(frozen=True, kw_only=True)
class ProjectionReport:
    """Counts of one renewal of the projectors."""

    projections: int
    """Matrices whose projector was renewed."""
    subspace_overlap: float | None
    """Mean over matrices of the overlap with the replaced projector; None the first time."""

    def metrics(self) -> dict[str, Any]:
        """The count and the overlap."""
        values: dict[str, Any] = {"galore/projections": self.projections}
        if self.subspace_overlap is not None:
            values["galore/subspace_overlap"] = self.subspace_overlap
        return values


class GaLoreController:
    """Holds every step of GaLore's optimizer against the number of matrices it must project.

    All state is the optimizer's own; the controller saves the tensors that the backend does not.
    """

    def __init__(self, optimizer: ProjectedAdamW) -> None:
        self.optimizer = optimizer
        self.applied_steps = 0
        self.matrices = optimizer.matrices
        if not self.matrices:
            raise ConfigError("no parameter group holds galore_rank; build them by galore_groups()")

    def after_step(self) -> ProjectionReport | None:
        """Check the counts of the applied step; its report if projectors were renewed in it.

        Raises SpectralError if a matrix was left out.
        """
        self.applied_steps += 1
        stats, here = self.optimizer.stats, self.optimizer.matrices_here
        self.optimizer.stats = ProjectionStats()
        if stats.projected != here or stats.renewed not in (0, self.matrices):
            owned = "" if here == self.matrices else f", {here} of them here,"
            raise SpectralError(
                f"step {self.applied_steps} projected {stats.projected} matrices and renewed "
                f"{stats.renewed} projectors; {self.matrices}{owned} were expected: GaLore is "
                "partly off"
            )
        if not stats.renewed:
            return None
        overlaps = stats.overlaps
        return ProjectionReport(
            projections=stats.renewed,
            subspace_overlap=float(torch.stack(overlaps).mean()) if overlaps else None,
        )

    def lr_factor(self) -> float:
        """GaLore has no ramp: 1."""
        return 1.0

    def nbytes(self) -> int:
        """Bytes kept besides weights, gradients and optimizer state: none."""
        return 0

    def describe(self) -> str:
        """One line for a person: what is projected and when that changes."""
        group = next(group for group in self.optimizer.param_groups if is_projected(group))
        return (
            f"GaLore: gradients of {self.matrices} matrices projected to rank "
            f"{group['galore_rank']}, renewed every {group['update_interval']} steps, "
            f"scale {group['scale']:g}"
        )

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Projectors and moments of matrices that this rank owns, unless the backend saves them."""
        if isinstance(self.optimizer, ShardedGaLoreAdamW):
            yield from self.optimizer.state_tensors()

    def load_state(self, read: Callable[[str], Tensor], applied_steps: int) -> None:
        """Take over the step count and the tensors of `state_tensors`. Raises CheckpointError."""
        self.applied_steps = applied_steps
        if isinstance(self.optimizer, ShardedGaLoreAdamW):
            self.optimizer.load_state_tensors(read)
