"""DeepSpeedCPUAdam steps offloaded state: the numbers of torch's AdamW, and bit-exact resume."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spectral_scale.backends.deepspeed import optimizer_state as zero_steps
from spectral_scale.backends.deepspeed.cpu_adam import offloaded_adam
from spectral_scale.config.resolve import resolve
from spectral_scale.errors import ConfigError
from spectral_scale.parallel.collective import SingleProcess
from spectral_scale.testing.distributed import run_distributed
from spectral_scale.testing.equivalence import distance
from spectral_scale.testing.tiny import tiny_config, train_in_turn, train_tiny

SHIPPED = Path(__file__).parents[2] / "ds_configs"
STEPS, STOP = 10, 6  # swaps after 4 and 8, the second with a re-SVD; stopped inside an iteration
BUILD = "from deepspeed.ops.op_builder import CPUAdamBuilder as B; B().load()"


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> None:
    """Compile the op, once for all processes and for later runs of the tests on this machine."""
    missing = [tool for tool in ("c++", "ninja") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"DeepSpeedCPUAdam cannot be compiled: no {', '.join(missing)}")
    done = subprocess.run(
        [sys.executable, "-c", BUILD], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def run_of(corpus: Path, run_dir: Path, stage: int | None, **changes: Any) -> Any:
    """On plain torch, or on the shipped file of an offloaded stage."""
    settings: dict[str, Any] = {"train__steps": STEPS, "optimizer__eps": 1e-5}
    settings |= {"train__micro_batch_size": 3, "optimizer__clip_grad_norm": 0.1}
    if stage is not None:
        path = SHIPPED / f"zero{stage}_offload.json"
        settings |= {"parallel__backend": "deepspeed", "parallel__deepspeed_config": str(path)}
    return tiny_config(corpus, run_dir, **(settings | changes))


@pytest.mark.timeout(900)  # the first time on a machine the op is compiled
@pytest.mark.usefixtures("built")
def test_equals_one_process_and_resumes_bit_exactly(corpus: Path, tmp_path: Path) -> None:
    alone = run_distributed(train_tiny, 1, run_of(corpus, tmp_path / "alone", None))[0]
    runs = []
    for stage in (2, 3):
        straight, broken = (run_of(corpus, tmp_path / f"{stage}{c}", stage) for c in "ab")
        runs += [(straight, None), (broken, STOP), (broken, None)]
    ranks = run_distributed(train_in_turn, 2, runs, timeout_seconds=200)
    for first, stage in ((0, 2), (3, 3)):
        found = distance([rank[first] for rank in ranks], alone)
        assert found.loss < 1e-5 and found.weights < 1e-3, found
        assert found.steps_equal and found.indices_equal, found
        resolved = json.loads((tmp_path / f"{stage}a" / "ds_config.json").read_text())
        assert resolved["zero_force_ds_cpu_optimizer"] is True
        assert is_same_after_resume(ranks, first)


def is_same_after_resume(ranks: list[Any], first: int) -> bool:
    """Whether a run and the same run stopped and resumed have the same losses and tensors."""
    straight, stopped, resumed = ranks[0][first : first + 3]
    assert stopped["step"] == STOP
    if stopped["losses"] | resumed["losses"] != straight["losses"]:
        return False
    return all(
        np.array_equal(rank[first + 2]["tensors"][name], value)
        for rank in ranks
        for name, value in rank[first]["tensors"].items()
        if "frozen/" not in name
    )


def train_with_memory(runs: list[Any]) -> list[dict[str, Any]]:
    """Let the op multiply up its powers of the betas, as it does by itself."""
    zero_steps.forget_powers = lambda *_: None  # type: ignore[assignment]
    return train_in_turn(runs)


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("built")
def test_powers_that_are_remembered_would_show(corpus: Path, tmp_path: Path) -> None:
    one = {"train__micro_batch_size": 6, "spectral__method": "full", "optimizer__eps": 1e-8}
    straight, broken = (run_of(corpus, tmp_path / c, 2, **one) for c in "ab")
    runs = [(straight, None), (broken, STOP), (broken, None)]
    ranks = run_distributed(train_with_memory, 1, runs, timeout_seconds=200)
    assert not is_same_after_resume(ranks, 0)


# -- where it cannot be had ----------------------------------------------------------------------


def without_compiler() -> Any:
    """What importing deepspeed gives, on a machine that cannot build its op."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the op failed to build") from OSError("no C++ compiler")

    return SimpleNamespace(ops=SimpleNamespace(adam=SimpleNamespace(DeepSpeedCPUAdam=fail)))


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], tuple[Any, Any]]:
    def choose(wanted: Any) -> tuple[Any, Any]:
        adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
        host = without_compiler()
        return adamw, offloaded_adam(host, adamw, SingleProcess(), wanted=wanted)

    return choose


def test_auto_falls_back_and_says_so(choose: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        adamw, found = choose("auto")
    assert found is adamw
    assert "torch's AdamW, which is slower, because" in caplog.text
    assert "no C++ compiler" in caplog.text


def test_a_demand_that_cannot_be_met_is_an_error(choose: Any) -> None:
    with pytest.raises(ConfigError, match=r"force_ds_cpu_optimizer=true, but .*no C\+\+ compiler"):
        choose(True)


def test_false_keeps_torchs(choose: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        adamw, found = choose(False)
    assert found is adamw
    assert "optimizer on the CPU: torch's AdamW" in caplog.text


def test_the_lock_of_a_killed_build_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choose: Any
) -> None:
    """torch would wait for it for ever."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    choose("auto")
    assert not lock.exists()


def test_other_values_are_refused(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_force_ds_cpu_optimizer": "yes"}')
    config = run_of(corpus, tmp_path, 2, parallel__deepspeed_config=str(path))
    with pytest.raises(ConfigError, match=r'="yes" must be true, false or "auto"'):
        resolve(config, world_size=2)
