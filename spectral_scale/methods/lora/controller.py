"""The controller of LoRA, whose base never changes, and of ReLoRA*, which merges into it.

ReLoRA* (arXiv 2307.05695 without the full-rank warm-up, as SST's paper compares it): every T3 steps
the base takes the factors' product up, lora_a is drawn afresh, lora_b becomes zero, and all of the
factors' optimizer state is zeroed, step counts included.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectral_scale.config.methods import method_spec
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.layer import weights_set_aside
from spectral_scale.methods.lora.layer import (
    draw_lora_a,
    lora_layers,
    lora_scaling,
    product_of_factors,
)
from spectral_scale.methods.lr_ramp import ramp_learning_rates
from spectral_scale.methods.owners import assign_owners
from spectral_scale.methods.schedule import SpectralSchedule
from spectral_scale.methods.state import StatefulController
from spectral_scale.parallel.collective import Collective, SingleProcess
from spectral_scale.parallel.store import ParameterStore, TorchStore

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class MergeReport:
    """Counts of what one merge touched; they are checked against the expected ones."""

    merge: int
    """Merges so far, this one included."""
    layers: int = 0
    """Matrices whose base took the product of the factors up."""
    moments_reset: int = 0
    """Entries of exp_avg and exp_avg_sq set to zero."""
    relative_update: float = 0.0
    """|scaling B A| / |W| in the Frobenius norm, averaged over the matrices."""
    seconds: float = 0.0
    """Wall time on this rank."""

    def metrics(self) -> dict[str, Any]:
        """The counts, the size of what was merged and the seconds."""
        return {
            "relora/merge": self.merge,
            "relora/layers": self.layers,
            "relora/moments_reset": self.moments_reset,
            "relora/relative_update": self.relative_update,
            "relora/merge_seconds": self.seconds,
        }


class LowRankController(StatefulController):
    """Draws the factors of a model converted by `convert_lora` and, for relora, merges them.

    Call `after_step()` after every applied optimizer step.

    Args:
        model: converted; unwrapped (no DDP prefix in the names).
        optimizer: the torch optimizer; its groups as `param_groups` builds them.
        config: method (lora or relora), rank and schedule.
        seed: with layer and merge count it determines every draw of lora_a.
        collective: all ranks that train this model.
        store: how parameters are reached; by default as plain torch tensors.
        weights: initial dense weights by layer name; by default those set aside at conversion.
        base_dtype: ReLoRA*'s merges add up in this dtype. Where the layers hold the base in
            another one (bf16), each matrix's owner keeps a copy in it, as SST's bank does.
        initialise: False when `load_state` follows.
        ramps: whether ReLoRA* ramps the learning rates up after each merge, inside
            `optimizer.step`; False for a loop that sets them by `lr_factor` itself.

    Collective: all ranks construct it and call its methods alike.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: SpectralConfig,
        *,
        seed: int = 0,
        collective: Collective | None = None,
        store: ParameterStore | None = None,
        weights: Callable[[str], Tensor] | None = None,
        base_dtype: torch.dtype = torch.float32,
        initialise: bool = True,
        ramps: bool = True,
    ) -> None:
        self.config, self.seed, self.base_dtype = config, seed, base_dtype
        self.merges = method_spec(config.method).swaps
        self.collective = collective or SingleProcess()
        self.layers = lora_layers(model)
        if not self.layers:
            raise ConfigError("the model holds no LoRA layer; call convert_lora() first")
        shapes = {n: (m.out_features, m.in_features) for n, m in self.layers.items()}
        self.owners = assign_owners(shapes, self.collective.world_size)
        self.schedule = SpectralSchedule(
            steps_per_iteration=config.steps_per_iteration,
            iterations_per_round=1,
            warmup_steps=config.iteration_warmup_steps,
        )
        self.applied_steps = 0
        self.store = store or TorchStore(model, optimizer, self.collective)
        self._optimizer = optimizer
        if ramps and self.merges:
            ramp_learning_rates(optimizer, self.lr_factor)
        self._bases: dict[str, Tensor] = {}
        if initialise:
            self._initialise(weights or weights_set_aside(self.layers))

    # -- what a training loop calls ---------------------------------------------------------

    def needs_verdict(self) -> bool:
        """Whether the coming step, if it is applied, is checked or followed by a merge."""
        merge = self.merges and self.schedule.is_swap(self.applied_steps + 1)
        return merge or self.applied_steps == 0

    def after_step(self, left_out: Tensor | None = None) -> MergeReport | None:
        """Count the step and, for relora, merge when T3 steps are complete.

        Call it once after every *applied* optimizer step, never inside gradient accumulation.
        Returns the merge's report when one took place. Raises SpectralError on all ranks alike.
        Unless `needs_verdict`, no tensor is touched, whether or not the step is `left_out`.
        """
        self.applied_steps += 1
        if self.applied_steps == 1:
            self._check_that_factors_train()
        if not self.merges or not self.schedule.is_swap(self.applied_steps):
            return None
        return self._merge(self.schedule.iteration(self.applied_steps))

    def lr_factor(self) -> float:
        """Factor on the factors' learning rate in the next step; 1 for lora."""
        return self.schedule.ramp(self.applied_steps) if self.merges else 1.0

    def nbytes(self) -> int:
        """Bytes of the base weights this rank keeps besides the layers'."""
        return sum(base.nbytes for base in self._bases.values())

    def describe(self) -> str:
        """One line for a person: what was converted, what trains, when it changes."""
        rank, scaling = self.config.spectral_rank, lora_scaling(self.config)
        text = f"{len(self.layers)} matrices with factors of rank {rank}, scaling {scaling:g}"
        if not self.merges:
            return f"LoRA: {text}, never merged"
        return f"ReLoRA*: {text}, merged every {self.config.steps_per_iteration} steps"

    # -- state ------------------------------------------------------------------------------

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors this rank saves, by checkpoint name: the base weights it owns."""
        for name, owner in self.owners.items():
            base = self._base(name, owner)
            if base is not None and owner == self.collective.rank:
                yield f"base/{name}", base

    def load_state(self, read: Callable[[str], Tensor], applied_steps: int) -> None:
        """Take over a checkpoint's base weights; the factors are the model's. Collective.

        Args:
            read: checkpoint name -> whole tensor.
            applied_steps: optimizer steps taken when it was saved.
        """
        self.applied_steps = applied_steps
        for name, owner in self.owners.items():
            mine = owner == self.collective.rank
            base = self._keep(name, read(f"base/{name}")) if mine else None
            self.store.scatter({f"{name}.base": base}, owner=owner)
            self.layers[name].ready = True

    # -- small parts ------------------------------------------------------------------------

    def _initialise(self, weights: Callable[[str], Tensor]) -> None:
        for name, owner in self.owners.items():
            mine = owner == self.collective.rank
            base = self._keep(name, weights(name)) if mine else None
            self._scatter(name, owner, base, merge=0)
            self.layers[name].initial_weight = None
            self.layers[name].ready = True

    def _merge(self, merge: int) -> MergeReport:
        started = time.perf_counter()
        report = MergeReport(merge=merge)
        relative = torch.zeros((), dtype=torch.float64, device=self._device())
        for name, owner in self.owners.items():
            merged = self._merged(name, owner, relative)
            self._scatter(name, owner, merged, merge)
            report.layers += 1
        trained = [f"{n}.{leaf}" for n, m in self.layers.items() for leaf in m.trained_shapes()]
        report.moments_reset = self.store.reset_moments(trained)
        self._check_counts(report)
        total = float(self.collective.all_reduce_sum(relative))
        report.relative_update = total / len(self.layers)
        report.seconds = time.perf_counter() - started
        return report

    def _merged(self, name: str, owner: int, relative: Tensor) -> Tensor | None:
        """The merged base on the owner, None elsewhere; adds the product's relative size up."""
        a = self.store.gather(f"{name}.lora_a", owner=owner)
        b = self.store.gather(f"{name}.lora_b", owner=owner)
        base = self._base(name, owner)
        if a is None or b is None or base is None:
            return None
        a, b = (t.to(self.base_dtype) for t in (a, b))
        product = product_of_factors(a, b, lora_scaling(self.config))
        whole = base.to(product.device, self.base_dtype)
        relative += product.norm().double() / whole.norm().double().clamp_min(1e-300)
        return self._keep(name, whole + product)

    def _base(self, name: str, owner: int) -> Tensor | None:
        """The exact base on its owner: the copy kept there, or else the layer's own."""
        if self._keeps_copy(name):
            return self._bases.get(name)
        return self.store.gather(f"{name}.base", owner=owner)

    def _keep(self, name: str, base: Tensor) -> Tensor:
        """Owner only: hold the exact base if the layer rounds it; returns it."""
        if self._keeps_copy(name):
            device = self.layers[name].base.device
            resting = torch.device("cpu") if self.config.bank_device == "cpu" else device
            self._bases[name] = base.detach().to(resting, self.base_dtype)
        return base

    def _keeps_copy(self, name: str) -> bool:
        return self.merges and self.layers[name].base.dtype != self.base_dtype

    def _scatter(self, name: str, owner: int, base: Tensor | None, merge: int) -> None:
        """Scatter the base, a fresh lora_a and a zero lora_b into every rank's layer, in place."""
        layer = self.layers[name]
        values: dict[str, Tensor | None] = dict.fromkeys(
            [f"{name}.base", f"{name}.lora_a", f"{name}.lora_b"]
        )
        if owner == self.collective.rank:
            shape = (layer.rank, layer.in_features)
            values[f"{name}.base"] = base
            values[f"{name}.lora_a"] = draw_lora_a(shape, self.seed, "lora_a", name, merge)
            values[f"{name}.lora_b"] = torch.zeros(layer.out_features, layer.rank)
        self.store.scatter(values, owner=owner)

    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).lora_a.device

    def _check_counts(self, report: MergeReport) -> None:
        """A reset that resets nothing is a known fault of ReLoRA codes: count, every time."""
        shapes = [s for layer in self.layers.values() for s in layer.trained_shapes().values()]
        expected = {"layers": len(self.layers), "moments_reset": 2 * sum(map(math.prod, shapes))}
        for what, count in expected.items():
            if getattr(report, what) != count:
                raise SpectralError(
                    f"merge {report.merge} touched {getattr(report, what)} {what}, expected "
                    f"{count}; the optimizer must hold the factors and have taken a step"
                )

    def _check_that_factors_train(self) -> None:
        """After the first step some lora_b must have left zero, unless nothing is to train."""
        moved = torch.zeros((), dtype=torch.int64, device=self._device())
        for name, owner in self.owners.items():
            b = self.store.gather(f"{name}.lora_b", owner=owner)
            if b is not None:
                moved += b.any()
        count = int(self.collective.all_reduce_sum(moved))
        rates = [group["lr"] for group in self._optimizer.param_groups if group.get("spectral")]
        logger.info("the first step moved the factors of %d of %d", count, len(self.layers))
        if count == 0 and max(rates) > 0:
            raise SpectralError(
                f"the first step moved none of the {len(self.layers)} layers' factors; "
                "the optimizer must hold the converted parameters and see their gradients"
            )
