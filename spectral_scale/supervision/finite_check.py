"""Refuses to go on from, or to save, numbers that are not finite.

`health.skip` leaves such a step out before it is applied. Here it is too late for that: the run
ends with an error, and its last checkpoint is the last good one.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from spectral_scale.errors import SpectralScaleError
from spectral_scale.parallel.chunks import TensorChunk
from spectral_scale.parallel.collective import Collective


def require_finite_step(
    loss: float, grad_norms: Mapping[str, float], *, step: int, saved_step: int
) -> None:
    """Raise SpectralScaleError if the loss or a gradient norm of an applied step is not finite.

    Args:
        loss: the mean over all ranks.
        grad_norms: of the averaged gradients, by group kind.
        step: the step that the numbers are of, counted from 1.
        saved_step: the step of the last checkpoint.
    """
    broken = [kind for kind, norm in grad_norms.items() if not math.isfinite(norm)]
    if math.isfinite(loss) and not broken:
        return
    what = f"gradient norm of {', '.join(broken)}" if broken else "loss"
    raise SpectralScaleError(
        f"the {what} is not finite at step {step} (loss {loss}); nothing was saved since "
        f"step {saved_step}; lower the learning rates or look at the data of that "
        "step, then start again to resume"
    )


def require_finite_state(
    chunks: Iterable[TensorChunk], collective: Collective, *, step: int, saved_step: int
) -> None:
    """Raise SpectralScaleError on all ranks if a tensor to be saved is not finite. Collective.

    An update can overflow although the loss of its step was finite.

    Args:
        chunks: what this rank would save.
        collective: all ranks of the run.
        step: the step that would be saved.
        saved_step: the step of the last checkpoint.
    """
    agreed = collective.agree(_first_not_finite(chunks), what="not finite after the update")
    if agreed is not None:
        raise SpectralScaleError(
            f"step {step} was not saved: {agreed}; lower the learning rates, then start "
            f"again to resume from step {saved_step}"
        )


def _first_not_finite(chunks: Iterable[TensorChunk]) -> str | None:
    """The first chunk with an entry that is not finite. The host waits once for each device."""
    kept = [c for c in chunks if c.tensor.is_floating_point() and c.tensor.numel()]
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, chunk in enumerate(kept):
        alike.setdefault((chunk.tensor.device, chunk.tensor.dtype), []).append(i)
    flags: dict[torch.device, list[Tensor]] = {}
    places: dict[torch.device, list[int]] = {}
    for (device, _), members in alike.items():
        largest = torch._foreach_norm([kept[i].tensor.detach() for i in members], math.inf)
        flags.setdefault(device, []).append(torch.stack(largest).isfinite())  # NaN if an entry is
        places.setdefault(device, []).extend(members)
    broken = [
        place
        for device, parts in flags.items()
        for place, finite in zip(places[device], torch.cat(parts).tolist(), strict=True)
        if not finite
    ]
    return kept[min(broken)].name if broken else None
