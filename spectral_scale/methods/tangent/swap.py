"""The swap of the tangent form, whose phases have the names of SST's (`phases.PHASES`).

    collect             gather each matrix's trained c and d on its owner
    commit              the owner adds u0 c^T + d v0^T to the full-precision weight
    sample, decompose   the owner draws the next bases (`random`: sample; `svd`: decompose)
    rebuild             the owner casts the weight and the bases to the layer's precision
    agree               all ranks learn whether any owner failed
    deliver             scatter weight and bases into every rank's layers; c = d = 0 on each rank
    reset               zero the factors' moments

Invariant: a swap leaves the function of the model as it is, up to rounding.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectral_scale.methods.delivery import Delivery
from spectral_scale.methods.phases import OwnerWork, PhaseClock
from spectral_scale.methods.tangent.basis import Basis
from spectral_scale.methods.tangent.layer import TangentLinear
from spectral_scale.methods.tangent.report import TangentReport, check_counts, prove_installed
from spectral_scale.methods.tangent.truth import OwnedWeights
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.store import ParameterStore

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TangentSwap:
    """Runs swaps. All methods are collective, and raise SpectralError on all ranks alike."""

    spectral_rank: int
    """Columns of each basis."""
    layers: Mapping[str, TangentLinear]
    """Converted layers by name."""
    owners: Mapping[str, int]
    """Layer -> the rank that computes for it."""
    weights: OwnedWeights
    """The weights of the matrices that this rank owns."""
    basis: Basis
    """The rule for bases."""
    store: ParameterStore
    """Access to the parameters, however the backend shards them."""
    collective: Collective
    """All ranks that train the model."""
    clock: PhaseClock
    """Clock that times the phases of a swap."""
    moments: int = 2
    """What the optimizer keeps of each entry of a factor: 2 with AdamW, 1 with Muon."""
    _proven: bool = field(default=False, init=False)

    def run(self, iteration: int) -> TangentReport:
        """End one iteration and begin `iteration`."""
        started = time.perf_counter()
        self.clock.start(iteration)
        report = TangentReport(iteration=iteration)
        work = OwnerWork()
        self._commit_trained(work, report)
        self._delivery.agree(work.problem, "swap")
        self.begin(iteration, report)
        check_counts(report, self.layers, self.spectral_rank, self.moments)
        if not self._proven:
            self._prove(report)
        report.phase_seconds = self.clock.seconds  # waits for the device
        report.seconds = time.perf_counter() - started
        return report

    def begin(self, iteration: int, report: TangentReport | None = None) -> None:
        """Draw the bases of `iteration`, scatter them with the weights, and zero the factors."""
        report = report or TangentReport(iteration=iteration)
        work = OwnerWork()
        for name in self._mine:
            if work.problem is None:
                with self.clock.phase(self.basis.phase), work.on(name):
                    self._draw(name, iteration, report)
        self._delivery.agree(work.problem, "bases")
        self.scatter()
        trained = [f"{n}.{leaf}" for n, m in self.layers.items() for leaf in m.trained_shapes()]
        with self.clock.phase("deliver"):
            self._zero(trained)
        report.layers = len(self.layers)
        report.active_vectors = sum(x.trained_shapes()["c"][1] for x in self.layers.values())
        with self.clock.phase("reset"):
            report.moments_reset = self.store.reset_moments(trained)
            self._sum_counts(report)

    def scatter(self) -> None:
        """Scatter the owners' weights and bases into every rank's layers."""
        self._delivery.scatter(self._build, trained=False)

    # -- the owner's work -------------------------------------------------------------------

    @property
    def _mine(self) -> list[str]:
        return [name for name, owner in self.owners.items() if owner == self.collective.rank]

    def _commit_trained(self, work: OwnerWork, report: TangentReport) -> None:
        for name, owner in self.owners.items():
            with self.clock.phase("collect"):
                c, d = (self.store.gather(f"{name}.{leaf}", owner=owner) for leaf in ("c", "d"))
            if owner != self.collective.rank or work.problem is not None:
                continue
            with self.clock.phase("commit"), work.on(name):
                if c is None or d is None:
                    raise RuntimeError("the store delivered nothing to the owner")
                relative = self.weights.merge(name, c, d, *self._vectors(name))
                report.relative_update += relative / len(self.owners)
                report.moved += bool(c.any() or d.any())

    def _draw(self, name: str, iteration: int, report: TangentReport) -> None:
        weight, before = self.weights.present(name), self.weights[name].basis
        state = self.basis.draw(name, weight, iteration)
        new = self.basis.count_new(weight, before, state) if before else self.spectral_rank
        self.weights.set_basis(name, state)
        report.swapped_vectors += new
        report.redecomposed += self.basis.phase == "decompose"

    def _vectors(self, name: str) -> list[Tensor]:
        return self.basis.vectors(name, self.weights.present(name), self.weights[name].basis)

    def _build(self, name: str, trained: bool) -> dict[str, Tensor]:
        """The frozen values of a layer by leaf, in the dtype in which they are sent."""
        layer = self.layers[name]
        values = (self.weights.present(name), *self._vectors(name))
        named = zip(("base", "u0", "v0"), values, strict=True)
        return {leaf: value.to(getattr(layer, leaf).dtype) for leaf, value in named}

    # -- what ranks do together -------------------------------------------------------------

    def _zero(self, fqns: list[str]) -> None:
        """c = d = 0, weights and masters alike: each rank its own part, so that nothing is sent."""
        device = next(iter(self.layers.values())).c.device
        for fqn in fqns:
            _, numel = self.store.weight_range(fqn)
            self.store.write(fqn, torch.zeros(numel, dtype=self.weights.dtype, device=device))

    def _sum_counts(self, report: TangentReport) -> None:
        mine = [report.swapped_vectors, report.redecomposed, report.moved, report.relative_update]
        device = next(iter(self.layers.values())).c.device
        totals = torch.tensor(mine, dtype=torch.float64, device=device)
        swapped, decomposed, moved, relative = self.collective.all_reduce_sum(totals).tolist()
        report.swapped_vectors, report.redecomposed = int(swapped), int(decomposed)
        report.moved, report.relative_update = int(moved), relative

    def _prove(self, report: TangentReport) -> None:
        prove_installed(
            report,
            layers=self.layers,
            owners=self.owners,
            weights=self.weights,
            basis=self.basis,
            store=self.store,
            collective=self.collective,
        )
        self._proven = True

    @property
    def _delivery(self) -> Delivery:
        return Delivery(
            layers=self.layers,
            owners=self.owners,
            store=self.store,
            collective=self.collective,
            clock=self.clock,
        )
