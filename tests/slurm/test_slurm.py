"""Every script of slurm/ on a real SLURM: time limits, requeues, preemption, arrays, failures."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from slurm_cluster import Cluster, Job
from transformers import AutoModelForCausalLM

from spectral_scale.cli.main import main
from spectral_scale.metrics.history import read_metrics
from spectral_scale.testing.tiny import tiny_words

pytestmark = pytest.mark.timeout(600)  # SLURM looks at time limits twice a minute
ROOT = Path(__file__).parents[2]
STEPS = 12  # swaps after 4, 8 and 12
SMALL = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10")
REACHED = 4
"""Something happens after this step."""


def losses(run_dir: Path) -> dict[int, float]:
    return {m["step"]: m["train/loss"] for m in read_metrics(run_dir) if "train/loss" in m}


@pytest.fixture(autouse=True)
def job_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user would set in env.sh, and a run that waits for `interrupted`."""
    values = {
        "SPECTRAL_SCALE_PYTHON": sys.executable,
        "SPECTRAL_SCALE_PREFLIGHT": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "pace"), str(ROOT)]),
        "DS_ACCELERATOR": "cpu",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_odls_base_sigkill_timeout": "15",  # mpirun waits all of it
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)


class Jobs:
    """Submits the scripts of slurm/ for the tiny model, two nodes of one rank each."""

    def __init__(self, cluster: Cluster, corpus: Path, folder: Path) -> None:
        self.cluster, self.corpus, self.folder = cluster, corpus, folder
        self.output = folder / "job.out"
        self.run_dir = folder / "run"

    def submit(
        self, script: str, *options: str, words: tuple[str, ...] = (), **changes: Any
    ) -> str:
        """The job's id."""
        settings: dict[str, Any] = {"train__steps": STEPS, "metrics__progress": False}
        settings |= {"health__hang_timeout_seconds": 600} | changes
        return self.cluster.submit(
            *("--nodes=2", *SMALL, f"--output={self.output}", *options),
            str(ROOT / "slurm" / script),
            *(*words, *tiny_words(self.corpus, self.run_dir, **settings)),
            cwd=ROOT,
        )

    def wait(self, job_id: str) -> Job:
        """The job at its end."""
        return self.cluster.wait(job_id, seconds=240, output=self.output)

    def wait_for_step(self, step: int) -> None:
        """Return once a step was logged."""
        metrics, deadline = self.run_dir / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def wait_for_words(self, words: str) -> None:
        """Return once the job's output has them."""
        deadline = time.monotonic() + 120
        while words not in self.said():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def said(self) -> str:
        """The job's output so far."""
        return self.output.read_text() if self.output.exists() else "no output"

    def completed(self, job: Job) -> dict[int, float]:
        """The run's losses, once it is certain that it and the job ended well."""
        assert (job.state, job.exit_code) == ("COMPLETED", 0), self.said()
        status = json.loads((self.run_dir / "status.json").read_text())
        assert (status["state"], status["step"]) == ("completed", STEPS)
        return losses(self.run_dir)


@pytest.fixture
def jobs(slurm: Cluster, corpus: Path, tmp_path: Path) -> Jobs:
    return Jobs(slurm, corpus, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of two ranks that nothing stopped."""
    from spectral_scale.testing.distributed import run_distributed

    run_dir = tmp_path_factory.mktemp("undisturbed")
    words = tiny_words(corpus, run_dir, train__steps=STEPS)
    assert run_distributed(main, 2, ["train", *words], timeout_seconds=120) == [0, 0]
    return losses(run_dir)


def interrupted(
    jobs: Jobs, script: str, event: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> Job:
    """The end of a job to which `event` happened while it waited after step REACHED."""
    release = jobs.folder / "release"
    monkeypatch.setenv("HOLD_AFTER_STEP", str(REACHED))
    monkeypatch.setenv("HOLD_UNTIL_FILE", str(release))
    job_id = jobs.submit(script, "--signal=B:USR1@240")
    jobs.wait_for_step(REACHED)
    event(job_id)
    release.touch()
    return jobs.wait(job_id)


def resumed_at(jobs: Jobs) -> int:
    """The step at which the second start found a checkpoint: the one written when asked to stop."""
    log = (jobs.run_dir / "logs" / "rank_00000.log").read_text()
    (step,) = re.findall(r"resuming from step_\d+ at step (\d+)", log)
    return int(step)


def test_one_rank_a_task_with_preflight(
    jobs: Jobs, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTRAL_SCALE_PREFLIGHT", "1")
    job = jobs.wait(jobs.submit("pretrain.sbatch"))
    assert jobs.completed(job) == undisturbed
    said = jobs.said()
    assert "all-reduce" in said and said.index("all-reduce") < said.index("run complete")
    log = (jobs.run_dir / "logs" / "rank_00001.log").read_text()
    assert "rank 1 of 2" in log and "SLURM job" in log


def test_torchrun_saves_before_the_time_limit_and_goes_on(
    jobs: Jobs, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGUSR1 goes to the script, which would end torchrun if it reached it. The resumed run's
    weights are exported, and transformers loads them."""

    def near_the_limit(job_id: str) -> None:
        jobs.cluster.call("scontrol", "update", f"jobid={job_id}", "TimeLimit=4")
        jobs.wait_for_words("SIGUSR1")  # SLURM looks at time limits twice a minute
        jobs.cluster.call("scontrol", "update", f"jobid={job_id}", "TimeLimit=20")

    job = interrupted(jobs, "pretrain_torchrun.sbatch", near_the_limit, monkeypatch)
    assert jobs.completed(job) == undisturbed
    said = jobs.said()
    assert "SIGUSR1 (the time limit is near)" in said and "requeued" in said
    assert job.restarts == 1 and REACHED < resumed_at(jobs) < STEPS
    exported = str(jobs.folder / "exported")
    assert main(["export", str(jobs.run_dir), "--output", exported]) == 0
    logits = AutoModelForCausalLM.from_pretrained(exported)(torch.arange(16)[None]).logits
    assert logits.isfinite().all()


def test_mpirun_is_requeued_by_hand(
    jobs: Jobs, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = interrupted(
        jobs,
        "pretrain_mpi.sbatch",
        lambda job_id: jobs.cluster.call("scontrol", "requeue", job_id),
        monkeypatch,
    )
    assert jobs.completed(job) == undisturbed
    assert job.restarts == 1 and REACHED < resumed_at(jobs) < STEPS


def test_deepspeed_is_preempted_by_a_higher_partition(
    jobs: Jobs, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    other: list[str] = []
    job = interrupted(
        jobs,
        "pretrain_deepspeed.sbatch",
        lambda _: other.append(
            jobs.cluster.submit(
                *("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"),
                *("--wrap", "true"),
                cwd=jobs.folder,
            )
        ),
        monkeypatch,
    )
    assert jobs.completed(job) == undisturbed
    assert job.restarts == 1 and REACHED < resumed_at(jobs) < STEPS
    assert jobs.cluster.job(other[0]).state == "COMPLETED"


def test_an_array_trains_one_run_a_line(jobs: Jobs) -> None:
    sweep = jobs.folder / "sweep.txt"
    sweep.write_text("# seeds\n--train.seed 1 --train.steps 2\n\n--train.seed 2 --train.steps 3\n")
    options = ("--array=0-2", "--nodes=1", f"--output={jobs.folder}/%a.out")
    job_id = jobs.submit("array_sweep.sbatch", *options, words=(str(sweep),))
    ends = [jobs.wait(f"{job_id}_{task}") for task in range(3)]
    said = "\n".join((jobs.folder / f"{task}.out").read_text() for task in range(3))
    assert [end.exit_code for end in ends] == [0, 0, 78], said
    assert "2 lines of settings, none for task 2" in said
    found = [losses(jobs.run_dir / f"task_{task}") for task in range(2)]
    assert [max(f) for f in found] == [2, 3] and found[0][1] != found[1][1]


def command(jobs: Jobs, *options: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    """`spectral-scale slurm` for a CPU job of two nodes, submitted from the test's folder."""
    words = tiny_words(jobs.corpus, jobs.run_dir, train__steps=STEPS, **changes)
    cpus = ("--gpus-per-node=0", "--cpus-per-rank=1", "--time=10")
    return subprocess.run(
        [sys.executable, "-m", "spectral_scale", "slurm", "--nodes=2", *cpus, *options, *words],
        env=jobs.cluster.environment() | {"OMP_NUM_THREADS": "1"}, cwd=jobs.folder,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_submitted_job_that_fails_is_not_requeued(jobs: Jobs) -> None:
    """A configuration error, found by the ranks."""
    checked = command(jobs, "--test-only")
    assert checked.returncode == 0 and "to start at" in checked.stderr, checked.stderr
    refused = command(jobs, "--test-only", "--partition=none")
    assert refused.returncode != 0 and "invalid partition" in refused.stderr
    done = command(jobs, "--submit", data__train=str(jobs.folder / "nowhere"))
    assert done.returncode == 0, done.stderr
    job_id = done.stdout.split()[-1]
    jobs.output = jobs.folder / f"spectral_scale-{job_id}.out"
    job = jobs.wait(job_id)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 78, 0), jobs.said()
    assert "nowhere: no such token folder" in jobs.said() and not jobs.run_dir.exists()


def test_deepspeed_s_own_slurm_launcher(
    jobs: Jobs, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It calls srun, and sets no rank variables."""
    hosts = jobs.folder / "hostfile"
    hosts.write_text("n1 slots=1\nn2 slots=1\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    where = ["--hostfile", str(hosts), "--launcher", "slurm", "--no_ssh_check", "--force_multi"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "deepspeed.launcher.runner", *where),
            *("--master_addr", "127.0.0.1", str(ROOT / "launch" / "pretrain.py")),
            *tiny_words(jobs.corpus, jobs.run_dir, train__steps=STEPS),
        ],
        env=jobs.cluster.environment(), cwd=jobs.folder,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(jobs.run_dir) == undisturbed
    log = (jobs.run_dir / "logs" / "rank_00001.log").read_text()
    assert "from a SLURM step" in log
