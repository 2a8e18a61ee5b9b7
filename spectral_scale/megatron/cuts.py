"""How Megatron marks a parameter that tensor parallelism cuts."""

from torch import Tensor


def cut_of(parameter: Tensor) -> int | None:
    """The dimension along which Megatron's marks say a parameter is cut; None: whole."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return int(parameter.partition_dim)  # type: ignore[attr-defined]
