"""Job scripts, DeepSpeed files and the quickstart are in the wheel, and are found there."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built from a copy so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(
        ["git", "ls-files", "-z", "spectral_scale", "slurm", "ds_configs", "launch", "*.toml"]
        + ["README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
    subprocess.run([sys.executable, *build, source], check=True, timeout=200)
    return next(folder.glob("*.whl"))


def test_the_wheel_has_what_lies_beside_the_package(wheel: Path) -> None:
    names = {
        name.rpartition("share/spectral_scale/")[2] for name in zipfile.ZipFile(wheel).namelist()
    }
    shipped = [*ROOT.glob("slurm/*"), *ROOT.glob("ds_configs/*"), ROOT / "launch/quickstart.yaml"]
    assert {str(path.relative_to(ROOT)) for path in shipped if path.is_file()} <= names


def test_an_installed_wheel_renders_job_scripts(wheel: Path, tmp_path: Path) -> None:
    """Without a checkout: the scripts come from where the wheel put them."""
    target = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run([sys.executable, *install], check=True, timeout=200)
    program = (
        "import sysconfig, sys; real = sysconfig.get_path\n"
        f"sysconfig.get_path = lambda name: {str(target)!r} if name == 'data' else real(name)\n"
        "from spectral_scale.cli.main import main\n"
        "sys.exit(main(['slurm', '--model.name=opt-125m', '--model.sequence_length=512', '--print',"
        " '--nodes=1', '--gpus-per-node=4']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert f"SPECTRAL_SCALE_SLURM={target / 'share' / 'spectral_scale' / 'slurm'}" in done.stdout
