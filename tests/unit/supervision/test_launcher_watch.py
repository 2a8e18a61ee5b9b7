"""Whose end is a request to stop."""

import os
import subprocess
import sys
import time
from pathlib import Path

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
ENDS = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=open(sys.argv[2], "w"))
while not open(sys.argv[2]).read():
    time.sleep(0.01)
"""


@pytest.mark.parametrize(("program", "says"), [("torchrun", "gone"), ("start.sh", "goes on")])
def test_only_the_end_of_a_launcher_counts(program: str, says: str, tmp_path: Path) -> None:
    """A script that starts a rank in the background and ends leaves the rank alone."""
    starter = tmp_path / program
    starter.write_text(ENDS)
    output = tmp_path / "output"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run(
        [sys.executable, str(starter), WATCH, str(output)], check=True, env=environment, timeout=60
    )
    deadline = time.monotonic() + 30
    while len(output.read_text().split("\n")) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert output.read_text().split("\n")[1] == says
