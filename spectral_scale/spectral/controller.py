"""The boundary protocol: collect, commit, decompose, sample, agree, install (architecture, 2).

The controller decides when and what; the bank holds the truth; the store reaches the parameters.
Every rank calls the same methods in the same order; only owners compute.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from spectral_scale.config.check import iterations_per_round
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.layers.base import weights_set_aside
from spectral_scale.layers.convert import spectral_layers
from spectral_scale.ops.sampling import sample_triplets
from spectral_scale.parallel.collective import Collective, SingleProcess
from spectral_scale.parallel.store import MomentMover, ParameterStore, TorchStore
from spectral_scale.spectral.bank import SpectralBank
from spectral_scale.spectral.moments import Held, held, settle_moments
from spectral_scale.spectral.owners import assign_owners
from spectral_scale.spectral.ramp import ramp_learning_rates
from spectral_scale.spectral.report import BoundaryReport
from spectral_scale.spectral.schedule import SpectralSchedule
from spectral_scale.spectral.spectrum import LayerSpectrum, describe

logger = logging.getLogger(__name__)

WeightSource = Callable[[str], Tensor]
"""Layer name -> dense initial weight (out, in); called on the owner only."""


class SpectralController:
    """Owns the bank and swaps triplets in and out of a converted model.

    Creating it decomposes every converted weight and installs the first triplets. Call
    `after_step()` after every applied optimizer step.

    Args:
        model: converted by `convert()`; unwrapped (no DDP prefix in the names).
        optimizer: the torch optimizer with groups of `param_groups`; None leaves learning rates
            alone (a host's optimizer is then given to `ramp_learning_rates`).
        config: the method's settings.
        seed: with layer, round and iteration it determines every draw.
        collective: all ranks that train this model; by default those of the store.
        store: how parameters are reached; by default as plain torch tensors.
        weights: initial dense weights by layer name; by default those that convert() set aside.
        bank_dtype: float32, or float64 in tests.
        decompose: False leaves the bank empty for `load_state`.

    Collective: all ranks construct it and call its methods alike.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        config: SpectralConfig,
        *,
        seed: int = 0,
        collective: Collective | None = None,
        store: ParameterStore | None = None,
        weights: WeightSource | None = None,
        bank_dtype: torch.dtype = torch.float32,
        decompose: bool = True,
    ) -> None:
        self.config, self.seed = config, seed
        self.collective = collective or (store.collective if store else SingleProcess())
        self.layers = spectral_layers(model)
        if not self.layers:
            raise ConfigError("the model holds no converted layer; call convert() first")
        shapes = {n: (m.out_features, m.in_features) for n, m in self.layers.items()}
        self.schedule = SpectralSchedule(
            steps_per_iteration=config.steps_per_iteration,
            iterations_per_round=iterations_per_round(config, [min(s) for s in shapes.values()]),
            warmup_steps=config.iteration_warmup_steps,
        )
        self.owners = assign_owners(shapes, self.collective.world_size)
        self.applied_steps = 0
        self._proven = False
        self.store = store or TorchStore(model, optimizer, self.collective)
        compute_device = next(iter(self.layers.values())).u.device
        self.bank = SpectralBank(
            device=torch.device("cpu") if config.bank_device == "cpu" else compute_device,
            compute_device=compute_device,
            dtype=bank_dtype,
        )
        if optimizer is not None:
            self.ramp_learning_rates(optimizer)
        if decompose:
            self._decompose_initial(weights or weights_set_aside(self.layers))
            self._begin_iteration(0)

    # -- what a training loop calls ---------------------------------------------------------

    def after_step(self) -> BoundaryReport | None:
        """Retract the trained factors and, when an iteration is complete, swap triplets.

        Call it once after every *applied* optimizer step, never inside gradient accumulation.
        Returns the boundary's report when one took place. Raises SpectralError on all ranks alike.
        """
        self.applied_steps += 1
        self.store.retract_columns(f"{n}.{leaf}" for n in self.layers for leaf in ("u", "v"))
        self.store.clamp_nonnegative(f"{n}.sigma" for n in self.layers)
        if not self.schedule.is_boundary(self.applied_steps):
            return None
        return self._boundary(self.schedule.iteration(self.applied_steps))

    def lr_factor(self) -> float:
        """Factor on the spectral groups' learning rates in the next step."""
        return self.schedule.ramp(self.applied_steps)

    def ramp_learning_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Multiply the lr of groups marked `spectral` by `lr_factor()` inside `optimizer.step`."""
        ramp_learning_rates(optimizer, self.lr_factor)

    def nbytes(self) -> int:
        """Bytes of the triplets this rank owns."""
        return self.bank.nbytes()

    def describe(self) -> str:
        """One line for a person: what was converted, what trains, when it changes."""
        config = self.config
        return (
            f"SST ({config.storage}): {len(self.layers)} matrices converted, "
            f"{config.spectral_rank} triplets of each train for {config.steps_per_iteration} "
            f"steps, SVD every {self.schedule.iterations_per_round} iterations"
        )

    # -- the boundary ----------------------------------------------------------------------

    def _boundary(self, iteration: int) -> BoundaryReport:
        started = time.perf_counter()
        report = BoundaryReport(iteration=iteration)
        problem = None
        mine: dict[str, LayerSpectrum] = {}
        for name, owner in self.owners.items():
            trained = {
                leaf: self.store.collect(f"{name}.{leaf}", owner=owner)
                for leaf in ("u", "sigma", "v")
            }
            if owner == self.collective.rank and problem is None:
                try:
                    self._commit(name, trained, iteration, report, mine)
                except (ValueError, RuntimeError, MemoryError) as error:
                    problem = f"{name}: {error}; restart from the last checkpoint"
                    if isinstance(error, ValueError):  # not finite
                        problem += " with a lower learning rate"
        self._agree(problem, "boundary")
        self._gather_spectra(mine, report)
        self._begin_iteration(iteration, report)
        self._check_counts(report)
        if not self._proven:
            self._prove_installed(report)
        report.seconds = time.perf_counter() - started
        return report

    def _commit(
        self,
        name: str,
        trained: Mapping[str, Tensor | None],
        iteration: int,
        report: BoundaryReport,
        spectra: dict[str, LayerSpectrum],
    ) -> None:
        """Owner only: bank the trained values, and decompose if a round ends."""
        u, sigma, v = (trained[leaf] for leaf in ("u", "sigma", "v"))
        if u is None or sigma is None or v is None:
            raise ValueError("the store delivered nothing to the owner")
        self.bank.commit(name, u, sigma, v)
        spectra[name] = describe(self.bank[name])
        if not self.schedule.starts_round(iteration, self._offset(name)):
            return
        try:
            self.bank.redecompose(name)
            report.redecomposed += 1
        except torch.linalg.LinAlgError as error:
            logger.warning("%s keeps its factors for another round: %s", name, error)
            report.kept_factors += 1

    def _begin_iteration(self, iteration: int, report: BoundaryReport | None = None) -> None:
        """Draw, build and install the triplets of `iteration`, matrix by matrix."""
        report = report or BoundaryReport(iteration=iteration)
        changes: dict[str, tuple[Held, Held, int]] = {}
        for name, owner in self.owners.items():
            if owner == self.collective.rank:
                before = self._held(name)
                report.swapped_triplets += self._draw(name, iteration)
                changes[name] = before, self._held(name), self.bank[name].sigma.numel()
            self._install(name, owner)
            report.layers += 1
            report.active_triplets += self.layers[name].trained_shapes()["u"][1]
        self._settle_moments(changes, report)
        totals = torch.tensor(
            [report.swapped_triplets, report.redecomposed, report.kept_factors], dtype=torch.int64
        ).to(next(iter(self.layers.values())).u.device)
        counts = self.collective.all_reduce_sum(totals).tolist()
        report.swapped_triplets, report.redecomposed, report.kept_factors = counts

    def _settle_moments(
        self, changes: Mapping[str, tuple[Held, Held, int]], report: BoundaryReport
    ) -> None:
        """Zero the optimizer's moments of what trained before, or keep those that may stay."""
        if self.config.boundary_moments == "reset":
            report.moments_reset = self.store.reset_moments(self._trained_fqns())
            return
        if not isinstance(self.store, MomentMover):
            raise SpectralError(
                f"spectral.boundary_moments={self.config.boundary_moments} needs a store that can "
                f"move moments; {type(self.store).__name__} cannot: set it to reset"
            )
        for name, owner in self.owners.items():
            zeroed, kept = settle_moments(
                self.store,
                self.collective,
                self.config,
                name,
                owner=owner,
                shapes=self.layers[name].trained_shapes(),
                change=changes.get(name),
                device=self.layers[name].u.device,
            )
            report.moments_reset += zeroed
            report.moments_kept += kept

    def _held(self, name: str) -> Held:
        return held(self.bank[name], all_sigma=self.layers[name].residual is None)

    def _draw(self, name: str, iteration: int) -> int:
        """Owner only: choose the active set; the number of triplets that were not active before."""
        entry = self.bank[name]
        round_, position = self.schedule.position(iteration, self._offset(name))
        drawn = sample_triplets(
            entry.sigma,
            self.config.spectral_rank,
            self.config.sampling,
            seed=self.seed,
            layer=name,
            round=round_,
            iteration=position,
        )
        before = set(entry.active.tolist())
        entry.active = drawn.to(entry.sigma.device)
        if self.config.extra_sigma:
            others = entry.complement()
            extra = sample_triplets(
                entry.sigma[others],
                self.config.extra_sigma,
                "uniform",
                seed=self.seed,
                layer=f"{name}/extra",
                round=round_,
                iteration=position,
            )
            entry.extra = others[extra.to(others.device)]
        return len(set(drawn.tolist()) - before)

    def _install(self, name: str, owner: int, *, trained: bool = True) -> None:
        """Deliver the owner's active factors and frozen rest to every rank's layer, in place."""
        layer = self.layers[name]
        factored = layer.residual is None
        leaves = ["u", "v", "sigma"] if trained else []
        leaves += ["u_fixed", "v_fixed"] if layer.u_fixed is not None else []
        leaves += [] if factored else ["residual"]
        values: dict[str, Tensor | None] = {f"{name}.{leaf}": None for leaf in leaves}
        if owner == self.collective.rank:
            found = self.bank.frozen_values(name, factored=factored)
            if trained:
                found |= self.bank.trained_values(name, all_sigma=factored)
            values = {f"{name}.{leaf}": found[leaf] for leaf in leaves}
        self.store.install(values, owner=owner)
        layer.ready = True

    def _check_counts(self, report: BoundaryReport) -> None:
        """A method that is silently off is the field's worst defect: count, every time."""
        layers, r = len(self.layers), self.config.spectral_rank
        shapes = [s for layer in self.layers.values() for s in layer.trained_shapes().values()]
        moments = 2 * sum(math.prod(shape) for shape in shapes)
        settled = moments - report.moments_kept
        expected = {"layers": layers, "active_triplets": layers * r, "moments_reset": settled}
        for what, count in expected.items():
            if getattr(report, what) != count:
                raise SpectralError(
                    f"boundary {report.iteration} touched {getattr(report, what)} {what}, "
                    f"expected {count}; the optimizer must hold the converted parameters and have "
                    "taken a step"
                )
        k = min(min(m.in_features, m.out_features) for m in self.layers.values())
        if report.swapped_triplets == 0 and r < k:
            logger.warning("boundary %d swapped no triplet", report.iteration)

    def _prove_installed(self, report: BoundaryReport) -> None:
        """Read every installed direction back, once a process, and log what was touched."""
        device = next(iter(self.layers.values())).u.device
        found = torch.zeros((), dtype=torch.int64, device=device)
        for name, owner in self.owners.items():
            installed = self.store.collect(f"{name}.u", owner=owner)
            if installed is not None:
                entry = self.bank[name]
                expected = entry.u[:, entry.active].to(installed)
                found += torch.isclose(installed, expected, atol=1e-2, rtol=0).all(dim=0).sum()
        count = int(self.collective.all_reduce_sum(found))
        if count != report.active_triplets:
            raise SpectralError(
                f"boundary {report.iteration} installed {count} of {report.active_triplets} "
                "triplets; the store does not write where the model reads"
            )
        self._proven = True
        logger.info(
            "first boundary: %d layers, %d active triplets (%d swapped in), %d moments reset",
            report.layers,
            report.active_triplets,
            report.swapped_triplets,
            report.moments_reset,
        )

    # -- state -----------------------------------------------------------------------------

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors this rank saves, by checkpoint name: the triplets it owns.

        The active ones are as of the last boundary; their present values are the model's.
        """
        for name, entry in self.bank.items():
            for leaf in self._saved_leaves():
                yield f"bank/{name}/{leaf}", getattr(entry, leaf)

    def load_state(self, read: Callable[[str], Tensor], applied_steps: int) -> None:
        """Take over a checkpoint's triplets and rebuild every frozen weight from them. Collective.

        Args:
            read: checkpoint name -> whole tensor.
            applied_steps: optimizer steps taken when it was saved.
        """
        self.applied_steps = applied_steps
        for name, owner in self.owners.items():
            if owner == self.collective.rank:
                saved = {leaf: read(f"bank/{name}/{leaf}") for leaf in self._saved_leaves()}
                self.bank.put(name, **saved)
            self._install(name, owner, trained=False)

    # -- small parts -----------------------------------------------------------------------

    def _decompose_initial(self, weights: WeightSource) -> None:
        problem = None
        for name, owner in self.owners.items():
            if owner == self.collective.rank and problem is None:
                try:
                    self.bank.decompose(name, weights(name))
                except (ValueError, RuntimeError, MemoryError) as error:
                    problem = f"{name}: {error}"
            self.layers[name].initial_weight = None
        self._agree(problem, "initial decomposition")

    def _offset(self, name: str) -> int:
        if not self.config.stagger_rounds:
            return 0
        index = list(self.layers).index(name)
        return index * self.schedule.iterations_per_round // len(self.layers)

    def _saved_leaves(self) -> tuple[str, ...]:
        leaves = ("u", "sigma", "v", "active")
        return (*leaves, "extra") if self.config.extra_sigma else leaves

    def _trained_fqns(self) -> list[str]:
        return [
            f"{n}.{leaf}" for n, layer in self.layers.items() for leaf in layer.trained_shapes()
        ]

    def _agree(self, problem: str | None, what: str) -> None:
        agreed = self.collective.agree(problem, what=what)
        if agreed is not None:
            raise SpectralError(agreed)

    def _gather_spectra(self, mine: dict[str, LayerSpectrum], report: BoundaryReport) -> None:
        raw = {name: spectrum.to_json() for name, spectrum in mine.items()}
        gathered = self.collective.gather_json(raw) or []
        merged = {name: item for part in gathered for name, item in part.items()}
        report.spectra = {n: LayerSpectrum(**merged[n]) for n in self.layers if n in merged}
