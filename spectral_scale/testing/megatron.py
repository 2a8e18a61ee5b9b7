"""megatron-core on a machine without CUDA, for tests: calls to `torch.cuda` are answered here.

The product path never imports this. `python -m spectral_scale.testing.megatron WORDS...` is the
`spectral-scale` command in such a process.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _NoStream:
    """A CUDA stream or event where everything is in order anyway."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., "_NoStream"]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self


class _CudaMeansCpu(TorchFunctionMode):
    """`device="cuda"` makes CPU tensors, and a CPU tensor's `type()` looks like a GPU one's."""

    entered: ClassVar["_CudaMeansCpu | None"] = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Translate the device, then call."""
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if isinstance(device, str | torch.device) and torch.device(device).type == "cuda":
            kwargs = kwargs | {"device": CPU}
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def run_on_cpu() -> None:
    """Make megatron-core run on the CPU in this process, for good. Nothing where CUDA is there.

    Call it before a process group or a Megatron object is made.
    """
    if torch.cuda.is_available() or _CudaMeansCpu.entered is not None:
        return
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *_: _NoStream()
    cuda.stream = lambda _: contextlib.nullcontext()
    for name in ("set_device", "synchronize"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    for kind in ("Float", "Double", "BFloat16", "Half", "Int", "Long"):
        setattr(cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor"))
    owners: tuple[Any, ...] = (torch.Tensor, torch.nn.Module)
    for owner in owners:
        owner.cuda = lambda self, *_, **__: self

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    _CudaMeansCpu.entered = _CudaMeansCpu()
    _CudaMeansCpu.entered.__enter__()


if __name__ == "__main__":
    from spectral_scale.cli.main import main

    run_on_cpu()
    sys.exit(main())
