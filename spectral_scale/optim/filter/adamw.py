"""AdamW whose gradients are filtered first: for a user's own loop."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from spectral_scale.config.schema import FilterConfig
from spectral_scale.errors import CheckpointError, ConfigError
from spectral_scale.optim.filter.saved_chunks import SavedChunks
from spectral_scale.optim.filter.spectral_filter import SpectralFilter
from spectral_scale.optim.groups import group_kind
from spectral_scale.parallel.flat_shards import TensorShards

ROLES = {
    "spectral_direction": "direction",
    "spectral_value": "value",
    "low_rank": "factor",
    "frod_mixing": "mixing",
    "frod_value": "value_delta",
}
"""Kind of group, as `param_groups` names them, -> role of its parameters."""


class SpectralFilterAdamW(torch.optim.AdamW):
    """torch's AdamW after a spectral filter of the gradients.

    `step()` filters, unless `filter_gradients()` was called since the last step: call that before
    you clip, since the order is filter, clip, AdamW. Under `fully_shard`, build it after sharding;
    under DistributedDataParallel, from the module's parameters as ever. DeepSpeed flattens
    parameters before it hands them to an optimizer: use `SpectralFilter` there.

    Args:
        params: `model.named_parameters()`, or groups from `spectral_scale.param_groups`; what does
            not require a gradient is left out.
        filter_config: the filter; `targets` restricts it.
        head_size: rows of an attention head; for `nodes=heads`.
        seed: fixes sampled entries and permutations.
        adamw: `lr`, `betas`, `eps`, `weight_decay`, ... of torch.optim.AdamW.

    Raises ConfigError for parameters without names, or nothing to filter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        filter_config: FilterConfig,
        *,
        head_size: int | None = None,
        seed: int = 0,
        **adamw: Any,
    ) -> None:
        super().__init__(_trained(params), **adamw)
        self._named = _named(self.param_groups)
        roles = {fqn: _role(group, tensor) for fqn, (group, tensor) in self._named.items()}
        shards = TensorShards({fqn: tensor for fqn, (_, tensor) in self._named.items()})
        self.filter = SpectralFilter(shards, roles, filter_config, seed=seed, head_size=head_size)
        self._filtered = False

    def filter_gradients(self, *, measure: bool = False) -> None:
        """Filter all gradients in place, once a step; see `SpectralFilter.apply`."""
        if not self._filtered:
            self._require_own_parameters()
            self.filter.apply(measure=measure)
        self._filtered = True

    def step(self, closure: Any = None) -> Any:
        """One AdamW step on filtered gradients. `closure` may recompute the loss and gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.filter_gradients()
        super().step()
        self.filter.commit()
        self._filtered = False
        return loss

    def _require_own_parameters(self) -> None:
        """Refuse groups with tensors of a backend, which would make the filter miss every step."""
        ours = {id(tensor) for _, tensor in self._named.values()}
        if any(id(p) not in ours for group in self.param_groups for p in group["params"]):
            raise ConfigError(
                "the parameter groups were changed after SpectralFilterAdamW was built, so that it "
                "would filter gradients that are not stepped; build it last (after fully_shard), "
                "and under DeepSpeed call SpectralFilter before engine.step() instead"
            )

    def state_dict(self) -> dict[str, Any]:
        """torch's, and under `filter` this rank's graphs, mean gradients and anchors by name."""
        saved = {c.key: c.tensor.clone() for c in self.filter.state_chunks(own=True)}
        return super().state_dict() | {"filter": saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of AdamW and of the filter, saved on as many ranks.

        Raises CheckpointError if the filter's state is missing or does not fit.
        """
        if not state_dict.get("filter"):
            raise CheckpointError(
                "the state holds nothing of the spectral filter; load what "
                "SpectralFilterAdamW.state_dict() gave on this rank"
            )
        saved = state_dict["filter"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "filter"})
        self.filter.load_state(SavedChunks(saved).read)


def _trained(params: Iterable[Any]) -> list[Any]:
    """Named parameters that train, or groups as they are."""
    given = list(params)
    if given and isinstance(given[0], tuple):
        return [(name, tensor) for name, tensor in given if tensor.requires_grad]
    return given


def _named(groups: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], Tensor]]:
    found: dict[str, tuple[dict[str, Any], Tensor]] = {}
    for group in groups:
        names = group.get("fqns") or group.get("param_names")
        if names is None:
            raise ConfigError(
                "SpectralFilterAdamW needs the parameters' names: give model.named_parameters(), "
                "or groups from spectral_scale.param_groups"
            )
        tensors = zip(names, group["params"], strict=True)
        found |= {name: (group, tensor) for name, tensor in tensors}
    return found


def _role(group: dict[str, Any], tensor: Tensor) -> str:
    """Role from the group's name; for unknown names, from the number of dimensions."""
    plain = "matrix" if tensor.ndim >= 2 else "vector"
    return ROLES.get(group_kind(group.get("name", "dense")), plain)
