"""`state_dict` and `load_state_dict` of controllers, as torch.distributed.checkpoint and accelerate
call them (`Stateful`, `register_for_checkpointing`)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from spectral_scale.errors import CheckpointError
from spectral_scale.parallel.collective import Collective

APPLIED_STEPS = "applied_steps"


class StatefulController:
    """A controller whose state is a dictionary of tensors, the same on every rank.

    `state_tensors` stays the way of checkpoints that must not gather: there each rank saves what it
    owns.
    """

    applied_steps: int
    collective: Collective

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that this rank owns, by name."""
        raise NotImplementedError

    def load_state(self, read: Callable[[str], Tensor], applied_steps: int) -> None:
        """Take over saved tensors. Collective."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The tensors of all owners by name and the count of applied steps. Collective.

        This rank's own tensors are handed out as they are, those of other ranks as copies in the
        memory of the collective's device.
        """
        own = {name: tensor.detach() for name, tensor in self.state_tensors()}
        return {APPLIED_STEPS: torch.tensor(self.applied_steps)} | _of_all_ranks(
            own, self.collective
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave on any number of ranks. Collective.

        Load the model's parameters and the optimizer's state as well. Raises CheckpointError if a
        tensor is missing.
        """

        def read(name: str) -> Tensor:
            if name not in state_dict:
                raise CheckpointError(
                    f"{name} is missing from the controller's state; load what state_dict() gave "
                    "for the same model and method"
                )
            found: Tensor = state_dict[name]
            return found

        self.load_state(read, int(read(APPLIED_STEPS)))


def _of_all_ranks(own: Mapping[str, Tensor], collective: Collective) -> dict[str, Tensor]:
    """`own` of every rank, by name, in the same order everywhere. Collective."""
    if collective.world_size == 1:
        return dict(own)
    kinds = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in own.items()}
    by_rank = collective.broadcast_json(collective.gather_json(kinds))
    device = getattr(collective, "device", torch.device("cpu"))
    found: dict[str, Tensor] = {}
    for source, described in enumerate(by_rank):
        for name, (shape, dtype) in described.items():
            mine = own[name].to(device).contiguous() if source == collective.rank else None
            buffer = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            sent = collective.broadcast(buffer if mine is None else mine, source)
            found[name] = own[name] if source == collective.rank else sent
    return found
