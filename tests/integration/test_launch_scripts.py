"""launch/quickstart and launch/selftest against stub commands: no environment is really made.

The stubs stand on a PATH of their own. `python3 -m venv` makes a folder with a stub `python`
whose `-m pip`, `-m pytest` and `-m spectral_scale` only note how they were called.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTEST = "pytest --numprocesses auto --dist loadfile"
"""How `launch/selftest` calls pytest."""
COPIED = (
    *("launch/_setup.sh", "launch/quickstart", "launch/selftest", "launch/quickstart.yaml"),
    *(".ci/run", "pyproject.toml", "constraints.txt"),
)
TOOLS = (
    *("bash", "dirname", "awk", "mv", "rm", "grep", "tail", "sed", "cat", "mkdir", "chmod", "cp"),
    *("flock", "sleep", "true"),
)

BASE_PYTHON = """#!/usr/bin/env bash
if [[ "$1 $2" == "-m venv" ]]; then
    echo "venv $*" >> "$CALLS"
    [[ -z "${BROKEN_VENV:-}" ]] || { echo "no room for a venv"; exit 1; }
    folder="${!#}"
    rm -rf "$folder"
    mkdir -p "$folder/bin"
    cp "$VENV_PYTHON" "$folder/bin/python"
    exit
fi
exec "$REAL_PYTHON" -S "$@"
"""
VENV_PYTHON = """#!/usr/bin/env bash
if [[ "$*" == "-m pip --version" ]]; then exit; fi
if [[ "$*" == *--dry-run* ]]; then echo "$DRY_RUN_REPORT"; exit; fi
if [[ "$1" == "-m" ]]; then
    echo "${*:2}" >> "$CALLS"
    [[ "$2" != pip ]] || sleep "${PIP_SECONDS:-0}"
    [[ "$2" == pip ]] || flock --nonblock launch/_setup.sh true || echo "still locked" >> "$CALLS"
    [[ "$2" == pip ]] && { [[ -z "${PIP_SAYS:-}" ]] || echo "$PIP_SAYS"; exit "${PIP_EXIT:-0}"; }
    exit "${RUN_EXIT:-0}"
fi
if [[ "$1" == -c && "$2" == *importlib.metadata* ]]; then echo "$TORCH_VERSION"; exit; fi
if [[ "$1" == -c && "$2" == *is_available* ]]; then exit "${CUDA_UNUSABLE:-0}"; fi
if [[ "$1" == - && "${2:-}" == http* ]]; then exit "${INDEX_DOWN:-0}"; fi
exec "$REAL_PYTHON" -S "$@"
"""
OLD_PYTHON = "#!/usr/bin/env bash\necho 3.9.2\n"
WITHOUT_VENV = """#!/usr/bin/env bash
if [[ "$1" == -c ]]; then echo 3.12; else echo no-venv; fi
"""
FULL_DISK = """#!/usr/bin/env bash
echo "Filesystem 1024-blocks Used Available Capacity Mounted on"
echo "/dev/x 100000000 99000000 524288 99% /"
"""
ROOMY_DISK = FULL_DISK.replace("524288", "52428800")
SOME_SPACE = FULL_DISK.replace("524288", "5242880")


def gpu(driver: str = "580.82.07", *capabilities: str, tells_capability: bool = True) -> str:
    """An nvidia-smi of a machine with GPUs, 9.0 by default."""
    asks = "driver_version,compute_cap" if tells_capability else "driver_version"
    lines = [f"{driver}, {c}" if tells_capability else driver for c in capabilities or ("9.0",)]
    told = "\n".join(lines)
    return f"""#!/usr/bin/env bash
if [[ "$*" == -L ]]; then echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'; exit; fi
if [[ "$*" == *--query-gpu={asks} ]]; then echo '{told}'; exit; fi
echo 'Field is not a valid field to query.'; exit 2
"""


GPU = gpu()
NO_GPU = "#!/usr/bin/env bash\necho 'No devices found.'; exit 6\n"
CUDA_REPORT = '{"install": [{"metadata": {"name": "nvidia-cublas"}}]}'
CPU_REPORT = '{"install": [{"metadata": {"name": "torch"}}]}'


@dataclass
class Checkout:
    """A copy of the scripts, a PATH of stubs, and a note of every call."""

    root: Path
    bin: Path
    environment: dict[str, str]

    def stub(self, name: str, text: str) -> None:
        """Put a command on the PATH."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, script: str, *arguments: str, cwd: Path | None = None, **environment: str):
        """Run one of the scripts; the environment holds nothing else."""
        return subprocess.run(
            [str(self.root / script), *arguments],
            cwd=cwd or self.root,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[str]:
        """What was called since the last time this was asked."""
        noted = Path(self.environment["CALLS"])
        lines = noted.read_text().splitlines() if noted.exists() else []
        noted.write_text("")
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root, folder = tmp_path / "a checkout", tmp_path / "bin"
    for name in COPIED:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(str(shutil.which(tool)))
    venv_python = tmp_path / "venv_python"
    venv_python.write_text(VENV_PYTHON)
    venv_python.chmod(0o755)
    environment = {
        "PATH": str(folder),
        "CALLS": str(tmp_path / "calls"),
        "REAL_PYTHON": os.path.realpath(sys.executable),
        "VENV_PYTHON": str(venv_python),
        "TORCH_VERSION": "2.13.0+cpu",
        "DRY_RUN_REPORT": CPU_REPORT,
    }
    made = Checkout(root, folder, environment)
    made.stub("python3", BASE_PYTHON)
    made.stub("df", ROOMY_DISK)
    return made


@pytest.mark.parametrize("name", [*COPIED[:3], ".ci/run"])
def test_scripts_parse(name):
    subprocess.run(["bash", "-n", ROOT / name], check=True)


def installs(calls: list[str]) -> list[str]:
    """The calls of pip that install."""
    return [call for call in calls if call.startswith("pip install")]


def test_first_run_makes_the_environment_then_trains(checkout):
    done = checkout.run("launch/quickstart", "--train.steps", "5")
    assert done.returncode == 0, done.stderr
    venv, install, train = checkout.calls()
    assert venv == f"venv -m venv --clear {checkout.root}/.venv"
    assert "--constraint constraints.txt --extra-index-url https://download.pytorch" in install
    assert install.endswith("--editable .")
    assert train == "spectral_scale train --config launch/quickstart.yaml --train.steps 5"


def test_second_run_installs_nothing_from_any_folder(checkout, tmp_path):
    checkout.run("launch/quickstart")
    checkout.calls()
    done = checkout.run("launch/quickstart", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert checkout.calls() == ["spectral_scale train --config launch/quickstart.yaml"]


def test_a_matching_stamp_needs_no_other_python_disk_or_network(checkout):
    checkout.run("launch/selftest")
    checkout.calls()
    (checkout.bin / "python3").unlink()
    checkout.stub("df", FULL_DISK)
    assert checkout.run("launch/selftest", "-k", "bank", PIP_EXIT="1").returncode == 0
    assert checkout.calls() == [f"{PYTEST} -k bank"]


def test_selftest_runs_the_fast_tier_alone(checkout):
    checkout.run("launch/selftest", "--fast", "-k", "bank")
    assert checkout.calls()[-1] == f"{PYTEST} -m fast -k bank"


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_is_installed_into_the_same_environment(checkout, name):
    checkout.run("launch/quickstart")
    checkout.calls()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    checkout.run("launch/quickstart")
    install, _ = checkout.calls()
    assert install.startswith("pip install")


def test_selftest_adds_the_test_packages_and_serves_quickstart_too(checkout):
    checkout.run("launch/quickstart")
    checkout.calls()
    checkout.run("launch/selftest")
    install, run = checkout.calls()
    assert install.endswith("--editable .[test]")
    assert run == PYTEST
    checkout.run("launch/quickstart")
    assert installs(checkout.calls()) == []


@pytest.mark.parametrize("script", ["launch/selftest", ".ci/run"])
@pytest.mark.parametrize("code", [1, 5])
def test_a_failing_suite_fails_the_command(checkout, script, code):
    assert checkout.run(script, RUN_EXIT=str(code)).returncode == code


def test_schedulers_are_installed_only_for_ci_and_root(checkout):
    """And a failure of that skips their tests, it does not fail the suite."""
    checkout.run("launch/selftest")
    checkout.stub("apt-get", '#!/usr/bin/env bash\necho "apt-get $1" >> "$CALLS"; exit 1\n')
    checkout.calls()
    assert checkout.run(".ci/run").returncode == 0
    assert checkout.calls() == [PYTEST]
    done = checkout.run(".ci/run", CI="true")
    assert done.returncode == 0
    tried = ["apt-get install", "apt-get update"] if os.geteuid() == 0 else []
    assert checkout.calls() == [*tried, PYTEST]
    assert ("could not be installed; their tests skip" in done.stderr) is bool(tried)


def test_the_exit_code_of_training_is_passed_on(checkout):
    assert checkout.run("launch/quickstart", RUN_EXIT="75").returncode == 75


def test_half_made_environment_is_replaced(checkout):
    (checkout.root / ".venv" / "bin").mkdir(parents=True)
    (checkout.root / ".venv" / "bin" / "python").symlink_to("/nowhere/python3.11")
    done = checkout.run("launch/quickstart")
    assert done.returncode == 0, done.stderr
    assert checkout.calls()[0].startswith("venv ")


def test_interrupted_installation_is_repeated_in_the_same_environment(checkout):
    assert checkout.run("launch/quickstart", PIP_EXIT="1").returncode == 1
    assert len(checkout.calls()) == 2
    done = checkout.run("launch/quickstart")
    assert done.returncode == 0, done.stderr
    install, _ = checkout.calls()
    assert install.startswith("pip install")


def test_moved_checkout_gets_a_new_environment(checkout, tmp_path):
    checkout.run("launch/quickstart")
    checkout.calls()
    moved = Checkout(tmp_path / "moved", checkout.bin, checkout.environment)
    checkout.root.rename(moved.root)
    assert moved.run("launch/quickstart").returncode == 0
    assert moved.calls()[0] == f"venv -m venv --clear {moved.root}/.venv"


def test_environment_of_the_user_is_kept(checkout):
    (checkout.root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(checkout.environment["VENV_PYTHON"], checkout.root / ".venv" / "bin" / "python")
    checkout.run("launch/quickstart")
    assert not [call for call in checkout.calls() if call.startswith("venv")]


def test_no_python_is_explained(checkout):
    (checkout.bin / "python3").unlink()
    done = checkout.run("launch/quickstart")
    assert done.returncode == 1
    assert "error: no Python 3.11 or newer was found" in done.stderr
    assert "PYTHON=/path/to/python3.12" in done.stderr
    assert checkout.calls() == []


def test_old_python_is_named_and_a_newer_one_is_found(checkout):
    checkout.stub("python3", OLD_PYTHON)
    done = checkout.run("launch/quickstart")
    assert done.returncode == 1
    assert "python3 is 3.9.2" in done.stderr
    checkout.stub("python3.12", BASE_PYTHON)
    assert checkout.run("launch/quickstart").returncode == 0


def test_named_python_is_the_only_one_tried(checkout, tmp_path):
    named = tmp_path / "my python"
    named.write_text(BASE_PYTHON)
    named.chmod(0o755)
    (checkout.bin / "python3").unlink()
    assert checkout.run("launch/quickstart", PYTHON=str(named)).returncode == 0
    shutil.rmtree(checkout.root / ".venv")
    checkout.stub("python3", BASE_PYTHON)
    done = checkout.run("launch/quickstart", PYTHON="/nowhere/python")
    assert done.returncode == 1
    assert "/nowhere/python" in done.stderr


def test_missing_venv_module_is_explained(checkout):
    checkout.stub("python3", WITHOUT_VENV)
    done = checkout.run("launch/quickstart")
    assert done.returncode == 1
    assert "error: python3 (Python 3.12) has no venv module" in done.stderr
    assert "apt install python3.12-venv" in done.stderr


def test_failing_venv_is_explained(checkout):
    done = checkout.run("launch/quickstart", BROKEN_VENV="1")
    assert done.returncode == 1
    assert "could not make the virtual environment" in done.stderr
    assert "no room for a venv" in done.stderr


def test_full_disk_is_explained_before_anything_is_made(checkout):
    checkout.stub("df", FULL_DISK)
    done = checkout.run("launch/quickstart")
    assert done.returncode == 1
    assert "error: not enough disk space" in done.stderr
    assert "512 MB are free" in done.stderr
    assert not (checkout.root / ".venv").exists()


def test_no_network_shows_the_log_and_where_it_is(checkout):
    says = "first line\n" + "noise\n" * 20 + "NewConnectionError: Temporary failure\nERROR: last"
    done = checkout.run("launch/selftest", PIP_EXIT="1", PIP_SAYS=says)
    assert done.returncode == 1
    assert "error: installing failed: no package index could be reached" in done.stderr
    assert "ERROR: last" in done.stderr
    assert "first line" not in done.stderr
    log = checkout.root / ".venv" / "install.log"
    assert str(log) in done.stderr
    assert "first line" in log.read_text()
    assert PYTEST not in checkout.calls()


def test_disk_full_while_installing_is_named(checkout):
    says = "ERROR: Could not install packages: [Errno 28] No space left on device"
    done = checkout.run("launch/quickstart", PIP_EXIT="1", PIP_SAYS=says)
    assert "error: installing failed: no space left on the disk" in done.stderr


def test_unknown_fault_of_pip_is_not_called_a_network_fault(checkout):
    done = checkout.run("launch/quickstart", PIP_EXIT="1", PIP_SAYS="ERROR: invalid metadata")
    assert "error: installing failed. The last lines" in done.stderr


def test_cpu_index_out_of_reach_leaves_pip_its_own_sources(checkout):
    done = checkout.run("launch/quickstart", INDEX_DOWN="1")
    assert done.returncode == 0
    (install,) = installs(checkout.calls())
    assert "--extra-index-url" not in install
    assert "CUDA build" not in done.stderr


def test_cuda_packages_on_a_cpu_machine_are_announced_and_need_space(checkout):
    done = checkout.run("launch/quickstart", INDEX_DOWN="1", DRY_RUN_REPORT=CUDA_REPORT)
    assert done.returncode == 0
    assert "offer only the CUDA build of torch: 1 more packages" in done.stderr
    shutil.rmtree(checkout.root / ".venv")
    checkout.calls()
    checkout.stub("df", SOME_SPACE)
    done = checkout.run("launch/quickstart", INDEX_DOWN="1", DRY_RUN_REPORT=CUDA_REPORT)
    assert done.returncode == 1
    assert "not enough disk space" in done.stderr
    assert installs(checkout.calls()) == []


def test_gpu_takes_the_cuda_build(checkout):
    checkout.stub("nvidia-smi", GPU)
    done = checkout.run("launch/quickstart", TORCH_VERSION="2.13.0+cu130")
    assert done.returncode == 0
    assert "cu130 build of torch" in done.stderr
    calls = checkout.calls()
    assert "download.pytorch.org" not in " ".join(calls)
    assert not [call for call in calls if "uninstall" in call]


@pytest.mark.parametrize(
    ("driver", "capabilities", "tells", "build"),
    [
        ("580.65.06", ["9.0"], True, "cu130"),
        ("590.44.01", ["10.0"], True, "cu130"),
        ("610.1", ["8.0"], False, "cu130"),
        ("580.65.05", ["9.0"], True, "cu126"),
        ("570.195.03", ["8.0"], True, "cu126"),
        ("525.60.13", ["8.0"], False, "cu126"),
        ("580.82.07", ["7.0"], True, "cu126"),  # CUDA 13 has no code for a V100
        ("580.82.07", ["9.0", "7.0"], True, "cu126"),
        ("[N/A]", ["9.0"], True, "cu130"),
        ("525.60.12", ["8.0"], True, "cpu"),
        ("470.256.02", ["8.0"], False, "cpu"),
        ("570.195.03", ["10.0"], True, "cpu"),  # CUDA 12.6 has no code for a B200
        ("580.82.07", ["10.0", "7.0"], True, "cpu"),
    ],
)
def test_the_build_fits_driver_and_gpus(checkout, driver, capabilities, tells, build):
    checkout.stub("nvidia-smi", gpu(driver, *capabilities, tells_capability=tells))
    done = checkout.run("launch/quickstart", TORCH_VERSION="")
    assert done.returncode == 0, done.stderr
    assert f"{build} build of torch" in done.stderr
    _, install, _ = checkout.calls()
    index = f"--extra-index-url https://download.pytorch.org/whl/{build} "
    assert (index in install) is (build != "cu130")
    assert install.count("--extra-index-url") == (build != "cu130")
    assert ("is too old for every CUDA build of torch 2.13.0" in done.stderr) is (build == "cpu")
    if build == "cpu":
        assert "  cu130 580.65.06\n  cu126 525.60.13\n" in done.stderr
    checkout.run("launch/quickstart")
    assert installs(checkout.calls()) == []


def test_an_older_build_that_cannot_be_reached_ends_before_the_wrong_one_is_loaded(checkout):
    checkout.stub("nvidia-smi", gpu("570.195.03"))
    done = checkout.run("launch/quickstart", INDEX_DOWN="1")
    assert done.returncode == 1
    assert "error: https://download.pytorch.org/whl/cu126, which has the build" in done.stderr
    assert "SPECTRAL_SCALE_TORCH=cpu" in done.stderr
    assert installs(checkout.calls()) == []
    done = checkout.run("launch/quickstart", INDEX_DOWN="1", SPECTRAL_SCALE_TORCH="cpu")
    assert done.returncode == 0 and "cpu build of torch" in done.stderr


def test_a_build_that_is_asked_for_is_taken(checkout):
    checkout.stub("nvidia-smi", GPU)
    done = checkout.run("launch/quickstart", SPECTRAL_SCALE_TORCH="cu126", TORCH_VERSION="2.13.0")
    assert "cu126 build of torch" in done.stderr
    _, uninstall, install, _ = checkout.calls()
    assert uninstall == "pip uninstall --yes torch" and "whl/cu126" in install
    done = checkout.run("launch/quickstart", SPECTRAL_SCALE_TORCH="cu118")
    assert done.returncode == 1
    assert "SPECTRAL_SCALE_TORCH=cu118 is no build of torch 2.13.0" in done.stderr
    assert "cpu cu130 cu126" in done.stderr


@pytest.mark.parametrize(
    ("installed", "driver", "replaced"),
    [
        ("2.13.0", "580.82.07", False),
        ("2.13.0+cu130", "580.82.07", False),
        ("2.13.0+cu126", "580.82.07", True),
        ("2.13.0+cu126", "570.195.03", False),
        ("2.13.0", "570.195.03", True),
        ("2.13.0+cpu", "570.195.03", True),
    ],
)
def test_another_build_of_torch_is_replaced(checkout, installed, driver, replaced):
    checkout.stub("nvidia-smi", gpu(driver))
    checkout.run("launch/quickstart", TORCH_VERSION=installed)
    assert ("pip uninstall --yes torch" in checkout.calls()) is replaced


def test_listing_no_gpu_takes_the_cpu_build(checkout):
    checkout.stub("nvidia-smi", NO_GPU)
    assert "cpu build of torch" in checkout.run("launch/quickstart").stderr


def test_gpu_that_joined_later_replaces_the_cpu_build_once(checkout):
    checkout.run("launch/quickstart")
    checkout.calls()
    checkout.stub("nvidia-smi", GPU)
    checkout.run("launch/quickstart")
    uninstall, install, _ = checkout.calls()
    assert uninstall == "pip uninstall --yes torch"
    assert "--extra-index-url" not in install
    checkout.run("launch/quickstart")
    assert len(checkout.calls()) == 1
    checkout.stub("nvidia-smi", NO_GPU)  # a login node that shares the checkout
    checkout.run("launch/quickstart")
    assert len(checkout.calls()) == 1


def test_gpu_that_torch_cannot_use_is_said(checkout):
    checkout.stub("nvidia-smi", GPU)
    done = checkout.run("launch/quickstart", CUDA_UNUSABLE="1")
    assert done.returncode == 0
    assert "cannot use it" in done.stderr


def test_packages_of_another_python_are_not_seen(checkout):
    noting = BASE_PYTHON.replace("exec", 'echo "PYTHONPATH=${PYTHONPATH:-}" >> "$CALLS"\nexec')
    checkout.stub("python3", noting)
    checkout.run("launch/quickstart", PYTHONPATH="/elsewhere")
    seen = [call for call in checkout.calls() if call.startswith("PYTHONPATH")]
    assert set(seen) == {"PYTHONPATH="}


def start(checkout: Checkout, **environment: str) -> subprocess.Popen[str]:
    """Start quickstart in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [str(checkout.root / "launch" / "quickstart")],
        env=checkout.environment | environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A suite that runs in the background ignores Ctrl-C, and a shell that was started so cannot
        # trap it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_call(checkout: Checkout, text: str) -> None:
    """Wait until a noted call contains `text`."""
    noted = Path(checkout.environment["CALLS"])
    deadline = time.monotonic() + 120
    while not (noted.exists() and text in noted.read_text()):
        assert time.monotonic() < deadline, f"{text} was never called"
        time.sleep(0.02)


def test_ctrl_c_while_installing_ends_at_once_and_can_be_repeated(checkout):
    process = start(checkout, PIP_SECONDS="60")
    wait_for_call(checkout, "pip install")
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted; run the same command again" in said
    assert "error" not in said
    assert not (checkout.root / ".venv" / ".spectral_scale").exists()
    assert checkout.run("launch/quickstart").returncode == 0


def test_two_set_ups_take_turns_and_training_holds_no_lock(checkout):
    with (checkout.root / "launch" / "_setup.sh").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = start(checkout)
        assert process.stderr.readline().startswith("another set-up of this checkout is running")
        assert not (checkout.root / ".venv").exists()
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert "still locked" not in checkout.calls()
