"""`prepare` under a launcher: its input, its command, and what its folder is worth afterwards."""

import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from spectral_scale.data.tokens import (
    INCOMPLETE_NAME,
    TOKENIZER_FOLDER,
    TOKENIZER_NAME,
    open_tokens,
)
from spectral_scale.errors import DataError

COMMAND = str(Path(sys.executable).with_name("spectral-scale"))
TEXT_BYTES = 60_000_000
"""So much that it is tokenised for many seconds."""
WORKERS = 2


def make_input(folder: Path) -> None:
    """Write a long text and a tokenizer for it, and prepare it once undisturbed, unless done."""
    text, short = folder / "text.jsonl", folder / "short.txt"
    if text.exists():
        return
    source = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")
    short.write_text(source, encoding="utf-8")
    _run("prepare", "--input", str(short), "--train-bpe", "512", "--output", str(folder / "short"))
    lines = [f'{{"text": "{number} {"some words of a text " * 200}"}}\n' for number in range(100)]
    repeats = TEXT_BYTES // sum(map(len, lines))
    with text.with_suffix(".tmp").open("w", encoding="utf-8") as stream:
        stream.writelines(line for _ in range(repeats) for line in lines)
    text.with_suffix(".tmp").rename(text)
    _run(*words(folder, folder / "undisturbed"))


def words(folder: Path, output: Path) -> list[str]:
    """The command's words, after those of the launcher and the script."""
    found = ["prepare", "--input", str(folder / "text.jsonl"), "--output", str(output)]
    return [*found, "--tokenizer", str(folder / "short"), "--workers", str(WORKERS)]


def wait_until_it_tokenises(process: "subprocess.Popen[bytes]", output: Path, log: Path) -> None:
    """Return while documents are tokenised. Exits if the command ended before."""
    deadline = time.monotonic() + 240
    while not (output / TOKENIZER_FOLDER / TOKENIZER_NAME).exists():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the folder was not begun; see {log}")
        time.sleep(0.05)
    time.sleep(3)  # the workers start
    if not (output / INCOMPLETE_NAME).exists():
        sys.exit(f"the folder was finished before the event; see {log}")


def is_whole_after_the_same_command(folder: Path, output: Path) -> bool:
    """Give the command again, in one process, and compare with the undisturbed folder."""
    try:
        _run(*words(folder, output))
        found = open_tokens(output)
        found.verify()
    except (subprocess.CalledProcessError, DataError):
        return False
    same = found.fingerprint == open_tokens(folder / "undisturbed").fingerprint
    shutil.rmtree(output)
    return same


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL)
