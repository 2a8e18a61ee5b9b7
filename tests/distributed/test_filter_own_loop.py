"""SpectralFilterAdamW in an own loop under `fully_shard`: one process' numbers, and resume."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spectral_scale import FilterConfig, SpectralFilterAdamW
from spectral_scale.testing.distributed import run_distributed

WIDTH, DEPTH, STEPS, SAVED = 6, 4, 5, 2
CONFIG = FilterConfig(
    kind="heat", graph="knn", neighbors=1, refresh_steps=2, strength=2.0, joint_loss_mu=0.1
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(x)))


def train(world: int) -> tuple[list[Any], bool]:
    """Weights after all steps, and whether going on from the saved state gave the same, bit for
    bit."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from spectral_scale.parallel.dtensor_collectives import local

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(DEPTH))).double()
    rank = 0
    if world > 1:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        for block in model:
            fully_shard(block)
        fully_shard(model)

    def steps(chosen: SpectralFilterAdamW, start: int, stop: int) -> None:
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(step)
            batch = torch.randn(8, WIDTH, generator=generator, dtype=torch.float64)
            model(batch.chunk(world)[rank]).square().mean().backward()  # FSDP2 averages
            chosen.step()
            chosen.zero_grad()

    def make() -> SpectralFilterAdamW:
        return SpectralFilterAdamW(model.named_parameters(), CONFIG, lr=0.01, eps=1e-5)

    def pieces() -> list[Tensor]:
        return [local(p).clone() for p in model.parameters()]

    optimizer = make()
    steps(optimizer, 0, SAVED)
    saved, state = pieces(), copy.deepcopy(optimizer.state_dict())
    steps(optimizer, SAVED, STEPS)
    straight = pieces()
    whole = [p.full_tensor() if world > 1 else p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter, piece in zip(model.parameters(), saved, strict=True):
            local(parameter).copy_(piece)
    resumed = make()
    resumed.load_state_dict(state)
    steps(resumed, SAVED, STEPS)
    same = all(map(torch.equal, pieces(), straight))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return [t.detach().numpy() for t in whole], same


def test_fully_sharded_own_loop_equals_one_process() -> None:
    expected, resumed_alone = train(1)
    ranks: list[Any] = run_distributed(train, 2, 2, timeout_seconds=120)
    assert resumed_alone and all(same for _, same in ranks)
    for found, value in zip(ranks[0][0], expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-10)
