"""Rendered job scripts, and the rules that those of slurm/ keep."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from spectral_scale.cli.main import main
from spectral_scale.cluster.sbatch import FOLDER, MARK, SCRIPTS, render
from spectral_scale.errors import ConfigError

ALL = sorted(FOLDER.glob("*.sbatch"))
MODEL = ["--model.name=opt-125m", "--model.sequence_length=512"]


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.name)
def test_every_script_can_survive(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for line in ("--requeue", "--open-mode=append", "--signal=B:USR1@120"):
        assert f"#SBATCH {line}\n" in text
    assert MARK in text and text.rstrip().endswith('conclude "$@"')
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    # Early interpolation would make every node the first: never in double quotes.
    assert not re.search(r'"[^"\']*bash -c "[^\']*SLURM_NODEID', text)


def test_all_scripts_are_rendered_or_an_array() -> None:
    assert {p.name for p in ALL} == {*SCRIPTS.values(), "array_sweep.sbatch"}
    assert (FOLDER / "env.sh").read_text().count("# SITE:") >= 5


def test_only_env_sh_has_site_values() -> None:
    for path in [*ALL, FOLDER / "common.sh"]:
        assert "SITE" not in path.read_text() and "module load" not in path.read_text()


def submitted(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["slurm", *MODEL, *words]) == 0
    return capsys.readouterr().out


def test_a_rendered_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "a run's.yaml"
    config.write_text("train: {global_batch_size: 64, micro_batch_size: 2}\n")
    options = ["--nodes", "2", "--gpus-per-node", "4", "--partition", "gpu", "--time", "1:00:00"]
    run_dir = str(tmp_path / "it's `HOME` $")
    words = ["--config", str(config), *options, "--train.run_dir", run_dir]
    text = submitted(words, capsys)
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=16",
                 "partition=gpu", "time=1:00:00"):  # fmt: skip
        assert text.count(f"#SBATCH --{line}\n") == 1
    assert text.count("#SBATCH --nodes") == text.count("#SBATCH --time") == 1
    assert MARK not in text and f"export SPECTRAL_SCALE_SLURM={FOLDER}" in text
    settings = text[text.index("export SPECTRAL_SCALE_SLURM") : text.index("set -u")]
    shown = subprocess.run(
        ["bash", "-c", settings + 'printf "%s\\n" "$@"'], capture_output=True, text=True, check=True
    )
    # sbatch's own options are not the run's
    assert shown.stdout.splitlines() == [
        "--config", str(config), *MODEL, "--train.run_dir", run_dir,
    ]  # fmt: skip


def test_launchers_of_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--train.global_batch_size=64", "--gpus-per-node", "8"]
    text = submitted([*words, "--launcher", "torchrun"], capsys)
    assert "#SBATCH --ntasks-per-node=1\n" in text and "#SBATCH --cpus-per-task=128\n" in text
    text = submitted([*words, "--launcher", "mpi"], capsys)
    assert "#SBATCH --ntasks-per-node=8\n" in text and "mpirun" in text


def test_what_cannot_run_is_not_submitted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    big = ["--model.name=opt-30b", "--model.sequence_length=2048", "--train.global_batch_size=64"]
    assert main(["slurm", *big, "--submit"]) == 78
    assert "does not fit; use more GPUs" in capsys.readouterr().err
    assert main(["slurm", *big, "--submit", "--force"]) == 78
    assert "sbatch is not installed" in capsys.readouterr().err
    assert main(["slurm", *MODEL, "--train.global_batch_size=9"]) == 78
    assert "not divisible" in capsys.readouterr().err
    assert main(["slurm", *MODEL, "--ranks-per-node", "3"]) == 78
    assert "a rank has one GPU" in capsys.readouterr().err


def test_values_stay_on_their_line(tmp_path: Path) -> None:
    nothing: dict[str, str] = {}
    with pytest.raises(ConfigError, match="one line"):
        render("srun", header={"account": "a\n#SBATCH --x"}, arguments=[], environment=nothing)
    with pytest.raises(ConfigError, match="one line"):
        render("srun", header={}, arguments=[], environment={"A": "b\nc"})
    with pytest.raises(ConfigError, match="from its wheel or its checkout"):
        render("srun", header={}, arguments=[], environment=nothing, folder=tmp_path)
