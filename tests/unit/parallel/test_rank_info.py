"""What a launcher's environment says, and what contradicts itself."""

import pytest
import torch

from spectral_scale.errors import ConfigError
from spectral_scale.parallel.device import pick_device
from spectral_scale.parallel.rank_info import RankInfo, detect_rank_info, require_rendezvous


def test_no_launcher_means_one_process() -> None:
    assert detect_rank_info({}) == RankInfo(rank=0, world_size=1, local_rank=0)
    assert detect_rank_info({"LOCAL_RANK": "3", "MASTER_ADDR": "x"}).world_size == 1


def test_torchrun_s_variables() -> None:
    rank_info = detect_rank_info({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (rank_info.rank, rank_info.world_size, rank_info.local_rank) == (5, 8, 1)
    assert "RANK" in rank_info.source
    assert detect_rank_info({"RANK": "0", "WORLD_SIZE": "1"}).local_rank == 0


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE", "must both be integers", "torchrun"]),
        ({"WORLD_SIZE": "2"}, ["RANK", "unset them for a single process"]),
        ({"RANK": "a", "WORLD_SIZE": "2"}, ["'a'", "must both be integers"]),
        ({"RANK": "", "WORLD_SIZE": "2"}, ["must both be integers"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, ["'x'"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK=2 is not below WORLD_SIZE=2", "check"]),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, ["RANK=-1"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ["WORLD_SIZE=0"]),
    ],
)
def test_contradictions_are_configuration_errors(
    environment: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        detect_rank_info(environment)
    for part in parts:
        assert part in str(caught.value)


def test_ranks_need_a_place_to_meet() -> None:
    several = RankInfo(rank=1, world_size=2)
    require_rendezvous(several, {"MASTER_ADDR": "a", "MASTER_PORT": "1"})
    require_rendezvous(RankInfo(), {})
    with pytest.raises(ConfigError, match="WORLD_SIZE=2, but MASTER_PORT must be set.*torchrun"):
        require_rendezvous(several, {"MASTER_ADDR": "a"})


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto", 0) == pick_device("cpu", 3) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"train\.device=cuda, but torch sees no GPU; set"):
        pick_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", 1) == torch.device("cuda", 1)
    assert pick_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ConfigError, match="local rank 2 has no GPU: 2 on this host; start fewer"):
        pick_device("auto", 2)
