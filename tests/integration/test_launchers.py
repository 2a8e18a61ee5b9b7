"""mpirun and DeepSpeed over mpirun, Open MPI's and MPICH's: the same folder, losses and codes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from spectral_scale.cli.main import main
from spectral_scale.metrics.history import read_metrics
from spectral_scale.testing.tiny import tiny_words

ROOT = Path(__file__).parents[2]
STEPS = 6
MPIRUN = shutil.which("mpirun")
OPEN_MPI = MPIRUN is not None and shutil.which("ompi_info") is not None
open_mpi = pytest.mark.skipif(
    not OPEN_MPI, reason="Open MPI's mpirun is not installed (Debian: apt-get install openmpi-bin)"
)
mpich = pytest.mark.skipif(
    shutil.which("mpirun.mpich") is None,
    reason="MPICH's mpirun is not installed as mpirun.mpich (Debian: apt-get install mpich)",
)
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
TWO = ("mpirun", "-n", "2", "--oversubscribe", sys.executable, "launch/pretrain.py")


def start(*words: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, cwd=ROOT, env=os.environ | ENVIRONMENT | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output."""
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    return process.returncode, output


def losses(run_dir: Path) -> dict[int, float]:
    return {m["step"]: m["train/loss"] for m in read_metrics(run_dir) if "train/loss" in m}


def words_of(corpus: Path, run_dir: Path, **changes: Any) -> list[str]:
    return tiny_words(corpus, run_dir, train__steps=STEPS, metrics__progress=False, **changes)


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process."""
    run_dir = tmp_path_factory.mktemp("alone")
    assert main(["train", *words_of(corpus, run_dir)]) == 0
    return run_dir


@open_mpi
def test_mpirun_stops_at_a_signal_and_goes_on(corpus: Path, tmp_path: Path, alone: Path) -> None:
    """mpirun hands SIGUSR1 to all ranks; 75, and the same command continues."""
    words = [*TWO, *words_of(corpus, tmp_path / "run")]
    run_dir = tmp_path / "run"
    many = start(*words, "--train.steps=100000")
    deadline = time.monotonic() + 150
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and '"step": 2,' in metrics.read_text()):
        assert many.poll() is None and time.monotonic() < deadline, end(many)
        time.sleep(0.01)
    many.send_signal(signal.SIGUSR1)
    code, output = end(many)
    assert code == 75, output
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "stopped" and status["reason"] == "stopped by SIGUSR1"
    step = status["step"]
    code, output = end(start(*words, f"--train.steps={step + 2}"))
    assert code == 0 and f"resuming at step {step} of {step + 2}" in output, output
    found, expected = losses(run_dir), losses(alone)
    shared = found.keys() & expected.keys()
    assert max(found) == step + 2 and len(shared) >= 2
    assert {s: found[s] for s in shared} == pytest.approx(
        {s: expected[s] for s in shared}, abs=1e-5
    )
    log = (run_dir / "logs" / "rank_00001.log").read_text()
    assert "rank 1 of 2, local rank 1, from Open MPI" in log and "meeting at 127.0.0.1" in log
    files = {p.name for p in run_dir.iterdir()} - {"heartbeats"}
    assert files - {"report.html"} == {p.name for p in alone.iterdir()} - {
        "report.html",
        "heartbeats",
    }


@open_mpi
def test_mpirun_and_a_wrong_configuration(corpus: Path, tmp_path: Path) -> None:
    code, output = end(start(*TWO, *words_of(corpus, tmp_path / "run", data__train="nowhere")))
    assert code == 78 and "nowhere: no such token folder" in output
    assert not (tmp_path / "run").exists()


def deepspeed(launcher: str, folder: Path, *words: str, **variables: str) -> tuple[int, str]:
    """Exit code and output of two ranks of this host, started by `deepspeed --launcher`."""
    hosts = folder / "hostfile"
    hosts.write_text("localhost slots=2\n")
    command = str(Path(sys.executable).with_name("deepspeed"))
    where = ["--hostfile", str(hosts), "--launcher", launcher, "--no_ssh_check", "--force_multi"]
    where += ["--master_addr", "127.0.0.1"]
    return end(start(sys.executable, command, *where, *words, **variables))


@open_mpi
def test_deepspeed_over_open_mpi(corpus: Path, tmp_path: Path, alone: Path) -> None:
    """Which sets no rank variables of its own."""
    own = ["--launcher_args", "--mca btl_tcp_if_include lo --oversubscribe"]
    words = words_of(corpus, tmp_path / "run", parallel__backend="deepspeed")
    code, output = deepspeed("openmpi", tmp_path, *own, "launch/pretrain.py", *words)
    assert code == 0, output
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-5)


@mpich
def test_deepspeed_over_mpich(corpus: Path, tmp_path: Path, alone: Path) -> None:
    """It calls `mpirun`, whichever that is, and its helper sets torch's variables."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text('#!/bin/sh\nexec mpirun.mpich "$@"\n')
    mpirun.chmod(0o755)
    words = ["launch/pretrain.py", *words_of(corpus, tmp_path / "run")]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    code, output = deepspeed("mpich", tmp_path, *words, PATH=path)
    assert code == 0 and losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-5), output


AGREE = """
from spectral_scale.cluster.detect import LauncherFlags, detect
from spectral_scale.cluster.mpi import agree_on_address
import os
facts = detect(LauncherFlags(), os.environ)
host, port = agree_on_address(facts, f"host{facts.rank}", 5000 + facts.rank)
print(f"agreed on {host} {port}")  # one piece, which no other rank's words come into
"""


@open_mpi
def test_real_mpi_ranks_agree_on_rank_0_s_address() -> None:
    """As those of several hosts must, which no variable tells."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    code, output = end(start(*TWO[:-1], "-c", AGREE))
    assert code == 0 and output.count("agreed on host0 5000") == 2, output


MEET = """
from spectral_scale.cluster.adopt import adopt_launcher
print(adopt_launcher().note)
"""


@mpich
def test_mpich_s_ranks_of_one_host_meet_without_mpi4py() -> None:
    """By the process that started them: MPICH names no job, and mpi4py may load another library."""
    code, output = end(start("mpirun.mpich", "-n", "2", sys.executable, "-c", MEET))
    assert code == 0, output
    places = set(re.findall(r"meeting at (127\.0\.0\.1 port \d+)", output))
    assert len(places) == 1 and "rank 0 of 2" in output and "rank 1 of 2" in output, output
