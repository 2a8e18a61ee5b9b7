"""State in and out of every backend: logical tensors by name, each shard from the rank that has it.

What is saved of a trained parameter are `model/<fqn>`, its full-precision value, and
`optimizer/<fqn>/<key>`, its optimizer state. A weight in lower precision is derived from the value
and is not saved. Which rank writes an element: the first one that holds it, in the first replica.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spectral_scale.errors import CheckpointError
from spectral_scale.parallel.chunks import (
    ReadTensor,
    TensorChunk,
    overwrite,
    range_chunks,
    read_range,
    whole,
)
from spectral_scale.parallel.flat_shards import first_holder, is_first_holder, is_replicated
from spectral_scale.parallel.shard_geometry import FlatOrder, Range
from spectral_scale.parallel.store import ParameterStore, Replicated


def state_chunks(store: ParameterStore) -> Iterator[TensorChunk]:
    """What this rank writes to a checkpoint, as views. Collective.

    State without elements of its own, such as step counts, is written with the first element.
    """
    shards = store.shards()
    counts = {fqn: count for count, fqns in shards.step_counts() for fqn in fqns}
    for fqn in shards.shapes:
        start, numel = shards.ranges(fqn)[shards.group.index]
        if not numel or not shards.group.writes or not is_first_holder(shards, fqn):
            continue
        order = shards.order(fqn)
        yield from range_chunks(f"model/{fqn}", shards.value(fqn), start, order)
        for key, moments in shards.moments(fqn).items():
            yield from range_chunks(f"optimizer/{fqn}/{key}", moments, start, order)
        if start == 0:
            for key, tensor in shards.whole_state(fqn).items():
                yield whole(f"optimizer/{fqn}/{key}", tensor)
            if fqn in counts:
                yield whole(f"optimizer/{fqn}/step", counts[fqn].to(torch.float32))


def replicated(store: ParameterStore) -> Iterator[Replicated]:
    """What several ranks hold, by name and shard: equal ones must be equal, bit for bit.

    Names come in the same order on every rank. Collective.
    """
    yield from store.replicated_weights()
    shards = store.shards()
    for fqn in shards.shapes:
        if is_replicated(shards, fqn):
            index = first_holder(shards, fqn)
            for key, moments in shards.moments(fqn).items():
                yield f"optimizer/{fqn}/{key}", moments, index
        for key, tensor in shards.whole_state(fqn).items():
            yield f"optimizer/{fqn}/{key}", tensor, 0
    if shards.steps_everywhere:
        for count, fqns in shards.step_counts():
            yield f"optimizer/{fqns[0]}/step", count, 0


@torch.no_grad()
def load_state(store: ParameterStore, read: ReadTensor) -> None:
    """Overwrite trained parameters and optimizer state, in place; only what is here is read.

    Collective. Raises CheckpointError if a tensor has another shape, or parameters that share one
    step count here were saved with several.
    """
    shards = store.shards()
    for fqn in shards.shapes:
        order = shards.order(fqn)
        store.write(fqn, _read(read, f"model/{fqn}", store.weight_range(fqn), order))
        mine = shards.ranges(fqn)[shards.group.index]
        for key, moments in shards.moments(fqn).items():
            moments.copy_(_read(read, f"optimizer/{fqn}/{key}", mine, order))
        own = shards.whole_state(fqn).items()
        overwrite(((f"optimizer/{fqn}/{key}", tensor) for key, tensor in own), read)
    for count, fqns in shards.step_counts():
        count.fill_(_common_step(fqns, read))


def _read(read: ReadTensor, name: str, range_: Range, order: FlatOrder) -> Tensor:
    """A range of a saved tensor, 1-D; where it is all of the tensor, its shape is checked."""
    if range_ != (0, order.numel):
        return read_range(read, name, *range_, order)
    value = read(name)
    if tuple(value.shape) != tuple(order.shape):
        raise CheckpointError(
            f"{name} has shape {tuple(value.shape)} in the checkpoint, the model needs "
            f"{tuple(order.shape)}"
        )
    return order.from_row_major(value.reshape(-1))


def _common_step(fqns: Sequence[str], read: ReadTensor) -> float:
    """The number of steps that the optimizer had taken of all the parameters."""
    steps = {fqn: float(read(f"optimizer/{fqn}/step")) for fqn in fqns}
    if len(set(steps.values())) > 1:
        low, high = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
        raise CheckpointError(
            f"Adam has taken {steps[low]:g} steps of {low} and {steps[high]:g} of {high}, but "
            "DeepSpeed keeps one count for both; resume on parallel.backend=torch or fsdp2"
        )
    return next(iter(steps.values()))
