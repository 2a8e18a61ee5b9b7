"""Print what a layer and a whole optimizer step ask of a GPU, counted on a fake CUDA device.

    python benchmarks/launches.py

It needs no GPU, but a C++ compiler, and takes about five minutes. The tables are those of
docs/gpu.md.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from spectral_scale.testing.fake_cuda import on_fake_cuda

LAYER = 2048
TOKENS = 8192
STEPS = [
    ("opt-125m", "torch", 1),
    ("llama-60m", "torch", 1),
    ("opt-125m", "fsdp2", 8),
    ("llama-60m", "fsdp2", 8),
]


def layer(kind: str) -> dict[str, Any]:
    """Forward and backward of one layer of 2048 x 2048 under bf16 autocast, with bias; of SST in
    the second micro-batch of a step, which finds the factors cast."""
    import torch

    from spectral_scale.methods.sst.casts import CastCache
    from spectral_scale.methods.sst.layer import SpectralLinear
    from spectral_scale.testing.launches import Launches

    if kind == "dense":
        module: torch.nn.Module = torch.nn.Linear(LAYER, LAYER, device="cuda")
    else:
        module = SpectralLinear(
            LAYER, LAYER, 64, storage=kind, frozen_dtype=torch.bfloat16, device="cuda"
        )
        module.ready, module.casts = True, CastCache()
    for _ in range(2):
        x = torch.randn(TOKENS, LAYER, device="cuda", requires_grad=True)
        with Launches() as counted:
            with torch.autocast("cuda", torch.bfloat16):
                y = module(x)
            forward = counted.launches
            y.backward(torch.empty_like(y))
        module.zero_grad()
    return counted.figures() | {"forward": forward}


def step(model: str, backend: str, world_size: int) -> dict[str, Any]:
    """A step of 8 sequences of 1024 tokens on each rank."""
    from spectral_scale.testing.fake_step import count_step

    changes = {
        "model.name": model,
        "model.sequence_length": 1024,
        "train.micro_batch_size": 8,
        "train.global_batch_size": 8 * world_size,
        "parallel.backend": backend,
    }
    return count_step(changes, world_size)


def main() -> None:
    import launches  # so that the other process can import these functions by name

    print("| layer | launches, forward + backward | MB in + out |")
    print("| --- | --- | --- |")
    for kind in ("dense", "residual", "factored"):
        found = on_fake_cuda(launches.layer, kind)
        back = found["launches"] - found["forward"]
        print(f"| {kind} | {found['forward']} + {back} | {found['megabytes']:.0f} |")
    print(
        "\n| model | backend | launches: forward + backward + rest | GB in + out | waits |", end=""
    )
    print(" largest result, GB |\n| --- | --- | --- | --- | --- | --- |")
    for model, backend, world_size in STEPS:
        found = on_fake_cuda(launches.step, model, backend, world_size)
        whole, parts = found["step"], [found[k]["launches"] for k in ("forward", "backward")]
        rest = whole["launches"] - sum(parts)
        largest = max(whole["largest"].values()) / 1e9
        print(
            f"| {model} | {backend}, {world_size} | {parts[0]} + {parts[1]} + {rest} "
            f"| {whole['megabytes'] / 1e3:.1f} | {whole['waits']} | {largest:.2f} |"
        )


if __name__ == "__main__":
    main()
