"""Shared fixtures: one thread a process, and a small prepared corpus of real text."""

import os
import sysconfig
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from exhaustive_tier import EXHAUSTIVE, stale
from fast_tier import has_fast_tests, is_fast
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("shared machine", deadline=None)  # tests never assert timings
settings.load_profile("shared machine")

TEXT_FILES = ("argparse.py", "ast.py", "calendar.py", "decimal.py", "difflib.py", "inspect.py")
MOST_WORKERS = 8
"""Most tests at a time under `--numprocesses auto`: one of several ranks starts four processes."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many tests run at a time under `--numprocesses auto`.

    One a core and one more, since some tests wait, mostly; those of the fast tier never do.
    """
    more = 0 if config.option.markexpr == "fast" else 1
    return min(len(os.sched_getaffinity(0)) + more, MOST_WORKERS)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--exhaustive`."""
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="also run what tests/exhaustive_tier.py lists, which takes many minutes",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import files without a fast test for the fast tier: imports take most of its start."""
    if config.option.markexpr != "fast" or not collection_path.name.startswith("test_"):
        return None
    return None if collection_path.is_dir() or has_fast_tests(collection_path) else True


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of the fast tier; leave out those of the exhaustive one unless asked for."""
    names = {item: item.nodeid.removeprefix("tests/") for item in items}
    whole = not any("::" in word for word in config.args)
    if whole and (unknown := stale(set(names.values()))):
        raise pytest.UsageError(f"tests/exhaustive_tier.py names tests that are not: {unknown}")
    # A gzip header holds the second at which it was made, and workers must agree on names.
    if dated := [name for name in names.values() if r"\x1f\x8b" in name]:
        raise pytest.UsageError(f"the names of these tests change with time; use ids: {dated}")
    left_out = pytest.mark.skip(reason="of the exhaustive tier: pytest --exhaustive")
    for item, name in names.items():
        if is_fast(item.path) and item.get_closest_marker("slow") is None:
            item.add_marker("fast")
        if name in EXHAUSTIVE and whole and not config.getoption("exhaustive"):
            item.add_marker(left_out)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train` and `valid` token folders (512-entry BPE) of library sources."""
    from spectral_scale.data.prepare import prepare

    folder = tmp_path_factory.mktemp("corpus")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for name in TEXT_FILES:
        text = (stdlib / name).read_text(encoding="utf-8")[:20_000]
        texts.append(folder / f"{name}.txt")
        texts[-1].write_text(text, encoding="utf-8")
    prepare(texts[1:], folder / "train", train_bpe=512, progress=False)
    tokenizer = folder / "train" / "tokenizer"
    prepare(texts[:1], folder / "valid", tokenizer=tokenizer, progress=False)
    return folder
