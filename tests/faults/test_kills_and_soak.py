"""Small versions of what benchmarks/ shows at length, and damage that one real rank sees."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ranks import Ranks

from spectral_scale.checkpoint import reader
from spectral_scale.metrics.history import load_history

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SEEDS = (0, 4, 9)
"""One process; two ranks, saving at once; two ranks, saving in the background."""


def run(script: str, *words: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_kills_during_saves() -> None:
    for seed in SEEDS:
        found = run("kill_during_save.py", "--seeds", "1", "--first", str(seed))
        assert found["bit_identical_resumes"] == found["killed_in_a_save"] == 1


def test_a_short_soak(tmp_path: Path) -> None:
    words = ("--steps", "200", "--mean-seconds", "4", "--seed", "1", "--output", str(tmp_path))
    found = run("soak.py", *words)
    assert found["different"] == [] and found["starts"] > 1
    lines = (tmp_path / "undisturbed" / "incidents.jsonl").read_text().splitlines()
    kinds = {json.loads(line)["kind"] for line in lines}
    assert kinds == {"skipped step", "rollback"}


def sees_damage(rank: int) -> None:
    """Rank 1's disk gives other bytes of the newest checkpoint than the others'."""
    original = reader.hash_file

    def hash_file(path: Path) -> str:
        wrong = rank == 1 and path.parent.name == "step_00000004"
        return "0" * 64 if wrong else original(path)

    reader.hash_file = hash_file


def test_damage_that_one_real_rank_sees(corpus: Path, tmp_path: Path) -> None:
    """Both ranks go on from the checkpoint before, and write the damaged one again."""
    changes = {"checkpoint__interval": 2, "checkpoint__keep_last": 3, "train__steps": 4}
    with Ranks(corpus, tmp_path, **changes) as ranks:
        assert ranks.exit_codes() == [0, 0], ranks.output()
    with Ranks(corpus, tmp_path, before=sees_damage, **changes | {"train__steps": 6}) as ranks:
        codes = ranks.exit_codes()
        assert codes == [0, 0], ranks.output()
    assert load_history(tmp_path).resume_steps() == [2]
    log = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert "step_00000004 is not usable and is passed over: rank 1:" in log
