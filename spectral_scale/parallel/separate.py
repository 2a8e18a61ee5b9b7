"""A second group of all ranks, for collectives of a thread beside the training's."""

import torch
import torch.distributed as dist

from spectral_scale.parallel.collective import Collective, ProcessGroup, SingleProcess
from spectral_scale.parallel.group import COLLECTIVE_TIMEOUT, keep_until_exit


def separate(collective: Collective) -> Collective:
    """The same ranks over a gloo group of their own. Collective.

    Collectives of two threads on one group could meet in a different order on each rank.
    """
    if collective.world_size == 1:
        return SingleProcess()
    group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    keep_until_exit(group)
    return ProcessGroup(torch.device("cpu"), group)
