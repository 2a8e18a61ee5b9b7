"""Low-pass responses h(lambda) over graph frequencies, and the matrix Phi h(Lambda) Phi^T."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from spectral_scale.errors import ConfigError
from spectral_scale.ops.laplacian import Eigenbasis

FilterKind = Literal["rational", "heat", "ideal", "identity"]
Response = Callable[[Tensor], Tensor]
"""Frequencies (any shape, float64) -> factors in [0, 1] of the same shape."""

ON_THE_EDGE = 1e-9
"""Frequencies this close above the cut-off of `ideal` pass: eigenvalues are rounded."""


def response(kind: FilterKind, strength: float) -> Response:
    """h by name, with h(0) = 1, never rising.

    rational: 1 / (1 + s lambda), the proximal step on (s / 2) Tr(X^T L X). heat: exp(-s lambda).
    ideal: 1 up to lambda = s, then 0. identity: 1, whatever s.

    Raises ConfigError for an unknown kind, or a strength that is negative or not finite.
    """
    if not (math.isfinite(strength) and strength >= 0):
        raise ConfigError(f"filter strength {strength} must be finite and at least 0")
    responses: dict[str, Response] = {
        "rational": lambda frequency: 1.0 / (1.0 + strength * frequency),
        "heat": lambda frequency: torch.exp(-strength * frequency),
        "ideal": lambda frequency: (frequency <= strength + ON_THE_EDGE).to(frequency.dtype),
        "identity": torch.ones_like,
    }
    if kind not in responses:
        raise ConfigError(f"filter {kind!r} is unknown; use one of {', '.join(responses)}")
    return responses[kind]


def filter_matrix(basis: Eigenbasis, respond: Response) -> Tensor:
    """H = Phi h(Lambda) Phi^T, (n, n) float64, symmetric."""
    half = basis.vectors * respond(basis.values).sqrt()
    return half @ half.t()
