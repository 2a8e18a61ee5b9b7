"""The README's picture of memory and traffic, dense AdamW and SST, as `spectral-scale plan` has it.

python benchmarks/plan_figure.py [--output docs/images/plan.svg]
"""

import argparse
from pathlib import Path

from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.plan.build import Plan, plan_run
from spectral_scale.plan.figure import draw, held

RANKS = 8
MODEL = ["--model.name=opt-1.3b", "--model.sequence_length=2048", "--train.precision=bf16"]
MODEL += ["--train.global_batch_size=64", "--train.micro_batch_size=4"]
METHODS = {
    "dense AdamW": ["--spectral.method=full"],
    "SST, r = 64": ["--spectral.method=sst", "--spectral.spectral_rank=64"],
}
BACKENDS = {
    "DDP": ["--parallel.backend=torch"],
    "ZeRO-2": ["--parallel.backend=deepspeed", "--parallel.zero_stage=2"],
    "ZeRO-3": ["--parallel.backend=deepspeed", "--parallel.zero_stage=3"],
    "FSDP2": ["--parallel.backend=fsdp2"],
}
GB = 1e9


def plans() -> dict[str, Plan]:
    """By label, in the order in which they are drawn."""
    found = {}
    for backend, place in BACKENDS.items():
        for method, what in METHODS.items():
            config = load_config(overrides=[*MODEL, *place, *what]).config
            resolved = resolve(config, world_size=RANKS)
            found[f"{backend}   {method}"] = plan_run(resolved, gpu_memory_bytes=80 * GB)
    return found


def main() -> None:
    """Draw and list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/images/plan.svg"))
    output = parser.parse_args().output
    found = plans()
    draw(found, output, group=len(METHODS))
    for label, plan in found.items():
        step = plan.step_traffic_bytes / GB
        print(f"{label}: {held(plan) / GB:.2f} GB held, {step:.2f} GB a step")


if __name__ == "__main__":
    main()
