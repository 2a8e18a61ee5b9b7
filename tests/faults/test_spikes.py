"""The spike rule in a whole run of two real ranks: one rank's spike is left out by both."""

import json
import math
import sys
from pathlib import Path

from ranks import Ranks, change_loss

from spectral_scale.metrics.history import load_history

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from soak import differences

AT = 9
"""The step, after a full window of healthy ones and in the middle of an iteration."""


def spike(rank: int) -> None:
    """A hundred times the loss, and the gradient, of one rank."""
    change_loss(rank, {(1, AT)}, lambda loss: loss * 100)


def not_finite(rank: int) -> None:
    """The same step, left out by the older rule and because of the other rank."""
    change_loss(rank, {(0, AT)}, lambda loss: loss * math.nan)


def test_one_rank_s_spike_is_left_out_by_both(corpus: Path, tmp_path: Path) -> None:
    """Nothing of it is left: the run ends with the bits of one whose step AT was not finite."""
    changes = {"health__spike_sigmas": 8, "health__spike_window": 16, "health__replica_interval": 1}
    for before in (spike, not_finite):
        run_dir = tmp_path / before.__name__
        with Ranks(corpus, run_dir, before=before, train__steps=12, **changes) as ranks:
            assert ranks.exit_codes() == [0, 0], ranks.output()
    lines = load_history(tmp_path / "spike").current()
    left_out = {x["step"]: x["health/skipped"] for x in lines if "health/skipped" in x}
    assert left_out.keys() == {AT} and left_out[AT].startswith("loss "), left_out
    incident = json.loads((tmp_path / "spike" / "incidents.jsonl").read_text())
    assert (incident["kind"], incident["step"]) == ("skipped step", AT) and incident["samples"]
    assert differences(tmp_path / "spike", tmp_path / "not_finite") == []
