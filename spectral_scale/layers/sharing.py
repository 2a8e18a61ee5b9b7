"""How the ranks that each hold a part of a layer work together, whoever those ranks are."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from spectral_scale.layers.sst_product import Bottleneck


@dataclass(frozen=True)
class Sharing:
    """What a layer in parts needs of its ranks."""

    bottleneck: Bottleneck
    """What is shared, and the sum that completes what is partial inside the product."""
    enter: Callable[[Tensor], Tensor]
    """The input, equal on all ranks; its gradient is summed over them."""
    leave: Callable[[Tensor], Tensor]
    """The sum over ranks; its gradient, equal on all ranks, goes to each."""
    local: Callable[[Tensor], Tensor]
    """This rank's part of a parameter, differentiably."""
    index: int = 0
    """This rank's place among them."""

    @property
    def by_outputs(self) -> bool:
        """Whether ranks hold different outputs (column-parallel), not inputs."""
        return self.bottleneck.shared == "outputs"
