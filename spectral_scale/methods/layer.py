"""What the linear layers of all methods have in common, for merging and counting."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from spectral_scale.errors import SpectralError


class FactoredLinear(nn.Module):
    """A linear layer (in -> out) whose dense weight is held as trained factors and a frozen rest.

    Its parameters declare their parts in a class attribute `parameter_roles`. A controller gives
    the factors their first values and sets `ready`.
    """

    merged_by: ClassVar[str | None] = None
    """The function that makes it dense again, where `merge` cannot."""
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.initial_weight: Tensor | None = None
        self.ready = False

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shapes of the factors the optimizer sees, whatever a host did to the storage."""
        raise NotImplementedError

    def effective_weight(self) -> Tensor:
        """The dense weight (out, in) this layer stands for, in the trained factors' dtype."""
        raise NotImplementedError


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear]:
    """Converted layers of any method by fqn, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FactoredLinear)}


def weights_set_aside(layers: Mapping[str, FactoredLinear]) -> Callable[[str], Tensor]:
    """The dense weights that conversion left on real layers, by layer name.

    The returned function raises SpectralError for a layer without one.
    """

    def weight(name: str) -> torch.Tensor:
        found = layers[name].initial_weight
        if found is None:
            raise SpectralError(
                f"{name} has no initial weight: it was converted on the meta device, "
                "so give weights=, or another controller has already taken it"
            )
        return found

    return weight


def in_product_dtype(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on."""
    device_type = x.device.type
    on = torch.is_autocast_enabled(device_type)
    return x.to(torch.get_autocast_dtype(device_type)) if on else x
