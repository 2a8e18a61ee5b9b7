"""GaLore by owners: the same bits as on whole parameters, and rounds that leave nothing out."""

from dataclasses import dataclass, field
from math import prod

import pytest
import torch
from torch import nn

from spectral_scale.errors import ConfigError
from spectral_scale.methods.galore.optimizer import GaLoreAdamW
from spectral_scale.methods.galore.rounds import plan_rounds
from spectral_scale.methods.galore.sharded_optimizer import ShardedGaLoreAdamW
from spectral_scale.optim.build import create_state, state_tensors
from spectral_scale.parallel.collective import SingleProcess
from spectral_scale.parallel.flat_shards import ShardGroup, TensorShards
from spectral_scale.parallel.shard_geometry import FlatOrder, Range

SHAPES = {"a": (9, 6), "b": (6, 9), "c": (7, 7), "bias": (6,)}


def groups_of(parameters: dict[str, nn.Parameter]) -> list[dict]:
    matrices = [fqn for fqn in SHAPES if len(SHAPES[fqn]) == 2]
    projection = {"galore_rank": 3, "update_interval": 2, "scale": 0.25, "weight_decay": 0.1}
    return [
        {"params": [parameters["bias"]], "fqns": ["bias"]},
        {"params": [parameters[fqn] for fqn in matrices], "fqns": matrices, **projection},
    ]


def test_one_rank_takes_the_steps_of_whole_parameters() -> None:
    torch.manual_seed(0)
    ours = {fqn: nn.Parameter(torch.randn(shape).double()) for fqn, shape in SHAPES.items()}
    theirs = {fqn: nn.Parameter(p.detach().clone()) for fqn, p in ours.items()}
    sharded = ShardedGaLoreAdamW(groups_of(ours), collective=SingleProcess(), lr=1e-2)
    whole = GaLoreAdamW(groups_of(theirs), lr=1e-2)
    create_state(sharded)
    sharded.bind(TensorShards(ours))
    for _ in range(5):
        for fqn, parameter in ours.items():
            parameter.grad = torch.randn_like(parameter)
            theirs[fqn].grad = parameter.grad.clone()
        sharded.step()
        whole.step()
    for fqn, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[fqn], rtol=1e-12, atol=1e-14)
    names = {name for name, _ in sharded.state_tensors()}
    assert len(names) == 3 * 3 and "optimizer/a/projector" in names
    count = sum(tensor.numel() for tensor in state_tensors(whole))
    assert sum(tensor.numel() for tensor in state_tensors(sharded)) == count
    assert sharded.stats.renewed == 3 * 3  # steps 1, 3 and 5, since nobody has taken the counts
    torch.testing.assert_close(torch.stack(sharded.stats.overlaps[-3:]).double(),
                               torch.stack(whole.stats.overlaps))  # fmt: skip


class Silent(SingleProcess):
    """A place among ranks that are not there."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


@dataclass
class FlatBuffers:
    """Matrices of one size, sharded over ranks in flat buffers."""

    by_fqn: dict[str, list[Range]]
    group: ShardGroup
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    blocks: int = 1

    def ranges(self, fqn: str) -> list[Range]:
        return self.by_fqn[fqn]

    def order(self, fqn: str) -> FlatOrder:
        return FlatOrder(self.shapes[fqn], self.blocks)


def cut_flat(matrices: int, ranks: int, rank: int) -> FlatBuffers:
    """As ZeRO-1 and 2 do."""
    shape = (4, 3)
    numel = prod(shape)
    share = -(-matrices * numel // ranks)
    ranges = {}
    for i in range(matrices):
        ranges[f"m{i}"] = [
            (start - i * numel, stop - start) if stop > start else (0, 0)
            for r in range(ranks)
            for start, stop in [(max(r * share, i * numel), min((r + 1) * share, (i + 1) * numel))]
        ]
    return FlatBuffers(ranges, ShardGroup(shards=Silent(rank, ranks)), dict.fromkeys(ranges, shape))


@pytest.mark.parametrize(("matrices", "ranks"), [(1, 1), (7, 1), (5, 3), (12, 4), (2, 4)])
def test_rounds(matrices: int, ranks: int) -> None:
    """The same on all ranks; every matrix once, one of an owner at a time; those that one rank
    holds whole come last and do not travel."""
    pieces = [cut_flat(matrices, ranks, rank) for rank in range(ranks)]
    owners = {
        fqn: max(range(ranks), key=lambda r: ranges[r][1])
        for fqn, ranges in pieces[0].by_fqn.items()
    }
    plans = [plan_rounds(list(owners), owners, piece) for piece in pieces]  # type: ignore[arg-type]
    for turns in zip(*plans, strict=True):
        assert len({turn.fqns for turn in turns}) == 1
        assert len({turn.exchange is None for turn in turns}) == 1
        mine = [fqn for turn in turns for fqn in turn.mine]
        assert sorted(mine) == sorted(turns[0].fqns)
        assert all(len(turn.mine) <= 1 for turn in turns)
    once = [fqn for turn in plans[0] for fqn in turn.fqns]
    assert sorted(once) == sorted(owners)
    travels = [turn.exchange is not None for turn in plans[0]]
    assert travels == sorted(travels, reverse=True)
    assert sum(travels) <= max(0, ranks - 1)


def test_replicas_split_the_decompositions() -> None:
    piece = cut_flat(5, 1, 0)
    piece.group = ShardGroup(replicas=Silent(1, 2))
    plan = plan_rounds(list(piece.shapes), dict.fromkeys(piece.shapes, 0), piece)  # type: ignore[arg-type]
    assert [len(turn.fqns) for turn in plan] == [2, 2, 1]
    assert all(sorted(turn.mine.values()) == [0, 1] for turn in plan[:2])


def test_matrices_in_columns_are_refused() -> None:
    parameters = {fqn: nn.Parameter(torch.zeros(shape)) for fqn, shape in SHAPES.items()}
    sharded = ShardedGaLoreAdamW(groups_of(parameters), collective=SingleProcess(), lr=1e-2)
    piece = FlatBuffers({}, ShardGroup(shards=Silent(0, 2)), SHAPES, blocks=2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="owner of a needs ranges of its rows"):
        sharded.bind(piece)  # type: ignore[arg-type]
