"""Ranges from holders to those who need them and back: every element arrives, few are sent."""

from typing import Any

import pytest
import torch

from spectral_scale.parallel.collective import ProcessGroup
from spectral_scale.parallel.exchange import Exchange, even_slices
from spectral_scale.parallel.flat_shards import ShardGroup
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.traffic import TrafficCounter

SIZES = (10, 7, 1, 12)


def cut(total: int, world: int) -> list[list[tuple[int, int]]]:
    """One flat buffer cut evenly over ranks, as ZeRO-1 and 2 do: [tensor][rank] -> range."""
    per_rank, start, held = -(-total // world), 0, []
    for size in SIZES:
        ranges = []
        for rank in range(world):
            a = max(start, rank * per_rank)
            b = min(start + size, (rank + 1) * per_rank)
            ranges.append((a - start, b - a) if b > a else (0, 0))
        held.append(ranges)
        start += size
    return held


def there_and_back(world: int) -> list[Any]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    group = ShardGroup(shards=ProcessGroup(torch.device("cpu")))
    held = cut(sum(SIZES), world)
    whole = [torch.arange(n, dtype=torch.float32) + 100 * i for i, n in enumerate(SIZES)]
    sliced = [even_slices(n, world) for n in SIZES]
    owned = [[(0, n) if r == i % world else (0, 0) for r in range(world)]
             for i, n in enumerate(SIZES)]  # fmt: skip
    found = []
    for wanted in (sliced, owned):
        exchange = Exchange(held, wanted, group)
        parts = [w[a : a + n] for w, (a, n) in zip(whole, (h[rank] for h in held), strict=True)]
        with TrafficCounter() as counter:
            got = exchange.forward(parts, dtype=torch.float32)
            back = exchange.backward(got, dtype=torch.float32)
        expected = [
            w[a : a + n] for w, (a, n) in zip(whole, (x[rank] for x in wanted), strict=True)
        ]
        found.append(all(map(torch.equal, got, expected)) and all(map(torch.equal, back, parts)))
        found.append(dict(counter.calls))
    dist.barrier()
    dist.destroy_process_group()
    return found


def copies_there_and_back(world: int) -> list[Any]:
    """Ranks 0 and 2 hold the first half of a tensor, 1 and 3 the second; rank 1 needs all of it."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    group = ShardGroup(shards=ProcessGroup(torch.device("cpu")))
    held, wanted = [(0, 3), (3, 2)] * 2, [(0, 0), (0, 5), (0, 0), (0, 0)]
    exchange = Exchange([held], [wanted], group)
    part = torch.arange(5.0)[:3] if rank % 2 == 0 else torch.arange(5.0)[3:]
    given = part if rank < 2 else part + 10  # so that it shows whose was sent
    with TrafficCounter() as counter:
        got = exchange.forward([given], dtype=torch.float32)
        sent = counter.payload_bytes["alltoall_base"]
        back = exchange.backward([2 * got[0]], dtype=torch.float32)
    dist.barrier()
    dist.destroy_process_group()
    return [got[0].tolist(), back[0].tolist() == (2 * part).tolist(), sent]


def test_of_replicas_the_first_is_sent_and_all_get_it_back() -> None:
    found = run_distributed(copies_there_and_back, 4, 4)
    assert found[1][0] == [0, 1, 2, 3, 4] and all(f[0] == [] for f in found[:1] + found[2:])
    assert all(returned for _, returned, _ in found)
    assert [sent for _, _, sent in found] == [12, 0, 0, 0]


@pytest.mark.parametrize("world", [2, 3])
def test_every_element_arrives_and_returns(world: int) -> None:
    for sliced, calls, owned, more in run_distributed(there_and_back, world, world):
        assert sliced and owned
        assert calls == more == {"alltoall_base": 2}


def test_slices_cover_everything_once() -> None:
    for numel in (0, 1, 5, 12):
        slices = even_slices(numel, 4)
        assert sum(n for _, n in slices) == numel
        assert all(a + n == b for (a, n), (b, _) in zip(slices, slices[1:], strict=False))
        assert max(n for _, n in slices) - min(n for _, n in slices) <= 1
