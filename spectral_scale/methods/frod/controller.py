"""Decomposes the categories of a model converted to FRoD, and keeps what must never be made again.

V is saved and read back, not recomputed: another routine may turn the sign of an eigenvector, the
weights would still be reconstructed, and a trained S would mean another update.
"""

import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import SpectralError
from spectral_scale.methods.frod.categories import group_by_category, owners_by_category
from spectral_scale.methods.frod.joint_decomposition import (
    column_lengths,
    inverse_lengths,
    joint_basis,
)
from spectral_scale.methods.frod.layer import frod_layers
from spectral_scale.methods.frod.product import CategoryBasis
from spectral_scale.methods.frod.sparsity import Pattern, draw_positions
from spectral_scale.methods.layer import weights_set_aside
from spectral_scale.methods.lr_ramp import require_spectral_group
from spectral_scale.methods.state import StatefulController
from spectral_scale.parallel.collective import Collective, SingleProcess
from spectral_scale.parallel.store import ParameterStore, TorchStore

logger = logging.getLogger(__name__)

WeightSource = Callable[[str], Tensor]
"""Layer name -> dense weight (out, in); called on the owner only, twice or more."""


class FRoDController(StatefulController):
    """Gives the layers of `convert_frod` their frozen weights and their categories' bases.

    Each rank reads the matrices it owns, one at a time, and the ranks add up n x n sums; no rank
    ever holds the model. Call `after_step()` after every applied optimizer step.

    Args:
        model: converted; unwrapped (no DDP prefix in the names).
        optimizer: the torch optimizer; its groups as `param_groups` builds them. None: nothing
            trains.
        config: the sparsity of S and the ridge of the decomposition.
        seed: with the category it determines the positions of S.
        collective: all ranks that train this model; by default those of the store.
        store: how parameters are reached; by default as plain torch tensors.
        weights: dense weights by layer name; by default those set aside at conversion.
        dtype: dtype of V; float32, or float64 in tests.
        decompose: False when `load_state` follows.

    Collective: all ranks construct it and call its methods alike. Raises ConfigError for a category
    with one layer or differing widths, SpectralError for matrices that cannot be decomposed.
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
        dtype: torch.dtype = torch.float32,
        decompose: bool = True,
    ) -> None:
        self.config, self.seed, self.dtype = config, seed, dtype
        self.collective = collective or (store.collective if store else SingleProcess())
        self.layers = frod_layers(model)
        self.categories = group_by_category(self.layers)
        self.owners = owners_by_category(self.categories, self.collective.world_size)
        self.store = store or TorchStore(model, optimizer, self.collective)
        self.applied_steps = 0
        self.dead_directions = 0
        self._device = next(iter(self.layers.values())).value_delta.device
        self._weights = weights or weights_set_aside(self.layers)
        self._optimizer = optimizer
        if optimizer is not None:
            require_spectral_group(optimizer)
        if decompose:
            self._decompose_all()

    # -- what a training loop calls ---------------------------------------------------------

    def needs_verdict(self) -> bool:
        """Whether the coming step, if it is applied, is the first, which is checked."""
        return self.applied_steps == 0

    def after_step(self, left_out: Tensor | None = None) -> None:
        """Count the step; after the first, see that coefficients train. Raises SpectralError.

        No tensor is touched, whether or not the step is `left_out`.
        """
        self.applied_steps += 1
        if self.applied_steps == 1:
            self._check_that_coefficients_train()

    def lr_factor(self) -> float:
        """Nothing is ever swapped, so nothing ramps up again."""
        return 1.0

    def nbytes(self) -> int:
        """Bytes of the bases and of 1 / lambda, each once."""
        bases = {id(b): b.nbytes for m in self.layers.values() if (b := m.basis) is not None}
        lengths = (m.inverse_lengths for m in self.layers.values())
        return sum(bases.values()) + sum(t.nbytes for t in lengths if t is not None)

    def describe(self) -> str:
        """One line for a person: what was converted, what trains."""
        mixing = sum(layer.num_mixing for layer in self.layers.values())
        values = sum(layer.in_features for layer in self.layers.values())
        text = (
            f"FRoD: {len(self.layers)} matrices in {len(self.categories)} categories; {mixing:,} "
            f"entries of S and {values:,} of lambda train"
        )
        dead = f"; {self.dead_directions} directions are zero" if self.dead_directions else ""
        return text + dead

    # -- state ------------------------------------------------------------------------------

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Bases, positions and 1 / lambda by checkpoint name, from rank 0: every rank has them."""
        if self.collective.rank != 0:
            return
        for category, names in self.categories.items():
            basis, _ = self.layers[names[0]].shared()
            yield f"frod/{category}/v", basis.v
            yield f"frod/{category}/v_inverse_t", basis.v_inverse_t
            yield f"frod/{category}/positions", basis.pattern.positions
        for name, layer in self.layers.items():
            yield f"frod/{name}/inverse_lengths", layer.shared()[1]

    def load_state(self, read: Callable[[str], Tensor], applied_steps: int) -> None:
        """Take over saved bases; frozen weights come from `weights`. Collective.

        Args:
            read: checkpoint name -> whole tensor.
            applied_steps: optimizer steps taken when it was saved.
        """
        self.applied_steps = applied_steps
        for category, names in self.categories.items():
            v, v_inverse_t, positions = (
                read(f"frod/{category}/{leaf}") for leaf in ("v", "v_inverse_t", "positions")
            )
            basis = self._basis(category, v, v_inverse_t, positions)
            for name in names:
                lengths = read(f"frod/{name}/inverse_lengths")
                self._finish(name, basis, lengths.to(self._device, self.dtype))

    # -- small parts ------------------------------------------------------------------------

    def _decompose_all(self) -> None:
        started = time.perf_counter()
        norms = self._largest_norms()
        for category, names in self.categories.items():
            basis = self._decompose(category, names, norms[category])
            for name in names:
                self._finish(name, basis, self._inverse_lengths(name, basis))
                self._set_zero(name)
        for layer in self.layers.values():
            layer.initial_weight = None
        seconds = time.perf_counter() - started
        logger.info("%s, decomposed in %.1f s", self.describe(), seconds)

    def _largest_norms(self) -> dict[str, float]:
        """The largest squared Frobenius norm in each category; NaN counts as the largest."""
        mine = {n: float(self._weights(n).double().square().sum()) for n in self._owned()}
        every = self.collective.broadcast_json(self.collective.gather_json(mine))
        norms = {name: value for rank in every for name, value in rank.items()}
        return {c: _largest([norms[n] for n in names]) for c, names in self.categories.items()}

    def _decompose(self, category: str, names: list[str], largest: float) -> CategoryBasis:
        width, owned = self.layers[names[0]].in_features, set(self._owned())
        mine = [n for n in names if n in owned]
        try:
            found = joint_basis(
                [lambda n=n: self._weights(n) for n in mine],  # type: ignore[misc]
                self.config.ridge,
                sum_over_ranks=self.collective.all_reduce_sum,
                largest=largest,
                count=len(names),
                width=width,
                device=self._device,
            )
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise SpectralError(
                f"category {category} ({len(names)} matrices of width {width}) cannot be "
                f"decomposed: {error}; check the weights, or leave it out of spectral.targets"
            ) from error
        if found.singular:
            logger.warning(
                "category %s: its stack has no full column rank; its right singular vectors are "
                "the basis, and directions that a layer does not use cannot train there",
                category,
            )
        v, inverse = (t.to(self.dtype).contiguous() for t in (found.v, found.v_inverse_t))
        # All ranks have the same bits on equal machines; on unequal ones, these.
        v, inverse = (self.collective.broadcast(t, 0) for t in (v, inverse))
        positions = draw_positions(width, self.config.sparsity, self.seed, "frod", category)
        return self._basis(category, v, inverse, positions)

    def _inverse_lengths(self, name: str, basis: CategoryBasis) -> Tensor:
        owner = self.owners[name]
        value = torch.zeros(basis.v.shape[0], dtype=self.dtype, device=self._device)
        if owner == self.collective.rank:
            weight = self._weights(name).to(self._device)
            value.copy_(inverse_lengths(column_lengths(weight, basis.v_inverse_t)))
        return self.collective.broadcast(value, owner)

    def _basis(self, category: str, v: Tensor, inverse: Tensor, positions: Tensor) -> CategoryBasis:
        width = v.shape[0]
        return CategoryBasis(
            category=category,
            v=v.to(self._device, self.dtype),
            v_inverse_t=inverse.to(self._device, self.dtype),
            pattern=Pattern(positions.to(self._device), width),
        )

    def _finish(self, name: str, basis: CategoryBasis, lengths: Tensor) -> None:
        """Give a layer its frozen weight, its category's basis and its 1 / lambda. Collective."""
        owner, layer = self.owners[name], self.layers[name]
        base = self._weights(name) if owner == self.collective.rank else None
        self.store.scatter({f"{name}.base": base}, owner=owner)
        self.dead_directions += int((lengths == 0).sum())
        layer.basis, layer.inverse_lengths, layer.ready = basis, lengths, True

    def _set_zero(self, name: str) -> None:
        """No update at first, whatever the memory held. Collective."""
        mine = self.owners[name] == self.collective.rank
        shapes = self.layers[name].trained_shapes()
        zeros = {f"{name}.{k}": torch.zeros(s) if mine else None for k, s in shapes.items()}
        self.store.scatter(zeros, owner=self.owners[name])

    def _owned(self) -> list[str]:
        return [n for n, owner in self.owners.items() if owner == self.collective.rank]

    def _check_that_coefficients_train(self) -> None:
        """After the first step some coefficient must have left zero, unless nothing is to train."""
        moved = torch.zeros((), dtype=torch.int64, device=self._device)
        for name, owner in self.owners.items():
            found = [
                self.store.gather(f"{name}.{leaf}", owner=owner)
                for leaf in ("mixing", "value_delta")
            ]
            if all(t is not None and bool(t.any()) for t in found):
                moved += 1
        count = int(self.collective.all_reduce_sum(moved))
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        rates = [group["lr"] for group in groups if group.get("spectral")]
        logger.info("the first step moved S and lambda of %d of %d", count, len(self.layers))
        if count == 0 and rates and min(rates) > 0:
            raise SpectralError(
                f"the first step moved none of the {len(self.layers)} layers' coefficients; "
                "the optimizer must hold the converted parameters and see their gradients"
            )


def _largest(values: list[float]) -> float:
    """max, or NaN if one is NaN."""
    return next((v for v in values if v != v), max(values))
