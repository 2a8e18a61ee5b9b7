"""One optimizer that consists of several, each of which steps the groups of some kinds."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_scale.optim.groups import group_kind

Group = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """How the groups of one kind are stepped."""

    make: Callable[[list[Group]], torch.optim.Optimizer]
    """Builds the optimizer over them."""
    state: Callable[[Tensor, Group], dict[str, Tensor]]
    """The state of one of their parameters before the first step."""


class CompositeOptimizer(torch.optim.Optimizer):
    """Its groups and its state are those of the optimizers that it consists of.

    Args:
        groups: as `param_groups` builds them.
        parts: by kind of group.
        rest: of the groups of all other kinds.
    """

    def __init__(self, groups: Iterable[Group], parts: Mapping[str, Part], rest: Part) -> None:
        super().__init__(groups, {"lr": 0.0})
        self._part_of = {k: parts.get(k, rest) for k in map(_kind, self.param_groups)}
        self._optimizers = []
        for part in (*parts.values(), rest):
            own = [group for group in self.param_groups if self._part_of[_kind(group)] is part]
            if own:
                optimizer = part.make(own)
                optimizer.state = self.state
                self._optimizers.append(optimizer)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Collective where one of the parts is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._optimizers:
            optimizer.step()
        return loss

    def initial_state(self, parameter: Tensor, group: Group) -> dict[str, Tensor]:
        """What the part that steps the group begins with."""
        return self._part_of[_kind(group)].state(parameter, group)

    def kept_apart(self) -> tuple[Tensor, ...]:
        """Nothing: all state is in `state`."""
        return ()


def divided(
    groups: Iterable[Group], chosen: Mapping[str, Group], taken: Mapping[str, str]
) -> list[Group]:
    """Groups of which some parameters are given groups of their own.

    Args:
        groups: as `param_groups` builds them.
        chosen: new groups by name, as changes of the group that their parameters come from.
        taken: fqn of a parameter -> the new group that it goes to; all others stay.
    """
    result = []
    for group in groups:
        members = list(zip(group["fqns"], group["params"], strict=True))
        for name in ("", *chosen):
            own = [(fqn, p) for fqn, p in members if taken.get(fqn, "") == name]
            if own:
                fqns, params = (list(column) for column in zip(*own, strict=True))
                changes = {"name": name} | chosen[name] if name else {}
                result.append(group | changes | {"fqns": fqns, "params": params})
    return result


def _kind(group: Group) -> str:
    return group_kind(group["name"])
