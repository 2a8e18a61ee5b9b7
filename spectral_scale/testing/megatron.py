"""megatron-core on a machine without CUDA, for tests: calls to `torch.cuda` are answered here.

The product path never imports this. `python -m spectral_scale.testing.megatron WORDS...` is the
`spectral-scale` command in such a process.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import HealthError
from spectral_scale.testing.tiny import one_process_group, train_tiny

CPU = torch.device("cpu")
NO_FAULT: Mapping[int, str] = MappingProxyType({})


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


def _for_cpu(decorate: Any, *arguments: Any, device_type: str, **options: Any) -> Any:
    return decorate(*arguments, device_type="cpu", **options)


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

    # Before the import: functions of autocast are decorated for "cuda" when modules are loaded.
    amp: Any = torch.amp
    for name in ("custom_fwd", "custom_bwd"):
        setattr(amp, name, partial(_for_cpu, getattr(amp, name)))
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel import random

    # Recomputed inside `backward`, where the mode is off.
    fused_softmax.get_default_causal_mask = lambda n: torch.ones(n, n).triu(1).bool()

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    _CudaMeansCpu.entered = _CudaMeansCpu()
    _CudaMeansCpu.entered.__enter__()


def train_in_turn_on_cpu(
    runs: Sequence[tuple[RunConfig, int | None]], faults: Mapping[int, str] = NO_FAULT
) -> list[dict[str, Any]]:
    """`tiny.train_in_turn` with runs on megatron-core among them.

    Args:
        runs: configurations, and after how many steps each stops (None: at its end).
        faults: position of a run -> the one of `FAULTS` that it is trained with. If ranks then
            find that they differ, its result is `{"error": text}`.
    """
    results = []
    with megatron_in_one_group():
        for position, (config, stop_after) in enumerate(runs):
            if position not in faults:
                results.append(train_tiny(config, stop_after))
                continue
            try:
                with FAULTS[faults[position]]():
                    results.append(train_tiny(config, stop_after))
            except HealthError as error:  # a run closes its backend only if it succeeds
                import_module("megatron.core.parallel_state").destroy_model_parallel()
                results.append({"error": str(error)})
    return results


@contextlib.contextmanager
def megatron_in_one_group() -> Iterator[None]:
    """`tiny.one_process_group` for runs on megatron-core, too, on the CPU."""
    run_on_cpu()
    with one_process_group():
        plain: Any = import_module("spectral_scale.backends.torch.backend")
        backend: Any = import_module("spectral_scale.backends.megatron.backend")
        for name in ("join_group", "join_alone", "leave_group"):
            setattr(backend, name, getattr(plain, name))
        yield


def _skip_tensor_sum() -> AbstractContextManager[Any]:
    matrix: Any = import_module("spectral_scale.backends.megatron.matrix")
    return mock.patch.object(matrix.SpectralMatrix, "_start_sum", lambda _, t: t.clone)


def _sum_twice() -> AbstractContextManager[Any]:
    """What is complete already is marked for the sum of sequence parallelism."""
    matrix: Any = import_module("spectral_scale.backends.megatron.matrix")
    bottleneck = matrix.SpectralMatrix._bottleneck

    def marked(self: Any, completion: Any) -> Any:
        for leaf in ("v", "sigma") if self.kind == "column" else ("u", "sigma"):
            getattr(self, leaf).sequence_parallel = True
        return bottleneck(self, completion)

    return mock.patch.object(matrix.SpectralMatrix, "_bottleneck", marked)


def _count_norm_per_rank() -> AbstractContextManager[Any]:
    backend: Any = import_module("spectral_scale.backends.megatron.backend")
    counted = backend.counted_squares

    def on_every_rank(parameters: Any, *, tensor_rank: int, device: Any) -> torch.Tensor:
        total: torch.Tensor = counted(parameters, tensor_rank=0, device=device)
        return total

    return mock.patch.object(backend, "counted_squares", on_every_rank)


def _draw_for_each_part() -> AbstractContextManager[Any]:
    """Initial matrices are drawn part by part, as many as there are tensor-parallel ranks."""
    from megatron.core import parallel_state

    weights: Any = import_module("spectral_scale.models.weights")
    draw = weights.KeyedWeights.get

    def by_part(self: Any, fqn: str, shape: tuple[int, ...]) -> torch.Tensor:
        parts = parallel_state.get_tensor_model_parallel_world_size()
        if len(shape) < 2 or parts == 1:
            whole: torch.Tensor = draw(self, fqn, shape)
            return whole
        part = (shape[0] // parts, *shape[1:])
        return torch.cat([draw(self, fqn, part) for _ in range(parts)])

    return mock.patch.object(weights.KeyedWeights, "get", by_part)


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "skip the tensor-parallel sum": _skip_tensor_sum,
    "sum twice": _sum_twice,
    "count the norm on every rank": _count_norm_per_rank,
    "draw for each part": _draw_for_each_part,
}
"""What tests break to see themselves fail."""


if __name__ == "__main__":
    from spectral_scale.cli.main import main

    run_on_cpu()
    sys.exit(main())
