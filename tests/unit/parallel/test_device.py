"""Which GPU a rank takes, and what stops it from taking a wrong one or none."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spectral_scale.errors import ConfigError
from spectral_scale.parallel import device as module
from spectral_scale.parallel.device import gpus_allotted, pick_device, require_own_gpu

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have torch see this many GPUs."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


def test_the_gpu_of_a_rank(gpus: Any) -> None:
    """A rank that sees one GPU was bound to it, by whichever launcher: it has index 0."""
    gpus(4)
    assert pick_device("auto", 3, {}) == torch.device("cuda", 3)
    assert pick_device("cpu", 3, {}) == torch.device("cpu")
    with pytest.raises(ConfigError, match="local rank 4 has no GPU: 4 on this host"):
        pick_device("cuda", 4, {})
    gpus(1)
    assert pick_device("auto", 3, {}) == GPU


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_JOB_GPUS": "0,1"},
        {"SLURM_GPUS": "8"},
        {"SLURM_GPUS_PER_NODE": "a100:4"},
        {"SLURM_GPUS_PER_TASK": "1"},
        {"SLURM_GPUS_ON_NODE": "2"},
        {"CUDA_VISIBLE_DEVICES": "0"},
    ],
)
def test_no_silent_run_on_the_cpu_in_a_job_with_gpus(
    gpus: Any, environment: dict[str, str]
) -> None:
    gpus(0)
    job = environment | {"SLURM_JOB_ID": "7"}
    ((name, value),) = environment.items()
    with pytest.raises(ConfigError, match=rf"has GPUs \({name}={value}\).*train.device=cpu"):
        pick_device("auto", 0, job)
    assert pick_device("cpu", 0, job) == torch.device("cpu")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "7"},
        {"SLURM_JOB_ID": "7", "SLURM_GPUS": "0", "SLURM_GPUS_PER_NODE": "a100:0"},
        {"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "", "CUDA_VISIBLE_DEVICES": ""},
        {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "-1"},
        {"CUDA_VISIBLE_DEVICES": "0"},
    ],
)
def test_a_machine_without_gpus_takes_the_cpu(gpus: Any, environment: dict[str, str]) -> None:
    gpus(0)
    assert gpus_allotted(environment) is None
    assert pick_device("auto", 0, environment) == torch.device("cpu")


def test_the_remedy_names_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "build for CPUs" in module.unseen_gpu_remedy()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "CUDA 13.0" in module.unseen_gpu_remedy()


class Ranks:
    """Rank 0's side of a group whose other ranks say `others`."""

    rank = 0

    def __init__(self, *others: Any) -> None:
        self.others, self.world_size = others, 1 + len(others)

    def gather_json(self, value: Any) -> list[Any]:
        return [value, *self.others]

    def broadcast_json(self, value: Any) -> Any:
        return value


def test_two_ranks_on_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc")
    )
    require_own_gpu(Ranks(["node1", "def"], ["node2", "abc"], None), GPU)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"ranks 0, 2 share one GPU of host node1 \(abc\)"):
        require_own_gpu(Ranks(["node1", "def"], ["node1", "abc"]), GPU)  # type: ignore[arg-type]
    require_own_gpu(Ranks(None, None), torch.device("cpu"))  # type: ignore[arg-type]
    require_own_gpu(Ranks(), GPU)  # type: ignore[arg-type]
