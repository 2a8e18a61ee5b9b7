"""torchrun starts the ranks again after one died: the run goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from ranks import Ranks, losses

from spectral_scale.metrics.history import load_history
from spectral_scale.testing.tiny import tiny_words

SCRIPT = """
import os, signal, sys
from spectral_scale.cli.main import main
from spectral_scale.engine import loop
from pathlib import Path

once = Path(sys.argv.pop(1))
product = loop.TrainingLoop._forward_backward

def forward_backward(self, batch):
    if self.step == 6 and os.environ["RANK"] == "1" and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return product(self, batch)

loop.TrainingLoop._forward_backward = forward_backward
sys.exit(main(["train", *sys.argv[1:]]))
"""
CHANGES = {
    "model__num_layers": 1,
    "train__steps": 9,
    "train__micro_batch_size": 3,
    "train__eval_interval": 100,
    "checkpoint__interval": 4,
    "metrics__progress": False,
}


def test_a_rank_that_dies_once(corpus: Path, tmp_path: Path) -> None:
    script = tmp_path / "train_and_die.py"
    script.write_text(SCRIPT)
    words = tiny_words(corpus, tmp_path / "run", **CHANGES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    command += ["--nproc-per-node=2", str(script), str(tmp_path / "died"), *words]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert (tmp_path / "died").exists()
    assert load_history(tmp_path / "run").resume_steps() == [4]
    with Ranks(corpus, tmp_path / "alone", **CHANGES) as ranks:
        assert ranks.exit_codes() == [0, 0], ranks.output()
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")
