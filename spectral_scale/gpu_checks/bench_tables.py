"""`bench step` of whole models, dense against SST."""

from dataclasses import asdict

from spectral_scale.bench.render import to_markdown
from spectral_scale.bench.results import StepBench
from spectral_scale.bench.settings import StepSettings
from spectral_scale.bench.step import bench_step
from spectral_scale.gpu_checks.findings import CheckFinding, Figure, holds, recorded
from spectral_scale.gpu_checks.place import Place

FORMULA_TOLERANCE = 0.01
"""The persistent state may differ from its formula by this share."""


def check_opt_125m(place: Place) -> CheckFinding:
    """All three variants with their swaps."""
    settings = StepSettings(
        model=place.choose("opt-125m", "opt-tiny"),
        whole_model=True,
        dtype="bf16",
        device="cpu" if place.rehearsal else "cuda",
        batch_size=place.choose(8, 1),
        sequence_length=place.choose(1024, 16),
        spectral_rank=place.choose(64, 16),
        steps=place.choose(20, 1),
        warmup_steps=place.choose(3, 1),
    )
    return table(bench_step(settings))


def check_opt_1_3b(place: Place) -> CheckFinding:
    """Dense and residual steps; its swaps would take minutes, and the SVD table tells of them."""
    settings = StepSettings(
        model=place.choose("opt-1.3b", "opt-tiny"),
        whole_model=True,
        dtype="bf16",
        device="cpu" if place.rehearsal else "cuda",
        batch_size=place.choose(4, 1),
        sequence_length=place.choose(2048, 16),
        spectral_rank=place.choose(64, 16),
        steps=place.choose(10, 1),
        warmup_steps=place.choose(2, 1),
        variants=("dense", "sst residual"),
        swaps=False,
    )
    return table(bench_step(settings))


def table(bench: StepBench) -> CheckFinding:
    """The ratios to the dense step, and the tables of `bench step` as they are."""
    figures: list[Figure] = []
    for result in bench.results:
        counted = sum(result.state_bytes.values())
        share = counted / sum(result.formula_bytes.values())
        figures += [
            recorded(f"{result.variant}, step, s", result.step_seconds.median),
            recorded(f"{result.variant}, step / dense", result.step_ratio.median),
            holds(
                f"{result.variant}, state / formula",
                abs(share - 1) <= FORMULA_TOLERANCE,
                value=f"{share:.4f}",
                required=f"1 within {FORMULA_TOLERANCE:g}",
            ),
        ]
    return CheckFinding(figures=figures, text=to_markdown(bench), data=asdict(bench))
