"""Every parameter of the model a run would train, counted on the meta device: no memory."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectral_scale.config.methods import chosen_spec, method_name
from spectral_scale.config.methods.spec import MethodSpec
from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import RunConfig

if TYPE_CHECKING:
    from spectral_scale.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class Item:
    """One logical parameter."""

    fqn: str
    """Name of the parameter."""
    shape: tuple[int, ...]
    """Global shape, before any sharding."""
    numel: int
    """Number of elements."""
    trainable: bool
    """True if the optimizer trains the parameter."""
    role: str
    """Part that it plays in a layer; see `parallel.table.Role`."""
    itemsize: int
    """Bytes of an element in training on the torch backend."""
    block: int | None
    """Number of its transformer block; None for embeddings, the last norm and the head."""


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The converted model's parameters and the dense matrices they stand for."""

    items: tuple[Item, ...]
    """Parameters in the model's order, tied ones once."""
    matrices: dict[str, tuple[int, int]]
    """Converted layer -> (m, n); empty for methods that convert none."""
    architecture: Architecture
    """The model's shapes."""

    method: MethodSpec
    """The method that converted the model."""

    def numel(self, *, trainable: bool, in_blocks: bool | None = None) -> int:
        """Elements of trained or frozen parameters, inside or outside the blocks."""
        return sum(item.numel for item in self._select(trainable, in_blocks))

    def nbytes(self, *, trainable: bool, in_blocks: bool | None = None) -> int:
        """Bytes of trained or frozen parameters, inside or outside the blocks."""
        return sum(item.numel * item.itemsize for item in self._select(trainable, in_blocks))

    def muon_items(self, config: RunConfig) -> list[Item]:
        """What Muon trains: the factors, or the blocks' linears where no method converts any."""
        if config.optimizer.name != "muon":
            return []
        role = "factor" if self.method.converts else "matrix"
        trained = self._select(trainable=True, in_blocks=True)
        return [item for item in trained if item.role == role]

    def largest_block(self, *, trainable: bool) -> int:
        """Elements of trained or frozen parameters in the block that has most of them."""
        totals: dict[int, int] = {}
        for item in self._select(trainable, in_blocks=True):
            if item.block is not None:
                totals[item.block] = totals.get(item.block, 0) + item.numel
        return max(totals.values(), default=0)

    def frozen_itemsize(self) -> int:
        """Bytes of a frozen element; 0 if nothing is frozen."""
        return max((item.itemsize for item in self.items if not item.trainable), default=0)

    def _select(self, trainable: bool, in_blocks: bool | None) -> list[Item]:
        return [
            item
            for item in self.items
            if item.trainable is trainable
            and (in_blocks is None or (item.block is not None) is in_blocks)
        ]


def take_inventory(
    config: RunConfig,
    architecture: Architecture,
    method: MethodSpec | None = None,
    methods: "Mapping[str, Method] | None" = None,
) -> Inventory:
    """Build and convert the model as training does, without memory or values."""
    from spectral_scale.engine.build import MASTER_DTYPES, frozen_dtype
    from spectral_scale.engine.methods import METHODS, convert_model
    from spectral_scale.methods.layer import factored_layers
    from spectral_scale.models.build import build_model
    from spectral_scale.parallel.table import parameter_table

    model = build_model(architecture, config.model, eos_token_id=None)
    runtime = (methods or METHODS)[method_name(config.spectral)]
    convert_model(model, config.spectral, frozen_dtype(config), runtime)
    master = MASTER_DTYPES[config.train.precision].itemsize
    items = [
        Item(
            fqn=fqn,
            shape=info.global_shape,
            numel=parameter.numel(),
            trainable=info.trainable,
            role=info.role,
            itemsize=master if info.trainable else parameter.dtype.itemsize,
            block=_block(fqn),
        )
        for (fqn, info), parameter in zip(
            parameter_table(model).items(), model.parameters(), strict=True
        )
    ]
    layers = factored_layers(model).items()
    matrices = {name: (layer.out_features, layer.in_features) for name, layer in layers}
    return Inventory(
        items=tuple(items),
        matrices=matrices,
        architecture=architecture,
        method=method or chosen_spec(config.spectral),
    )


def _block(fqn: str) -> int | None:
    found = re.search(r"\blayers\.(\d+)\.", fqn)
    return int(found[1]) if found else None
