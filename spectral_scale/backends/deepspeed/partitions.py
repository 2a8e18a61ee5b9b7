"""Where ZeRO keeps what: one answer for the four shapes that DeepSpeed's optimizers come in.

DeepSpeed flattens the parameters of a group, splits them over ranks, and trains full-precision
masters of the partitions; the module holds weights in its own precision. A `Fragment` is the range
of one parameter whose master and moments this rank keeps. Everything that reads or writes them goes
through the layouts here, which are the only code that knows DeepSpeed's optimizers.

Two parameters in one group, a of 2 x 4 and b of 3 elements, over three ranks. Each line shows the
fragments of a rank as (first element of the parameter, elements, first element of its flat tensor):

    ZeRO-1, ZeRO-2, BF16_Optimizer      one flat tensor of 8 + 3 elements, padded to 12: 4 a rank
        rank 0      a (0, 4, 0)
        rank 1      a (4, 4, 0)
        rank 2                      b (0, 3, 0)     and one element of padding
    ZeRO-3                              each parameter on its own, 8 -> 3 a rank, 3 -> 1 a rank
        rank 0      a (0, 3, 0)     b (0, 1, 3)
        rank 1      a (3, 3, 0)     b (1, 1, 3)
        rank 2      a (6, 2, 0)     b (2, 1, 3)     one element of padding behind a
    ZeRO-0                              every rank has a (0, 8, 0) and b (0, 3, 0)

Below ZeRO-3 a partition begins and ends anywhere, also within a row of a matrix, and a rank may
have no fragment of a parameter (rank 2 has none of a). Parameters in one flat tensor share its step
count, so that a and b cannot have taken different numbers of Adam's steps.

Invariant: the fragments of a parameter do not overlap and cover it, padding apart; where masters
are replicated, each rank's fragment is the whole parameter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.shard_geometry import Shape


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A flat range of one trained parameter, and where this rank keeps its master."""

    fqn: str
    """Name of the parameter."""
    shape: Shape
    """Logical shape of the parameter."""
    start: int
    """First element, in the flattened parameter."""
    numel: int
    """Elements; at least 1."""
    flat: Tensor
    """What the inner optimizer calls a parameter: the key of its state."""
    flat_start: int
    """Where the range begins in `flat`."""

    def of(self, tensor: Tensor) -> Tensor:
        """This range of a tensor laid out as `flat`, as a 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.flat_start, self.numel)

    @property
    def master(self) -> Tensor:
        """The full-precision values, a 1-D view."""
        return self.of(self.flat)


@dataclass(frozen=True, kw_only=True)
class Flat:
    """What the inner optimizer calls one parameter."""

    group: dict[str, Any]
    """Parameter group of the flat tensor: learning rate, weight decay, name."""
    tensor: Tensor
    """This rank's masters, the key of their state; they share one Adam step."""
    members: list[nn.Parameter]
    """The parameters that it holds, on this rank or another."""


class Layout(Protocol):
    """What differs between DeepSpeed's optimizers. None of it communicates."""

    replicated: bool
    """Every rank keeps every master, so that sums over ranks would count them many times."""
    shards_weights: bool
    """The module's weights are sharded over ranks as well (ZeRO-3)."""

    def flats(self) -> Iterator[Flat]:
        """All flat tensors, in the same order on every rank; each parameter is in one."""

    def shape(self, parameter: nn.Parameter) -> Shape:
        """The logical shape."""

    def fragment(self, fqn: str, parameter: nn.Parameter) -> Fragment | None:
        """What this rank keeps of a trained parameter, if anything."""

    def gradient(self, fragment: Fragment, parameter: nn.Parameter) -> Tensor | None:
        """The reduced gradient of a fragment between backward and step, a 1-D view."""

    def weight_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """First element and number of elements of the module's weight that this rank holds."""

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The elements of the module's weight in `weight_range`, a 1-D view."""

    def write_weight(self, parameter: nn.Parameter, part: Tensor) -> None:
        """Overwrite `weight_range` of the module's weight with a 1-D tensor of any precision."""

    def weight_copies(self, parameter: nn.Parameter) -> list[Tensor]:
        """All that the module has of the weight on this rank: its shard, or the whole, or both."""


class _WholeWeights:
    """The module holds every weight whole."""

    shards_weights = False

    def shape(self, parameter: nn.Parameter) -> Shape:
        return tuple(parameter.shape)

    def weight_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        return 0, parameter.numel()

    def weight(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().view(-1)

    def write_weight(self, parameter: nn.Parameter, part: Tensor) -> None:
        parameter.data.view(-1).copy_(part)

    def weight_copies(self, parameter: nn.Parameter) -> list[Tensor]:
        return [parameter.data]


class ReplicatedLayout(_WholeWeights):
    """ZeRO-0 in fp32: the optimizer trains the module's own parameters on every rank."""

    replicated = True

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def flats(self) -> Iterator[Flat]:
        for group in self._optimizer.param_groups:
            yield from (Flat(group=group, tensor=p, members=[p]) for p in group["params"])

    def fragment(self, fqn: str, parameter: nn.Parameter) -> Fragment | None:
        shape = tuple(parameter.shape)
        return Fragment(
            fqn=fqn, shape=shape, start=0, numel=prod(shape), flat=parameter, flat_start=0
        )

    def gradient(self, fragment: Fragment, parameter: nn.Parameter) -> Tensor | None:
        return None if parameter.grad is None else parameter.grad.view(-1)


class FlatLayout(_WholeWeights):
    """ZeRO-1, ZeRO-2 and BF16_Optimizer: one flat master a group, one contiguous partition of it a
    rank; partitions begin and end inside matrices."""

    replicated = False

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        bf16 = type(zero).__name__ == "BF16_Optimizer"
        self._flats = zero.fp32_groups_flat_partition if bf16 else (
            zero.single_partition_of_fp32_groups
        )  # fmt: skip
        self._members = zero.bf16_groups if bf16 else zero.bit16_groups

    def flats(self) -> Iterator[Flat]:
        inner = self._zero.optimizer.param_groups
        for group, flat, members in zip(inner, self._flats, self._members, strict=True):
            yield Flat(group=group, tensor=flat, members=members)

    def fragment(self, fqn: str, parameter: Any) -> Fragment | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        weight, master = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(
            fqn=fqn,
            shape=tuple(parameter.shape),
            start=weight.start,
            numel=weight.numel,
            flat=self._flats[mapping.param_group_index],
            flat_start=master.start,
        )

    def gradient(self, fragment: Fragment, parameter: Any) -> Tensor | None:
        mapping, index = parameter._hp_mapping, parameter._index_in_param_group
        found: Tensor = mapping.get_lp_grad_fragment(index).view(-1)
        if found.numel() == fragment.numel:
            return found
        return found.narrow(0, fragment.start, fragment.numel)  # BF16_Optimizer keeps them whole


class ShardedLayout:
    """ZeRO-3: each parameter is sharded evenly over ranks, the last shard padded."""

    replicated = False
    shards_weights = True

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def flats(self) -> Iterator[Flat]:
        zero = self._zero
        tensors = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        for sub_group, (tensor, members) in enumerate(tensors):
            group = zero.optimizer.param_groups[zero.sub_group_to_group_id[sub_group]]
            yield Flat(group=group, tensor=tensor, members=members)

    def shape(self, parameter: Any) -> Shape:
        return tuple(parameter.ds_shape)

    def fragment(self, fqn: str, parameter: Any) -> Fragment | None:
        start, numel = self.weight_range(parameter)
        if not numel:
            return None
        sub_group, flat_start, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return Fragment(
            fqn=fqn,
            shape=self.shape(parameter),
            start=start,
            numel=numel,
            flat=self._zero.fp32_partitioned_groups_flat[sub_group],
            flat_start=flat_start,
        )

    def gradient(self, fragment: Fragment, parameter: Any) -> Tensor | None:
        found, _ = self._zero._get_fp32_grad_state_partition(parameter, release_swap_buffers=True)
        gradient: Tensor = found.narrow(0, 0, fragment.numel)
        return gradient

    def weight_range(self, parameter: Any) -> tuple[int, int]:
        partition, whole = parameter.partition_numel(), prod(self.shape(parameter))
        start = min(partition * torch.distributed.get_rank(), whole)
        return start, min(partition, whole - start)

    def weight(self, parameter: Any) -> Tensor:
        shard: Tensor = parameter.ds_tensor.detach()
        return shard.narrow(0, 0, self.weight_range(parameter)[1])

    def write_weight(self, parameter: Any, part: Tensor) -> None:
        gathered = parameter.ds_status.name == "AVAILABLE"  # kept whole between steps: too small
        if gathered:
            parameter.partition()
        parameter.ds_tensor.data.narrow(0, 0, part.numel()).copy_(part)
        if gathered:
            parameter.all_gather()

    def weight_copies(self, parameter: Any) -> list[Tensor]:
        whole = [parameter.data] if parameter.ds_status.name == "AVAILABLE" else []
        return [parameter.ds_tensor.data, *whole]


def layout_of(optimizer: Any) -> Layout:
    """How DeepSpeed's optimizer (`engine.optimizer`) keeps its parameters.

    Raises ConfigError for one that is not known here.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return ReplicatedLayout(optimizer)
    known: dict[str, type[FlatLayout] | type[ShardedLayout]] = {
        "DeepSpeedZeroOptimizer": FlatLayout,
        "BF16_Optimizer": FlatLayout,
        "DeepSpeedZeroOptimizer_Stage3": ShardedLayout,
    }
    name = type(optimizer).__name__
    if name not in known:
        raise ConfigError(
            f"DeepSpeed chose {name}, whose parameters cannot be reached; use ZeRO-1, 2 or 3, or "
            "ZeRO-0 in fp32, and none of DeepSpeed's own optimizers"
        )
    refuse_round_robin(optimizer)
    return known[name](optimizer)


def refuse_round_robin(optimizer: Any) -> None:
    """Raise ConfigError if DeepSpeed reorders its flat buffers, which its own map does not follow:
    reads and writes would go to other parameters."""
    if getattr(optimizer, "round_robin_gradients", False):
        raise ConfigError(
            "zero_optimization.round_robin_gradients reorders DeepSpeed's flat buffers but not its "
            "map of them, so that reads and writes miss; set it to false"
        )
