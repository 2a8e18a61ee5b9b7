"""What DeepSpeed's ZeRO stages can do, with and without offload to the CPU."""

from spectral_scale.config.support import Support

DEEPSPEED: dict[str, dict[str, Support]] = {
    "zero0": {},
    "zero1": {},
    "zero2": {},
    "zero3": {},
    "zero2+offload": {},
    "zero3+offload": {},
}
"""By stage; see `capability.variant`."""
