"""Which tests make up the fast tier (`pytest -m fast`).

A file under `tests/unit` is in it if it imports nothing that starts processes or trains whole
runs. What takes seconds all the same is marked `slow`. In other files, single tests are marked
`fast`; among them is the smallest run of two processes on each backend.
"""

import ast
import functools
from pathlib import Path

UNIT = Path(__file__).parent / "unit"
STARTERS = ("subprocess", "multiprocessing", "spectral_scale.testing.distributed")
"""Modules by which a test starts further processes."""
TRAINERS = ("spectral_scale.testing.tiny", "spectral_scale.engine.loop")
"""Modules by which a test trains a whole run."""


def imports(source: str) -> set[str]:
    """The modules that a source imports, and the names it takes from them, dotted."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def starts_nothing(source: str) -> bool:
    """Whether a test file starts no process and trains no run, as far as its imports tell."""
    return not imports(source) & {*STARTERS, *TRAINERS}


@functools.cache
def has_fast_tests(file: Path) -> bool:
    """Whether a test file is in the tier, or marks single tests for it."""
    source = file.read_text(encoding="utf-8")
    marked = {"pytestmark = pytest.mark.slow": False, "mark.fast": True}
    return next((fast for mark, fast in marked.items() if mark in source), is_fast(file))


@functools.cache
def is_fast(file: Path) -> bool:
    """Whether the tests of a file are in the fast tier unless they say otherwise."""
    return file.is_relative_to(UNIT) and starts_nothing(file.read_text(encoding="utf-8"))
