"""When triplets swap, and what a training loop sees of it.

The controller decides when; the swap protocol does it; the bank holds the truth; the store
reaches the parameters. Every rank calls the same methods in the same order; only owners compute.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from spectral_scale.config.methods.sst import iterations_per_round
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import ConfigError
from spectral_scale.methods.delivery import take_over_weights
from spectral_scale.methods.frozen_weight import multiplies_int8
from spectral_scale.methods.layer import weights_set_aside
from spectral_scale.methods.lr_ramp import ramp_learning_rates
from spectral_scale.methods.owners import assign_owners
from spectral_scale.methods.phases import PhaseClock
from spectral_scale.methods.schedule import SpectralSchedule
from spectral_scale.methods.sst.bank import SpectralBank
from spectral_scale.methods.sst.layer import forget_casts, keep_casts, spectral_layers
from spectral_scale.methods.sst.report import SwapReport
from spectral_scale.methods.sst.swap import Swap
from spectral_scale.methods.state import StatefulController
from spectral_scale.parallel.collective import Collective, SingleProcess
from spectral_scale.parallel.store import ParameterStore, TorchStore

WeightSource = Callable[[str], Tensor]
"""Layer name -> dense initial weight (out, in); called on the owner only."""


class SpectralController(StatefulController):
    """Owns the bank and swaps triplets in and out of a converted model.

    Creating it decomposes every converted weight and scatters the first triplets. Call
    `after_step()` after every applied optimizer step.

    Args:
        model: converted by `convert()`; unwrapped (no DDP prefix in the names).
        optimizer: the torch optimizer with groups of `param_groups`; None leaves learning rates
            alone (a backend's optimizer is then given to `ramp_learning_rates`).
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
        self.store = store or TorchStore(model, optimizer, self.collective)
        self._require_kept_whole_numbers()
        compute_device = next(iter(self.layers.values())).u.device
        self.bank = SpectralBank(
            device=torch.device("cpu") if config.bank_device == "cpu" else compute_device,
            compute_device=compute_device,
            dtype=bank_dtype,
        )
        self.swap = Swap(
            config=config,
            seed=seed,
            schedule=self.schedule,
            layers=self.layers,
            owners=self.owners,
            bank=self.bank,
            store=self.store,
            collective=self.collective,
            clock=PhaseClock(self.collective.rank, compute_device),
        )
        if optimizer is not None:
            self.ramp_learning_rates(optimizer)
        if self.store.keeps_parameters:
            keep_casts(self.layers)
        if decompose:
            self._decompose_initial(weights or weights_set_aside(self.layers))
            self.swap.begin(0)

    # -- what a training loop calls ---------------------------------------------------------

    def needs_verdict(self) -> bool:
        """Whether triplets swap after the coming step, if it is applied."""
        return self.schedule.is_swap(self.applied_steps + 1)

    def after_step(self, left_out: Tensor | None = None) -> SwapReport | None:
        """Retract the trained factors and, when an iteration is complete, swap triplets.

        Call it once after every *applied* optimizer step, never inside gradient accumulation.
        Returns the swap's report when one took place. Raises SpectralError on all ranks alike.

        Args:
            left_out: given where only the device knows whether the step was applied, and not where
                `needs_verdict`. If it is 1, directions keep every bit, and singular values do so
                because they were clamped in the step before.
        """
        self.applied_steps += 1
        forget_casts(self.layers)
        directions = [f"{n}.{leaf}" for n in self.layers for leaf in ("u", "v")]
        if self.store.retracts_in_step:
            self.store.require_retracted(directions)
        else:
            unless = None if left_out is None else left_out.bool()
            self.store.retract_columns(directions, unless=unless)
        self.store.clamp_nonnegative(f"{n}.sigma" for n in self.layers)
        if not self.schedule.is_swap(self.applied_steps):
            return None
        return self.swap.run(self.schedule.iteration(self.applied_steps))

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
        rest = self._describe_eight_bits()
        return (
            f"SST ({config.storage}{rest}): {len(self.layers)} matrices converted, "
            f"{config.spectral_rank} triplets of each train for {config.steps_per_iteration} "
            f"steps, SVD every {self.schedule.iterations_per_round} iterations"
        )

    # -- state -----------------------------------------------------------------------------

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors this rank saves, by checkpoint name: the triplets it owns.

        Active triplets are as of the last swap; their present values are the model's.
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
        forget_casts(self.layers)
        for name, owner in self.owners.items():
            if owner == self.collective.rank:
                saved = {leaf: read(f"bank/{name}/{leaf}") for leaf in self._saved_leaves()}
                self.bank.put(name, **saved)
        self.swap.scatter(trained=False)

    # -- small parts -----------------------------------------------------------------------

    def _describe_eight_bits(self) -> str:
        """What becomes of residuals of whole numbers in a product; nothing if there are none."""
        scale = next(iter(self.layers.values())).residual_scale
        if scale is None:
            return ""
        how = "multiplied as it is" if multiplies_int8(scale.device) else "widened for each product"
        return f" of eight bits, {how}"

    def _require_kept_whole_numbers(self) -> None:
        """Raise ConfigError if the store's host might cast a residual of whole numbers."""
        held = any(layer.residual_scale is not None for layer in self.layers.values())
        if held and not self.store.keeps_whole_numbers:
            raise ConfigError(
                "spectral.residual_dtype=int8 does not run behind "
                f"{type(self.store).__name__}, whose host was not shown to keep whole numbers; "
                "convert with residual_dtype=auto, or train on plain torch"
            )

    def _decompose_initial(self, weights: WeightSource) -> None:
        def take(name: str) -> None:
            kind = self.config.initialization
            if kind == "svd":
                self.bank.decompose(name, weights(name))
            else:
                self.bank.discard(name, weights(name), kind, seed=self.seed)

        take_over_weights(
            take,
            layers=self.layers,
            owners=self.owners,
            collective=self.collective,
            what="initial decomposition",
        )

    def _saved_leaves(self) -> tuple[str, ...]:
        leaves = ("u", "sigma", "v", "active")
        return (*leaves, "extra") if self.config.extra_sigma else leaves
