"""Whose end is a request to stop."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

WATCH = """
import os, sys, time
from spectral_scale.supervision.launcher_watch import LauncherWatch
watch, parent = LauncherWatch(), os.getppid()
print("ready", flush=True)
while os.getppid() == parent:
    time.sleep(0.01)
print("gone" if watch.gone() else "goes on", flush=True)
"""
ENDING_WITH_IT = """
import os, time
from spectral_scale.supervision.launcher_watch import end_with_launcher
end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""
ENDS = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=open(sys.argv[2], "w"))
while not open(sys.argv[2]).read():
    time.sleep(0.01)
"""


def run_starter(program: str, code: str, folder: Path) -> Path:
    """Run a launcher or a script that starts `code` in the background and ends; its output."""
    starter = folder / program
    starter.write_text(ENDS)
    output = folder / "output"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run(
        [sys.executable, str(starter), code, str(output)], check=True, env=environment, timeout=60
    )
    return output


@pytest.mark.parametrize(("program", "says"), [("torchrun", "gone"), ("start.sh", "goes on")])
def test_only_the_end_of_a_launcher_counts(program: str, says: str, tmp_path: Path) -> None:
    """A script that starts a rank in the background and ends leaves the rank alone."""
    output = run_starter(program, WATCH, tmp_path)
    deadline = time.monotonic() + 30
    while len(output.read_text().split("\n")) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert output.read_text().split("\n")[1] == says


@pytest.mark.parametrize(("program", "ends"), [("deepspeed", True), ("start.sh", False)])
def test_a_command_without_steps_ends_with_its_launcher(
    program: str, ends: bool, tmp_path: Path
) -> None:
    output = run_starter(program, ENDING_WITH_IT, tmp_path)
    command = psutil.Process(int(output.read_text()))
    if ends:
        command.wait(timeout=30)
        return
    try:
        with pytest.raises(psutil.TimeoutExpired):
            command.wait(timeout=2)
    finally:
        command.kill()
