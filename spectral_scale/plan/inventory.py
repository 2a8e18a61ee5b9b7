"""Every parameter of the model a run would train, counted on the meta device: no memory."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from spectral_scale.config.methods import chosen_spec, method_name
from spectral_scale.config.methods.spec import MethodSpec
from spectral_scale.config.presets import Architecture, linear_shapes
from spectral_scale.config.schema import RunConfig
from spectral_scale.methods.owners import assign_owners
from spectral_scale.metrics.flops import MatrixProduct, matrix_products

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
    layer: str | None = None
    """The converted layer it belongs to; None for dense weights."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape, under the name that a parameter table gives it."""
        return self.shape


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

    @cached_property
    def products(self) -> tuple[MatrixProduct, ...]:
        """The products of all matrices with the tokens of a pass."""
        a = self.architecture
        sizes = {"vocab_size": a.vocab_size, "embedding_size": a.embedding_size}
        return tuple(matrix_products(self.items, **sizes))

    @cached_property
    def shards(self) -> dict[int, "Inventory"]:
        """Number of tensor-parallel ranks -> what one of them holds, kept once it is computed."""
        return {}

    def owners(self, ranks: int) -> dict[str, int]:
        """The rank, among `ranks`, that owns each converted layer."""
        if ranks not in self._owners:
            self._owners[ranks] = assign_owners(self.matrices, ranks)
        return self._owners[ranks]

    def block_owners(self, ranks: int) -> list[int]:
        """The rank, among `ranks`, that owns each linear of the blocks, converted or not."""
        if ranks not in self._block_owners:
            shapes = {str(i): s for i, s in enumerate(self.block_matrices)}
            self._block_owners[ranks] = list(assign_owners(shapes, ranks).values())
        return self._block_owners[ranks]

    @property
    def block_matrices(self) -> list[tuple[int, int]]:
        """Shapes of every linear of every block."""
        a = self.architecture
        return list(linear_shapes(a).values()) * a.num_layers

    @cached_property
    def _owners(self) -> dict[int, dict[str, int]]:
        return {}

    @cached_property
    def _block_owners(self) -> dict[int, list[int]]:
        return {}

    def numel(self, *, trainable: bool, in_blocks: bool | None = None) -> int:
        """Elements of trained or frozen parameters, inside or outside the blocks."""
        return self._sums[trainable, in_blocks][0]

    def nbytes(self, *, trainable: bool, in_blocks: bool | None = None) -> int:
        """Bytes of trained or frozen parameters, inside or outside the blocks."""
        return self._sums[trainable, in_blocks][1]

    @cached_property
    def _sums(self) -> dict[tuple[bool, bool | None], tuple[int, int]]:
        """Elements and bytes of each selection; a search asks for them hundreds of times."""
        sums = {}
        for trainable in (True, False):
            for in_blocks in (None, True, False):
                items = self._select(trainable, in_blocks)
                sizes = sum(x.numel for x in items), sum(x.numel * x.itemsize for x in items)
                sums[trainable, in_blocks] = sizes
        return sums

    def muon_items(self, config: RunConfig) -> list[Item]:
        """What Muon trains: the factors, or the blocks' linears where no method converts any."""
        if config.optimizer.name != "muon":
            return []
        role = "factor" if self.method.converts else "matrix"
        trained = self._select(trainable=True, in_blocks=True)
        return [item for item in trained if item.role == role]

    def lighter_bytes(self, config: RunConfig) -> int:
        """Bytes by which the optimizer's moments are less than Adam's two: Muon keeps one of what
        it trains; SCALE keeps none of matrices, and one of the output layer."""
        if config.optimizer.name != "scale":
            return sum(item.numel * item.itemsize for item in self.muon_items(config))
        last = "embed_tokens.weight" if self.architecture.tied_embeddings else "lm_head.weight"
        matrices = [item for item in self._select(True, None) if item.role == "matrix"]
        kept = {item.fqn: 1 if item.fqn.endswith(last) else 0 for item in matrices}
        return sum((2 - kept[item.fqn]) * item.numel * item.itemsize for item in matrices)

    def largest_block(self, *, trainable: bool) -> int:
        """Elements of trained or frozen parameters in the block that has most of them."""
        return self._largest_blocks[trainable]

    @cached_property
    def _largest_blocks(self) -> dict[bool, int]:
        totals: dict[tuple[bool, int], int] = {}
        for item in self.items:
            if item.block is not None:
                key = item.trainable, item.block
                totals[key] = totals.get(key, 0) + item.numel
        return {
            trainable: max(
                (size for (kind, _), size in totals.items() if kind is trainable), default=0
            )
            for trainable in (True, False)
        }

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


BUILT_BLOCKS = 2
"""Blocks that are built and converted; further ones have the shapes of the second."""


def take_inventory(
    config: RunConfig,
    architecture: Architecture,
    method: MethodSpec | None = None,
    methods: "Mapping[str, Method] | None" = None,
) -> Inventory:
    """Build and convert two blocks as training does, without memory or values, and repeat them."""
    built = _built(config, _with_blocks(architecture, BUILT_BLOCKS), methods)
    items = [item for item in built[0] if item.block is None or item.block + 1 < BUILT_BLOCKS]
    matrices = dict(built[1])
    last = [item for item in built[0] if item.block == BUILT_BLOCKS - 1]
    after = max((i for i, item in enumerate(items) if item.block is not None), default=-1) + 1
    repeated: list[Item] = []
    for number in range(BUILT_BLOCKS - 1, architecture.num_layers):
        repeated += [_moved(item, number) for item in last]
        for name, shape in built[1].items():
            if _block(f"{name}.") == BUILT_BLOCKS - 1:
                matrices[_renamed(name, number)] = shape
    return Inventory(
        items=tuple(items[:after] + repeated + items[after:]),
        matrices=matrices,
        architecture=architecture,
        method=method or chosen_spec(config.spectral),
    )


def _with_blocks(architecture: Architecture, blocks: int) -> Architecture:
    return replace(architecture, num_layers=min(blocks, architecture.num_layers))


def _moved(item: Item, number: int) -> Item:
    """The same parameter of another block."""
    layer = None if item.layer is None else _renamed(item.layer, number)
    return replace(item, fqn=_renamed(item.fqn, number), layer=layer, block=number)


def _renamed(name: str, number: int) -> str:
    return re.sub(r"\blayers\.\d+\.", f"layers.{number}.", f"{name}.", count=1)[:-1]


def _built(
    config: RunConfig, architecture: Architecture, methods: "Mapping[str, Method] | None"
) -> tuple[list[Item], dict[str, tuple[int, int]]]:
    """Parameters and converted layers of a model that is built as training builds it."""
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
            layer=info.layer,
        )
        for (fqn, info), parameter in zip(
            parameter_table(model).items(), model.parameters(), strict=True
        )
    ]
    layers = factored_layers(model).items()
    return items, {name: (layer.out_features, layer.in_features) for name, layer in layers}


def _block(fqn: str) -> int | None:
    found = re.search(r"\blayers\.(\d+)\.", fqn)
    return int(found[1]) if found else None
