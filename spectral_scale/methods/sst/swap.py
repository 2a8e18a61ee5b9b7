"""The swap protocol, whose phases are named in `phases.PHASES`.

    collect    gather each matrix's trained u, sigma, v on its owner
    commit     the owner writes them into its bank
    decompose  at the end of a round the owner decomposes the matrix again
    sample     the owner draws which triplets train next
    rebuild    the owner forms the frozen values that go with them
    agree      all ranks learn whether any owner failed
    deliver    scatter trained and frozen values into every rank's layers
    reset      zero Adam's moments, or move them with their triplets

Every rank runs the same phases in the same order; only owners compute, and all of them at the same
time: nothing that waits for another rank comes between two decompositions.

Invariant: a swap leaves the function of the model as it is, up to rounding; only the set of
triplets that train changes. An owner's error is kept until `agree`, so that no rank waits in a
collective that another will never enter.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectral_scale.config.schema import SpectralConfig
from spectral_scale.methods.delivery import Delivery
from spectral_scale.methods.phases import OwnerWork, PhaseClock
from spectral_scale.methods.schedule import SpectralSchedule
from spectral_scale.methods.sst.bank import SpectralBank
from spectral_scale.methods.sst.checks import check_counts, prove_scattered
from spectral_scale.methods.sst.layer import SpectralLinear
from spectral_scale.methods.sst.moments import Change, Held, held, update_all_moments
from spectral_scale.methods.sst.report import SwapReport
from spectral_scale.methods.sst.spectrum import LayerSpectrum, describe
from spectral_scale.ops.int8 import quantisation_error, quantise_rows
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.store import ParameterStore

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Swap:
    """Runs swaps. All methods are collective, and raise SpectralError on all ranks alike."""

    config: SpectralConfig
    """The method's settings."""
    seed: int
    """The run's seed, which enters the key of every draw."""
    schedule: SpectralSchedule
    """Tells when a swap is due, and when a matrix is decomposed again."""
    layers: Mapping[str, SpectralLinear]
    """Converted layers by name."""
    owners: Mapping[str, int]
    """Layer -> the rank that computes for it."""
    bank: SpectralBank
    """The triplets of the matrices that this rank owns."""
    store: ParameterStore
    """Access to the parameters, however the backend shards them."""
    collective: Collective
    """All ranks that train the model."""
    clock: PhaseClock
    """Clock that times the phases of a swap."""
    _proven: bool = field(default=False, init=False)
    _quantisation_errors: dict[str, float] = field(default_factory=dict, init=False)
    """Of the residuals that this rank built last."""

    def run(self, iteration: int) -> SwapReport:
        """End one iteration and begin `iteration`."""
        started = time.perf_counter()
        self.clock.start(iteration)
        report = SwapReport(iteration=iteration)
        work = OwnerWork()
        spectra = self._commit_trained(work)
        for name in self._mine:
            if work.problem is None and self.schedule.starts_round(iteration, self._offset(name)):
                with self.clock.phase("decompose"), work.on(name):
                    self._redecompose(name, report)
        self._delivery.agree(work.problem, "swap")
        self._gather_spectra(spectra, report)
        self.begin(iteration, report)
        if any(layer.residual_scale is not None for layer in self.layers.values()):
            report.quantisation_errors = self._gathered(self._quantisation_errors)
        check_counts(report, self.layers, self.config.spectral_rank)
        if not self._proven:
            self._prove(report)
        report.phase_seconds = self.clock.seconds  # waits for the device
        report.seconds = time.perf_counter() - started
        return report

    def begin(self, iteration: int, report: SwapReport | None = None) -> None:
        """Draw the triplets of `iteration`, build their values and scatter them."""
        report = report or SwapReport(iteration=iteration)
        work = OwnerWork()
        changes: dict[str, Change] = {}
        for name in self._mine:
            if work.problem is not None:
                break
            with self.clock.phase("sample"), work.on(name):
                before = self._held(name)
                report.swapped_triplets += self._draw(name, iteration)
                changes[name] = before, self._held(name), self.bank[name].sigma.numel()
        self._delivery.agree(work.problem, "sampling")
        self.scatter(trained=True)
        report.layers = len(self.layers)
        report.active_triplets = sum(x.trained_shapes()["u"][1] for x in self.layers.values())
        with self.clock.phase("reset"):
            zeroed, kept = update_all_moments(
                self.store,
                self.collective,
                self.config,
                owners=self.owners,
                shapes={name: layer.trained_shapes() for name, layer in self.layers.items()},
                changes=changes,
                device=self._device,
            )
            report.moments_reset, report.moments_kept = zeroed, kept
            self._sum_counts(report)

    def scatter(self, *, trained: bool) -> None:
        """Scatter the owners' frozen values, and factors if `trained`, into every rank's layers."""
        self._delivery.scatter(self._build, trained=trained)

    # -- the owner's work -------------------------------------------------------------------

    @property
    def _mine(self) -> list[str]:
        return [name for name, owner in self.owners.items() if owner == self.collective.rank]

    def _commit_trained(self, work: OwnerWork) -> dict[str, LayerSpectrum]:
        """Gather trained values into the owners' banks; returns the spectra of owned matrices."""
        spectra: dict[str, LayerSpectrum] = {}
        for name, owner in self.owners.items():
            with self.clock.phase("collect"):
                u, sigma, v = (
                    self.store.gather(f"{name}.{leaf}", owner=owner) for leaf in ("u", "sigma", "v")
                )
            if owner != self.collective.rank or work.problem is not None:
                continue
            with self.clock.phase("commit"), work.on(name):
                if u is None or sigma is None or v is None:
                    raise RuntimeError("the store delivered nothing to the owner")
                self.bank.commit(name, u, sigma, v)
                spectra[name] = describe(self.bank[name])
        return spectra

    def _redecompose(self, name: str, report: SwapReport) -> None:
        try:
            self.bank.redecompose(name)
            report.redecomposed += 1
        except torch.linalg.LinAlgError as error:
            logger.warning(
                "rank %d: %s keeps its factors for another round: %s",
                self.collective.rank,
                name,
                error,
            )
            report.kept_factors += 1

    def _draw(self, name: str, iteration: int) -> int:
        position = self.schedule.position(iteration, self._offset(name))
        return self.bank.draw(name, self.config, seed=self.seed, position=position)

    def _build(self, name: str, trained: bool) -> dict[str, Tensor]:
        """The new values of a layer by leaf; frozen ones in the dtype in which they are sent."""
        layer = self.layers[name]
        factored = layer.residual is None
        found = self.bank.frozen_values(name, factored=factored)
        if layer.residual_scale is not None:
            found |= self._quantised(name, found["residual"])
        found = {leaf: v.to(getattr(layer, leaf).dtype) for leaf, v in found.items()}
        if trained:
            found |= self.bank.trained_values(name, all_sigma=factored)
        return found

    def _quantised(self, name: str, residual: Tensor) -> dict[str, Tensor]:
        """The residual in whole numbers, from its values in the bank's full precision."""
        q, scale = quantise_rows(residual)
        self._quantisation_errors[name] = quantisation_error(residual, q, scale)
        return {"residual": q, "residual_scale": scale}

    # -- what ranks do together -------------------------------------------------------------

    def _sum_counts(self, report: SwapReport) -> None:
        mine = [report.swapped_triplets, report.redecomposed, report.kept_factors]
        totals = torch.tensor(mine, dtype=torch.int64, device=self._device)
        counts = self.collective.all_reduce_sum(totals).tolist()
        report.swapped_triplets, report.redecomposed, report.kept_factors = counts

    def _gather_spectra(self, mine: Mapping[str, LayerSpectrum], report: SwapReport) -> None:
        merged = self._gathered({name: spectrum.to_json() for name, spectrum in mine.items()})
        report.spectra = {name: LayerSpectrum(**raw) for name, raw in merged.items()}

    def _gathered(self, mine: Mapping[str, Any]) -> dict[str, Any]:
        """What all ranks have of each layer, in the model's order, on rank 0; nothing elsewhere."""
        with self.clock.phase("agree"):
            gathered = self.collective.gather_json(dict(mine)) or []
        merged = {name: item for of_rank in gathered for name, item in of_rank.items()}
        return {name: merged[name] for name in self.layers if name in merged}

    def _prove(self, report: SwapReport) -> None:
        prove_scattered(
            report,
            bank=self.bank,
            owners=self.owners,
            store=self.store,
            collective=self.collective,
            device=self._device,
        )
        self._proven = True

    # -- small parts ------------------------------------------------------------------------

    @property
    def _delivery(self) -> Delivery:
        return Delivery(
            layers=self.layers,
            owners=self.owners,
            store=self.store,
            collective=self.collective,
            clock=self.clock,
        )

    @property
    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).u.device

    def _held(self, name: str) -> Held:
        return held(self.bank[name], all_sigma=self.layers[name].residual is None)

    def _offset(self, name: str) -> int:
        """The number of iterations by which the rounds of this matrix are shifted."""
        if not self.config.stagger_rounds:
            return 0
        index = list(self.layers).index(name)
        return index * self.schedule.iterations_per_round // len(self.layers)
