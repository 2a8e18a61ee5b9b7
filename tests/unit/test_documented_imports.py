"""Every name that README and docs import from the package exists under that name."""

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from spectral_scale.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
ONE_LINE = re.compile(r"(?:from spectral_scale[\w.]* import [\w, ]+|import spectral_scale[\w.]*)")
"""An import within a command, as in `python -c "from spectral_scale import convert"`."""


@dataclass(frozen=True)
class Shown:
    """An import that a page shows."""

    page: str
    module: str
    name: str | None
    """The name taken from the module; None where the module itself is imported."""


def shown_imports(page: str, text: str) -> Iterator[Shown]:
    """The imports of this package in a page's code blocks. Raises SyntaxError for broken code."""
    for block in BLOCK.finditer(text):
        code = textwrap.dedent(block[3])
        if block[2] != "python":
            code = "\n".join(ONE_LINE.findall(code))
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                yield from (
                    Shown(page, alias.name, None) for alias in node.names if own(alias.name)
                )
            elif isinstance(node, ast.ImportFrom) and own(node.module or ""):
                yield from (Shown(page, node.module or "", alias.name) for alias in node.names)


def own(module: str) -> bool:
    """Whether a module is of this package."""
    return module.partition(".")[0] == "spectral_scale"


def missing(shown: Shown) -> str | None:
    """Why the import fails, if it does. Skips the test if a package of others is absent."""
    try:
        module = import_module(shown.module)
    except ModuleNotFoundError as error:
        if not own(error.name or ""):
            pytest.skip(f"{shown.module} needs {error.name}, which is not installed")
        return str(error)
    try:
        if shown.name is None or hasattr(module, shown.name):
            return None
        import_module(f"{shown.module}.{shown.name}")
    except ModuleNotFoundError as error:
        return f"{shown.module} has no {shown.name}: {error}"
    except ConfigError as error:  # a name that is loaded on first use, with its package
        pytest.skip(str(error))
    return None


ALL = sorted(
    {s for page in PAGES for s in shown_imports(page.name, page.read_text(encoding="utf-8"))},
    key=str,
)


@pytest.mark.parametrize("shown", ALL, ids=lambda s: f"{s.page}: {s.module}.{s.name}")
def test_what_a_page_imports_is_there(shown: Shown) -> None:
    assert missing(shown) is None


def test_imports_are_found_in_all_kinds_of_blocks() -> None:
    page = (
        "```python\nfrom spectral_scale import (\n    convert,\n    merge,\n)\nimport torch\n```\n"
        "- item\n  ```python\n  import spectral_scale.megatron\n  ```\n"
        '```bash\npython -c "from spectral_scale import __version__; print(1)"\n```\n'
        "from spectral_scale import prose\n"
    )
    found = {(s.module, s.name) for s in shown_imports("page", page)}
    assert found == {
        ("spectral_scale", "convert"),
        ("spectral_scale", "merge"),
        ("spectral_scale.megatron", None),
        ("spectral_scale", "__version__"),
    }
    assert {"SpectralController", "MegatronStore"} <= {s.name for s in ALL}


@pytest.mark.parametrize(
    "shown",
    [
        Shown("page", "spectral_scale", "no_such_name"),
        Shown("page", "spectral_scale.no_such_module", None),
        Shown("page", "spectral_scale.no_such_module", "convert"),
    ],
    ids=str,
)
def test_an_import_that_fails_is_found(shown: Shown) -> None:
    assert missing(shown)
