"""The flat pieces of trained parameters on whatever host a run has."""

from torch import nn

from spectral_scale.backends.deepspeed.shards import ZeroShards
from spectral_scale.backends.deepspeed.store import ZeroStore
from spectral_scale.backends.fsdp2.store import FSDP2Store
from spectral_scale.errors import ConfigError
from spectral_scale.parallel.flat_shards import SteppedShards, TensorShards
from spectral_scale.parallel.store import ParameterStore, TorchStore


def shards_of(store: ParameterStore, model: nn.Module, *, what: str, remedy: str) -> SteppedShards:
    """The pieces behind a store.

    Args:
        store: of the run's backend.
        model: sharded, if the backend does that.
        what: needs them, for the message.
        remedy: what to do without, for the message.

    Raises ConfigError for a host whose gradients are not reached.
    """
    if isinstance(store, ZeroStore):
        return ZeroShards(store)
    if isinstance(store, TorchStore | FSDP2Store):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return TensorShards(trained, store.mesh if isinstance(store, FSDP2Store) else None)
    raise ConfigError(
        f"{what} does not reach the gradients behind {type(store).__name__}; {remedy}, or "
        "parallel.backend to torch, fsdp2 or deepspeed"
    )
