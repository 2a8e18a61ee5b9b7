"""Run code for CUDA on a machine without a GPU: shapes, dtypes, devices and launches, no values.

torch's fake tensors need a device that torch believes in; a small library, compiled at first use,
is that device. It must be loaded before torch, and what it patches stays patched: `on_fake_cuda`
runs a function in a process of its own. This module imports torch inside functions only.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
_CALL = "import sys; from spectral_scale.testing import fake_cuda; fake_cuda.call(sys.argv[1])"


def missing() -> str | None:
    """Why this machine has no fake CUDA device, for a test to be skipped with; None if it has."""
    if shutil.which("g++") is None:
        return "fake CUDA needs the C++ compiler g++"
    if not (_torch_folder() / "include" / "ATen").is_dir():
        return "fake CUDA needs the headers of torch"
    return None


def on_fake_cuda(
    function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 240.0
) -> Any:
    """The result of `function(*arguments)` in a fresh process whose torch has a fake CUDA device.

    Fake mode is on while it runs. The function must be a module's own; arguments and the result
    are JSON values. Raises RuntimeError with what the process printed if the function fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder, "call.json")
        name = function.__module__, function.__qualname__
        request.write_text(json.dumps([*name, arguments]), encoding="utf-8")
        ended = subprocess.run(
            [sys.executable, "-c", _CALL, str(request)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
        result = request.with_name("result.json")
        if not result.exists():
            raise RuntimeError(f"{name[1]} failed on fake CUDA:\n{ended.stdout}\n{ended.stderr}")
        return json.loads(result.read_text(encoding="utf-8"))


def call(request: str) -> None:
    """Answer `on_fake_cuda` in its process, then end the process without freeing fake tensors."""
    ctypes.CDLL(str(_library()))
    module, function, arguments = json.loads(Path(request).read_text(encoding="utf-8"))
    with fake_cuda():
        result = getattr(importlib.import_module(module), function)(*arguments)
    text = json.dumps(result)
    Path(request).with_name("result.json").write_text(text, encoding="utf-8")
    os._exit(0)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, tensors are fake and `cuda` is a device; the library must have been loaded."""
    import torch
    import torch.cuda.amp.common as amp
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    cuda: Any = torch.cuda
    for name in ("Stream", "Event"):
        setattr(cuda, name, _Nothing)
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *_: _Nothing())
    for name in ("set_device", "synchronize", "manual_seed_all"):
        setattr(cuda, name, lambda *_: None)
    for name in ("is_available", "is_initialized"):
        setattr(cuda, name, lambda: True)
    cuda.stream = lambda _: nullcontext()
    cuda.current_device, cuda.device_count = (lambda: 0), (lambda: 1)
    cuda.is_bf16_supported = lambda *_, **__: True
    amp.amp_definitely_not_available = lambda: False
    torch.nn.functional.scaled_dot_product_attention = _attention
    setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)  # noqa: B010
    setattr(torch.Tensor, "record_stream", lambda *_: None)  # noqa: B010
    setattr(FakeTensor, "tolist", _zeros)  # noqa: B010
    setattr(FakeTensor, "pin_memory", lambda tensor, *_: tensor)  # noqa: B010
    setattr(FakeTensor, "record_stream", lambda *_: None)  # noqa: B010
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The fused kernel that CUDA would choose, which torch asks of the driver: flash attention
    without a mask and in half precision, else the memory-efficient one."""
    import torch

    aten = torch.ops.aten
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    if attn_mask is None and query.dtype != torch.float32:
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = bias.masked_fill_(attn_mask.logical_not(), float("-inf"))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def _zeros(tensor: Any) -> Any:
    """`Tensor.tolist` of a fake tensor: one copy to the host, and zeros."""
    import numpy

    if tensor.device.type != "cpu":
        tensor.to("cpu")
    kind = numpy.float64 if tensor.dtype.is_floating_point else numpy.int64
    return numpy.zeros(tuple(tensor.shape), kind).tolist()


class _Nothing:
    """A stream or an event: every method returns it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self


def _library() -> Path:
    """The compiled source, of this torch; compiled where it is not there yet."""
    torch = _torch_folder()
    key = SOURCE.read_bytes() + str(torch).encode() + (torch / "version.py").read_bytes()
    name = f"spectral_scale_fake_cuda_{os.getuid()}_{hashlib.sha256(key).hexdigest()[:16]}.so"
    library = Path(tempfile.gettempdir(), name)
    if library.exists() and library.stat().st_uid == os.getuid():
        return library
    include, lib = torch / "include", torch / "lib"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "made.so")
        command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        command += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
        command += [f"-L{lib}", f"-Wl,-rpath,{lib}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True, capture_output=True)
        shutil.copy(made, library.with_suffix(f".{os.getpid()}"))
        library.with_suffix(f".{os.getpid()}").replace(library)
    return library


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("torch is not installed")
    return Path(found.origin).parent
