"""Checkpoints of what DeepSpeed trains: logical tensors by name, each piece from whoever keeps it.

The masters are the model; the module's rounded weights are derived and not saved.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from spectral_scale.backends.base import Replicated
from spectral_scale.backends.deepspeed.optimizer_state import get_step, set_step
from spectral_scale.backends.deepspeed.partitions import Flat, Fragment
from spectral_scale.backends.deepspeed.store import ZeroStore
from spectral_scale.errors import CheckpointError
from spectral_scale.parallel.chunks import ReadTensor, TensorChunk, range_chunks, read_range
from spectral_scale.parallel.shard_geometry import FlatOrder
from spectral_scale.parallel.store import MOMENTS


def state_chunks(store: ZeroStore) -> Iterator[TensorChunk]:
    """What this rank writes: masters, moments, and the steps of parameters whose start it keeps."""
    if store.layout.replicated and store.collective.rank != 0:
        return
    for fragment in filter(None, store.fragments.values()):
        prefix = f"optimizer/{fragment.fqn}"
        yield from _chunks(f"model/{fragment.fqn}", fragment.master, fragment)
        for key, moments in _moments(store, fragment):
            yield from _chunks(f"{prefix}/{key}", moments, fragment)
        if fragment.start == 0:
            step = torch.tensor(get_step(store.inner, fragment.flat), dtype=torch.float32)
            yield TensorChunk(f"{prefix}/step", step, (), ())


def replicated(store: ZeroStore) -> Iterator[Replicated]:
    """What every rank holds whole: weights that are not sharded, and masters' state in stage 0."""
    if not store.layout.shards_weights:
        for fqn, parameter in store.parameters.items():
            yield f"model/{fqn}", parameter.detach(), 0
    if store.layout.replicated:
        for fragment in filter(None, store.fragments.values()):
            for key, moments in _moments(store, fragment):
                yield f"optimizer/{fragment.fqn}/{key}", moments, 0


@torch.no_grad()
def load_state(store: ZeroStore, read: ReadTensor) -> None:
    """Overwrite masters, the module's weights, moments and steps, in place. Collective.

    Raises CheckpointError if a tensor has another shape, or parameters that share one Adam step
    here were saved with several.
    """
    for fqn, fragment in store.fragments.items():
        parameter = store.parameters[fqn]
        start, numel = store.layout.weight_range(parameter)
        order = FlatOrder(store.layout.shape(parameter))
        part = read_range(read, f"model/{fqn}", start, numel, order)
        store.write(fqn, part.to(store.device))
        if fragment is None:
            continue
        for key, moments in _moments(store, fragment):
            name = f"optimizer/{fqn}/{key}"
            moments.copy_(read_range(read, name, fragment.start, fragment.numel, order))
    for flat in store.layout.flats():
        set_step(store.inner, flat.tensor, _common_step(store, flat, read))


def _moments(store: ZeroStore, fragment: Fragment) -> Iterator[tuple[str, Tensor]]:
    """1-D views of a fragment's moments; none if its optimizer keeps them elsewhere."""
    state = store.inner.state[fragment.flat]
    for key in MOMENTS:
        if key in state:
            yield key, fragment.of(state[key])


def _chunks(name: str, part: Tensor, fragment: Fragment) -> Iterator[TensorChunk]:
    return range_chunks(name, part, fragment.start, FlatOrder(fragment.shape))


def _common_step(store: ZeroStore, flat: Flat, read: ReadTensor) -> float:
    names = [store.names[id(parameter)] for parameter in flat.members]
    steps = {fqn: float(read(f"optimizer/{fqn}/step")) for fqn in names}
    if len(set(steps.values())) > 1:
        low, high = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
        raise CheckpointError(
            f"Adam has taken {steps[low]:g} steps of {low} and {steps[high]:g} of {high}, but "
            "DeepSpeed keeps one count for both; resume on parallel.backend=torch or fsdp2"
        )
    return next(iter(steps.values()))
