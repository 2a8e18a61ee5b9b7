"""docs/architecture.md against the tree: its folders, its floors, the files it names."""

import re
from pathlib import Path

from test_import_contract import FLOORS, PACKAGE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d+) \| `([\w/]+)` \| (.+) \|$", re.M)
NAMED = re.compile(r"`((?:\w+/)+[\w*]*(?:\.py|/))`")
TOP_LEVEL = ("benchmarks/", "examples/", "launch/", "slurm/", "ds_configs/", "tests/")


def floors_of(page: str) -> dict[str, int]:
    """Package -> the floor that the table gives it, from 1."""
    return {name.rstrip("/"): int(floor) for floor, name, _ in ROW.findall(page)}


def missing_files(page: str) -> list[str]:
    """Files and folders that the page names and that do not exist; NAME stands for any."""
    named = {name for name in NAMED.findall(page) if "NAME" not in name}
    place = {name: ROOT if name.startswith(TOP_LEVEL) else ROOT / PACKAGE for name in named}
    return sorted(name for name in named if not list(place[name].glob(name.rstrip("/"))))


def folders_left_out(page: str) -> list[str]:
    """Folders of the package that the page does not name."""
    package = ROOT / PACKAGE
    folders = {str(f.parent.relative_to(package)) + "/" for f in package.rglob("__init__.py")}
    return sorted(folder for folder in folders - {"./"} if f"`{folder}`" not in page)


def test_the_floors_are_those_of_the_import_contract() -> None:
    expected = {
        package: level
        for level, packages in enumerate(FLOORS, start=1)
        for package in packages
        if not package.startswith("__")
    }
    assert floors_of(PAGE) == expected


def test_every_folder_is_named_and_everything_named_exists() -> None:
    assert folders_left_out(PAGE) == []
    assert missing_files(PAGE) == []


def test_what_is_wrong_on_a_page_is_found() -> None:
    assert missing_files("`methods/sst/swop.py` and `optim/`") == ["methods/sst/swop.py"]
    assert "optim/filter/" in folders_left_out(PAGE.replace("`optim/filter/`", ""))
    assert floors_of("| 3 | `optim/` | groups |") == {"optim": 3}
