"""How long ranks may wait for one another, by the work that one of them may be doing meanwhile.

Three limits, each within the next, so that a run that hangs ends by its own verdict, which names a
rank, before torch gives up, which names none. With the default hang_timeout_seconds of 45, for a
model whose decompositions take no time, and for SST of OPT-13B on 8 GPUs:

    limit                                                        small      OPT-13B
    phase     what a phase with decompositions may take          600 s      2,211 s
    verdict   what the watchdog allows at most, whatever it saw  750 s      2,763 s
    torch     how long a collective waits                        1,800 s    5,677 s
"""

from dataclasses import dataclass
from datetime import timedelta

from spectral_scale.config.capability import projection_group
from spectral_scale.config.methods.rules import converted_shapes
from spectral_scale.config.presets import linear_shapes
from spectral_scale.config.resolve import ResolvedRun
from spectral_scale.methods.owners import assign_owners, decomposition_cost
from spectral_scale.parallel.group import COLLECTIVE_TIMEOUT

UNEVEN_SECONDS = 600.0
"""Seconds of a phase that is long now and then, decompositions aside."""
DECOMPOSED_A_SECOND = {"cpu": 1e8, "cuda": 5e9}
"""Decomposition cost (`decomposition_cost`) that a slow device gets through in a second: an
assumption, not a measurement. A fifth of what one core (5e8) and an A100 (2.5e10) should do."""
HEADROOM = 1.25
"""The watchdog's patience may grow beyond the phase limit by this factor."""
VERDICT_SECONDS = 60.0
"""Time from the watchdog's verdict to the end of the last rank."""


@dataclass(frozen=True, kw_only=True)
class WaitLimits:
    """Seconds, in ascending order."""

    phase: float
    """What a phase with decompositions may take before anything is known about it."""
    verdict: float
    """The longest that the watchdog waits for a phase."""
    collective: timedelta
    """How long a rank waits in a collective."""


def wait_limits(run: ResolvedRun, device_type: str) -> WaitLimits:
    """The limits of a run whose decompositions happen on devices of this type."""
    phase = UNEVEN_SECONDS + decomposition_seconds(run, device_type)
    silence = run.config.health.hang_timeout_seconds
    verdict = HEADROOM * max(phase, silence)
    # A rank may begin to wait as much as a phase before rank 0, whose watchdog speaks, does.
    collective = timedelta(seconds=2 * verdict + 2 * silence + VERDICT_SECONDS)
    return WaitLimits(phase=phase, verdict=verdict, collective=max(collective, COLLECTIVE_TIMEOUT))


def decomposition_seconds(run: ResolvedRun, device_type: str) -> float:
    """What all decompositions of the owner with most of them take at most, one after another."""
    method, architecture = run.method, run.architecture
    if not method.decomposes:
        return 0.0
    shapes, ranks = linear_shapes(architecture), run.world_size
    if method.converts:
        shapes = converted_shapes(run.config.spectral, architecture)
    elif run.config.parallel.backend != "torch":
        ranks = projection_group(run.config.parallel, run.world_size)
    every = {f"{i}.{n}": s for i in range(architecture.num_layers) for n, s in shapes.items()}
    loads = [0.0] * ranks
    for name, owner in assign_owners(every, ranks).items():
        loads[owner] += decomposition_cost(every[name])
    return max(loads) / DECOMPOSED_A_SECOND.get(device_type, DECOMPOSED_A_SECOND["cpu"])
