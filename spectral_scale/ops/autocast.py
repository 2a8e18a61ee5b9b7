"""What autocast makes of a product."""

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on for x's device, else x's own."""
    device_type = x.device.type
    on = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else x.dtype
