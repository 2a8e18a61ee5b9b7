"""What doctor finds on healthy machines, and on machines that are not."""

import json
import os
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_scale.cli.doctor import as_text
from spectral_scale.cli.main import main
from spectral_scale.doctor import group, machine, storage
from spectral_scale.doctor.findings import Finding, exit_code
from spectral_scale.parallel.collective import SingleProcess
from spectral_scale.parallel.rank_info import RankInfo
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.tiny import tiny_words


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_healthy_machine(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *tiny_words(corpus, tmp_path / "run"), "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    names = {f["name"] for f in result["findings"]}
    assert {"ranks", "versions", "devices", "compilers", "run folder", "space", "products"} <= names
    assert not any(f["verdict"] == "fault" for f in result["findings"])
    assert list(tmp_path.iterdir()) == []  # the probe is gone, no run folder was made
    assert main(["doctor", "--train.run_dir", str(tmp_path)]) == 0
    assert "ok      run folder" in capsys.readouterr().out


@pytest.mark.fast
def test_a_configuration_that_needs_more_ranks_is_a_warning_on_one_machine(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"parallel__backend": "fsdp2", "parallel__tensor_parallel": 2}
    words = tiny_words(corpus, tmp_path / "run", **changes)
    assert main(["doctor", *words, "--format", "json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    (found,) = [f for f in findings if f["name"] == "configuration"]
    assert found["verdict"] == "warning" and "must divide the 1 ranks" in found["text"]
    assert "as many ranks as the run has" in found["remedy"]


def sick_rank(run_dir: str) -> dict[str, Any]:
    """Two ranks of different software, clocks and sums; each rank's exit code and rank 0's text."""
    from spectral_scale.doctor.examine import PlannedRun, examine
    from spectral_scale.parallel.rank_info import detect_rank_info

    rank_info = detect_rank_info()
    if rank_info.rank == 1:
        real, now = machine.version, time.time
        machine.version = lambda name: "9.9" if name == "numpy" else real(name)  # type: ignore[assignment]
        group.time.time = lambda: now() - 100  # type: ignore[attr-defined]
        reduce = group.dist.all_reduce

        def wrong(data: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            result = reduce(data, *arguments, **options)
            if data.numel() > 1000:
                data[7] += 1
            return result

        group.dist.all_reduce = wrong
    storage.SEEN_WITHIN_SECONDS = 0.5
    place = Path(run_dir) / ("shared" if rank_info.rank == 0 else "local")
    place.mkdir()
    findings = examine(PlannedRun(run_dir=place, device="cpu"), rank_info)
    return {"code": exit_code(findings), "text": as_text(findings)}


def test_a_job_that_would_fail(tmp_path: Path) -> None:
    """Every rank ends with the same code, so that the launcher's is right."""
    first, second = run_distributed(sick_rank, 2, str(tmp_path), timeout_seconds=120)
    assert first["code"] == second["code"] == 1
    text = first["text"]
    assert "FAULT   versions: numpy is" in text and "9.9 on rank 1" in text
    assert "WARNING clocks" in text and "rank 1 is behind" in text
    assert "FAULT   all-reduce" in text and "wrong sums on ranks [1]" in text
    assert "FAULT   shared file system" in text and "(rank 1, " in text
    assert text.count("        -> ") >= 4


def healthy_rank(run_dir: str) -> list[str]:
    from spectral_scale.doctor.examine import PlannedRun, examine
    from spectral_scale.parallel.rank_info import detect_rank_info

    found = examine(PlannedRun(run_dir=Path(run_dir), device="cpu"), detect_rank_info())
    return [f"{finding.name}: {finding.verdict}" for finding in found]


def test_a_healthy_job(tmp_path: Path) -> None:
    first, second = run_distributed(healthy_rank, 2, str(tmp_path), timeout_seconds=120)
    assert first == second
    assert {"all-reduce: ok", "shared file system: ok", "clocks: ok"} <= set(first)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fast
def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    alone = SingleProcess()
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", refuse)
        found = by_name(storage.examine_storage(tmp_path, alone, checkpoint_bytes=0, kept=1))
    assert found["run folder"].verdict == "fault" and "No space left" in found["run folder"].text
    assert list(tmp_path.iterdir()) == []
    found = by_name(
        storage.examine_storage(tmp_path / "a", alone, checkpoint_bytes=1 << 60, kept=2)
    )
    assert found["space"].verdict == "fault" and "keep_last" in found["space"].remedy
    assert stat.S_ISDIR(storage.existing_parent(tmp_path / "a" / "b").stat().st_mode)


@pytest.mark.fast
def test_machines_that_lack_something(monkeypatch: pytest.MonkeyPatch) -> None:
    rank_info = RankInfo(rank=0, world_size=4, local_rank=2, local_world_size=2)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine, "versions", lambda: {"deepspeed": "absent"})
    monkeypatch.setattr(machine, "addresses", lambda: {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"]})
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    found = by_name(machine.examine_machine(rank_info, "deepspeed"))
    assert found["backend"].remedy == "pip install 'spectral-scale[deepspeed]'"
    assert found["compilers"].verdict == "warning" and "ninja" in found["compilers"].text
    assert found["interfaces"].verdict == "fault" and "ib0 is not up" in found["interfaces"].text
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("MASTER_ADDR", "node1")
    found = by_name(machine.examine_machine(rank_info, None))
    assert found["compilers"].verdict == "ok"
    assert "no other host reaches lo" in found["interfaces"].text
    assert found["ports"].verdict == "ok" and "127.0.0.1" in found["ports"].text

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not allowed here")

    monkeypatch.setattr(machine.socket, "create_server", refuse)
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (1024, 2048))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = by_name(machine.examine_machine(rank_info, None))
    assert (
        found["devices"].verdict == "fault" and "local rank 2 has no GPU" in found["devices"].text
    )
    assert found["ports"].verdict == "fault" and "allow TCP" in str(found["ports"].remedy)
    assert found["open files"].remedy == "ulimit -n 2048 before the start"


def test_gpus_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was given GPUs would train on the CPU; one that asks for the CPU may."""
    rank_info = RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    found = by_name(machine.examine_machine(rank_info, None))["devices"]
    assert found.verdict == "fault" and "SLURM_GPUS_ON_NODE=4" in found.text
    assert "train.device=cpu" in found.remedy
    assert by_name(machine.examine_machine(rank_info, None, "cpu"))["devices"].verdict != "fault"


def test_temporary_folders_and_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_info = RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1)

    def found() -> dict[str, Finding]:
        monkeypatch.setattr(tempfile, "tempdir", None)
        return by_name(machine.examine_machine(rank_info, None))

    assert found()["temporary folder"].verdict == found()["shared memory"].verdict == "ok"
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    assert "no UNIX socket can be made" in found()["temporary folder"].text
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    assert f"TMPDIR={tmp_path / 'absent'} cannot be used" in found()["temporary folder"].text
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "absent")
    assert "--shm-size" in found()["shared memory"].remedy
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(machine, "SHARED_BYTES_PER_GPU", 1 << 60)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "_devices", lambda rank_info, device: iter(()))
    assert "little for 2 GPUs" in found()["shared memory"].text
