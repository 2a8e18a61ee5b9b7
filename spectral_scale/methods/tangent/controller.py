"""When bases swap, and what a training loop sees of it.

The controller decides when; the swap does it; the owned weights are the truth; the store reaches
the parameters. Every rank calls the same methods in the same order; only owners compute.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from spectral_scale.config.methods.tangent import basis_of
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import ConfigError
from spectral_scale.methods.delivery import take_over_weights
from spectral_scale.methods.layer import weights_set_aside
from spectral_scale.methods.lr_ramp import ramp_learning_rates
from spectral_scale.methods.owners import assign_owners
from spectral_scale.methods.phases import PhaseClock
from spectral_scale.methods.schedule import SpectralSchedule
from spectral_scale.methods.state import StatefulController
from spectral_scale.methods.tangent.basis import make_basis
from spectral_scale.methods.tangent.layer import tangent_layers
from spectral_scale.methods.tangent.report import TangentReport
from spectral_scale.methods.tangent.swap import TangentSwap
from spectral_scale.methods.tangent.truth import OwnedWeights
from spectral_scale.parallel.collective import Collective, SingleProcess
from spectral_scale.parallel.store import ParameterStore, TorchStore


class TangentController(StatefulController):
    """Owns the weights of a model converted by `convert_tangent` and swaps the bases of updates.

    Creating it takes every converted weight over and scatters the first bases. Call `after_step()`
    after every applied optimizer step.

    Args:
        model: converted; unwrapped (no DDP prefix in the names).
        optimizer: the torch optimizer with groups of `param_groups`; None leaves learning rates
            alone (a backend's optimizer is then given to `ramp_learning_rates`).
        config: the method's settings.
        seed: with layer, side and round it determines every basis.
        collective: all ranks that train this model; by default those of the store.
        store: how parameters are reached; by default as plain torch tensors.
        weights: initial dense weights by layer name; by default those set aside at conversion.
        weight_dtype: of the truth: float32, or float64 in tests.
        initialise: False when `load_state` follows.
        moments: what the optimizer keeps of each entry of a factor: 2 with AdamW, 1 with Muon.

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
        weights: Callable[[str], Tensor] | None = None,
        weight_dtype: torch.dtype = torch.float32,
        initialise: bool = True,
        moments: int = 2,
    ) -> None:
        self.config = config
        self.collective = collective or (store.collective if store else SingleProcess())
        self.layers = tangent_layers(model)
        if not self.layers:
            raise ConfigError("the model holds no converted layer; call convert_tangent() first")
        shapes = {n: (m.out_features, m.in_features) for n, m in self.layers.items()}
        self.schedule = SpectralSchedule(
            steps_per_iteration=config.steps_per_iteration,
            iterations_per_round=1,
            warmup_steps=config.iteration_warmup_steps,
        )
        self.owners = assign_owners(shapes, self.collective.world_size)
        self.applied_steps = 0
        compute_device = next(iter(self.layers.values())).c.device
        self.weights = OwnedWeights(
            device=torch.device("cpu") if config.bank_device == "cpu" else compute_device,
            compute_device=compute_device,
            dtype=weight_dtype,
        )
        self.swap = TangentSwap(
            spectral_rank=config.spectral_rank,
            moments=moments,
            layers=self.layers,
            owners=self.owners,
            weights=self.weights,
            basis=make_basis(config, seed),
            store=store or TorchStore(model, optimizer, self.collective),
            collective=self.collective,
            clock=PhaseClock(self.collective.rank, compute_device),
        )
        if optimizer is not None:
            self.ramp_learning_rates(optimizer)
        if initialise:
            self._take_over(weights or weights_set_aside(self.layers))
            self.swap.begin(0)

    # -- what a training loop calls ---------------------------------------------------------

    def needs_verdict(self) -> bool:
        """Whether bases swap after the coming step, if it is applied."""
        return self.schedule.is_swap(self.applied_steps + 1)

    def after_step(self, left_out: Tensor | None = None) -> TangentReport | None:
        """Count the step and, when an iteration is complete, merge what trained and swap bases.

        Call it once after every *applied* optimizer step, never inside gradient accumulation.
        Returns the swap's report when one took place. Raises SpectralError on all ranks alike.

        Args:
            left_out: given where only the device knows whether the step was applied, and not where
                `needs_verdict`. Between swaps no tensor changes here, so that it is not read.
        """
        self.applied_steps += 1
        if not self.schedule.is_swap(self.applied_steps):
            return None
        return self.swap.run(self.schedule.iteration(self.applied_steps))

    def lr_factor(self) -> float:
        """Factor on the factors' learning rate in the next step."""
        return self.schedule.ramp(self.applied_steps)

    def ramp_learning_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Multiply the lr of groups marked `spectral` by `lr_factor()` inside `optimizer.step`."""
        ramp_learning_rates(optimizer, self.lr_factor)

    def nbytes(self) -> int:
        """Bytes of the weights this rank owns and of the states of their bases."""
        return self.weights.nbytes()

    def describe(self) -> str:
        """One line for a person: what was converted, what trains, when it changes."""
        config = self.config
        return (
            f"SST in the tangent form ({basis_of(config)} bases): {len(self.layers)} matrices "
            f"converted, {config.spectral_rank} vectors a side of each train for "
            f"{config.steps_per_iteration} steps"
        )

    # -- state ------------------------------------------------------------------------------

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors this rank saves, by checkpoint name: the weights it owns, as of the last swap,
        and the states of their bases."""
        for name, entry in self.weights.items():
            yield f"base/{name}", entry.weight
            for leaf, tensor in entry.basis.items():
                yield f"basis/{name}/{leaf}", tensor

    def load_state(self, read: Callable[[str], Tensor], applied_steps: int) -> None:
        """Take over a checkpoint's weights and bases; the factors are the model's. Collective.

        Args:
            read: checkpoint name -> whole tensor.
            applied_steps: optimizer steps taken when it was saved.
        """
        self.applied_steps = applied_steps
        for name, owner in self.owners.items():
            if owner == self.collective.rank:
                state = {leaf: read(f"basis/{name}/{leaf}") for leaf in self.swap.basis.leaves}
                self.weights.put(name, read(f"base/{name}"), state)
        self.swap.scatter()

    # -- small parts ------------------------------------------------------------------------

    def _take_over(self, weights: Callable[[str], Tensor]) -> None:
        take_over_weights(
            lambda name: self.weights.put(name, weights(name)),
            layers=self.layers,
            owners=self.owners,
            collective=self.collective,
            what="initial weights",
        )
