"""The loops of `ops.int8` compiled for this processor, where there is a compiler.

They give the bits of the plain form in a fraction of its time: each row is read once or twice while
it lies in the cache, where torch's operations write wide copies of it. Nothing needs them: without
a compiler, or on tensors that they do not take, the plain form computes.

`int8_kernels.c` is compiled at its first use, within seconds, into torch's folder of extensions
(TORCH_EXTENSIONS_DIR), under a name that changes with the source, the compiler's options and the
processor.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC"),
)
KINDS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
"""Precisions of inputs and outputs that are compiled."""
COMPILE_SECONDS = 120
"""The longest that a compiler is waited for."""


@dataclass(frozen=True)
class Kernels:
    """The compiled loops; tensors lie on the CPU, rows are contiguous."""

    library: ctypes.CDLL

    def quantise_rows(
        self,
        values_TK: Tensor,
        columns_K: Tensor | None,
        q_TK: Tensor,
        scale_T: Tensor,
        least: float,
    ) -> None:
        """Fill q and scale; `least` is the smallest magnitude that a row is scaled by."""
        function = getattr(self.library, f"quantise_rows_{KINDS[values_TK.dtype]}")
        function(
            _pointer(values_TK),
            ctypes.c_int64(values_TK.shape[0]),
            ctypes.c_int64(values_TK.shape[1]),
            ctypes.c_int64(values_TK.stride(0)),
            _pointer(columns_K),
            _pointer(q_TK),
            _pointer(scale_T),
            ctypes.c_float(least),
            ctypes.c_int(torch.get_num_threads()),
        )

    def scale_sums(
        self,
        sums_TN: Tensor,
        scale_T: Tensor,
        columns_N: Tensor | None,
        bias_N: Tensor | None,
        out_TN: Tensor,
    ) -> None:
        """out = diag(scale) sums diag(columns) + bias; a bias needs columns."""
        function = getattr(self.library, f"scale_sums_{KINDS[out_TN.dtype]}")
        function(
            _pointer(sums_TN),
            ctypes.c_int64(sums_TN.shape[0]),
            ctypes.c_int64(sums_TN.shape[1]),
            _pointer(scale_T),
            _pointer(columns_N),
            _pointer(bias_N),
            _pointer(out_TN),
            ctypes.c_int(torch.get_num_threads()),
        )


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def kernels_for(tensor: Tensor) -> Kernels | None:
    """The compiled loops if they take a tensor of this device and precision, else None."""
    if tensor.device.type != "cpu" or tensor.dtype not in KINDS or torch.compiler.is_compiling():
        return None
    return compiled_kernels()


@functools.cache
def compiled_kernels() -> Kernels | None:
    """The compiled loops, made now if they were not; None, said once, if they cannot be."""
    try:
        file = library_file()
        if not file.is_file():
            _compile(file)
        return Kernels(ctypes.CDLL(str(file)))
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None)
        logger.warning(
            "products of eight bits take their plain, slower form: %s could not be compiled (%s)",
            SOURCE.name,
            told.strip().splitlines()[-1] if told and told.strip() else error,
        )
        return None


def library_file() -> Path:
    """Where the compiled loops are kept for this source, compiler and processor."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    parts = (SOURCE.read_text(encoding="utf-8"), _compiler(), *FLAGS, _processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return Path(folder).expanduser() / "spectral_scale" / f"int8_kernels_{key}.so"


def _compile(file: Path) -> None:
    """Write the library, whole or not at all: other ranks may do the same at this moment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        command = [_compiler(), *FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        made.replace(file)


def _compiler() -> str:
    """The C compiler: what CC names, or the first that is there. Raises FileNotFoundError."""
    chosen = os.environ.get("CC")
    for name in (chosen,) if chosen else ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found is not None:
            return found
    raise FileNotFoundError(f"no C compiler {chosen}" if chosen else "no C compiler")


def _processor() -> str:
    """What -march=native depends on: the instructions that the processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))
