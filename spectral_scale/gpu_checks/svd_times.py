"""SVDs on the device: their errors, which must be small, and their times, by driver."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_scale.gpu_checks.findings import CheckFinding, Figure, at_most, recorded
from spectral_scale.gpu_checks.page import table
from spectral_scale.gpu_checks.place import Place
from spectral_scale.ops.decomposition import compose, orthogonality_error, svd

LIMIT = 1e-5
"""Largest entry of U^T U - I and V^T V - I, and Frobenius norm of A - U S V^T over that of A."""
SHAPES = ((512, 512), (1024, 1024), (2048, 2048), (2048, 8192), (4096, 4096), (8192, 8192))
SMALL_SHAPES = ((24, 24), (32, 32), (32, 128))
SECONDS = 240.0
"""Time for the whole table; larger matrices are left out where it would not do."""
OURS = "this package"

Driver = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One SVD."""

    seconds: float
    residual: float
    orthogonality: float


def check_svd(place: Place) -> CheckFinding:
    """The package's SVD, judged, and each driver of torch, recorded, by growing size."""
    figures: list[Figure] = []
    rows: list[list[str]] = []
    deadline = time.monotonic() + SECONDS
    speeds: dict[str, float] = {}
    for shape in place.choose(SHAPES, SMALL_SHAPES):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(place.device)
        for name, driver in drivers(place):
            expected = speeds.get(name, 0.0) * work(shape)
            if time.monotonic() + expected > deadline:
                rows.append([f"{shape[0]} x {shape[1]}", name, "left out", "", ""])
                continue
            outcome = timed(driver, weight, place)
            rows.append([f"{shape[0]} x {shape[1]}", name, *cells(outcome)])
            if isinstance(outcome, Timed):
                speeds[name] = outcome.seconds / work(shape)
            if name == OURS:
                figures += judge(shape, outcome)
    header = ["shape", "driver", "seconds", "residual", "orthogonality"]
    return CheckFinding(figures=figures, text=table(header, rows))


def work(shape: tuple[int, int]) -> float:
    """What the time of an SVD grows with: the larger side times the square of the smaller one."""
    return float(max(shape)) * min(shape) ** 2


def drivers(place: Place) -> Iterator[tuple[str, Driver]]:
    """The SVDs to compare, by name: this package's, and those that torch offers on the device."""
    yield OURS, svd
    if place.device.type != "cuda":
        yield "LAPACK", lambda a: _thin(a, None)
        return
    for name in ("gesvd", "gesvdj"):
        yield name, lambda a, name=name: _thin(a, name)  # type: ignore[misc]


def _thin(a: Tensor, driver: str | None) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, vh = torch.linalg.svd(a, full_matrices=False, driver=driver)
    return u, sigma, vh.mT


def timed(driver: Driver, weight: Tensor, place: Place) -> Timed | str:
    """One SVD with its errors, or why it failed. It is not run twice: the large ones take long."""
    place.synchronize()
    started = time.perf_counter()
    try:
        u, sigma, v = driver(weight)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    place.synchronize()
    seconds = time.perf_counter() - started
    rest = compose(u.double(), sigma.double(), v.double()) - weight.double()
    return Timed(
        seconds=seconds,
        residual=float(rest.norm() / weight.double().norm()),
        orthogonality=max(orthogonality_error(f.double()) for f in (u, v)),
    )


def judge(shape: tuple[int, int], outcome: Timed | str) -> list[Figure]:
    """The figures of the package's own SVD."""
    name = f"{shape[0]} x {shape[1]}"
    if isinstance(outcome, str):
        return [Figure(name=name, value=outcome, required="a decomposition", ok=False)]
    return [
        at_most(f"{name}, residual", outcome.residual, LIMIT),
        at_most(f"{name}, orthogonality", outcome.orthogonality, LIMIT),
        recorded(f"{name}, s", outcome.seconds),
    ]


def cells(outcome: Timed | str) -> list[str]:
    """The cells of a row after shape and driver."""
    if isinstance(outcome, str):
        return [outcome, "", ""]
    return [
        f"{outcome.seconds:.3f}", f"{outcome.residual:.1e}", f"{outcome.orthogonality:.1e}"
    ]  # fmt: skip
