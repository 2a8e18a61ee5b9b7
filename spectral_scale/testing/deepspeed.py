"""DeepSpeed on a CPU, where it believes less possible than is; for tests."""

import os


def allow_fp16() -> None:
    """Let DeepSpeed train in fp16 on this CPU: it refuses all but those with fp16 instructions,
    and torch computes fp16 products on any."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
