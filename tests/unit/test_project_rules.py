"""What holds for the repository as a whole: lint, types, pins, names, versions, help texts."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath

import pytest
from fast_tier import has_fast_tests, starts_nothing
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import spectral_scale
from spectral_scale.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGUMENTS` at the root of the checkout."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize(
    "tool",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)],
    ids=["lint", "format", "types"],
)
def test_tool_finds_nothing(tool):
    done = run_tool(*tool)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    ("tool", "source"),
    [
        (("ruff", "check", "--no-cache"), "import os\n"),
        (("ruff", "format", "--check", "--no-cache"), "x = {'a' :1}\n"),
        (("mypy",), "def f(x: int) -> str:\n    return x\n"),
    ],
    ids=["lint", "format", "types"],
)
def test_tool_finds_a_fault(tool, source, tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text(source)
    config = "--config-file" if tool[0] == "mypy" else "--config"
    done = run_tool(*tool, config, str(ROOT / "pyproject.toml"), str(bad))
    assert done.returncode == 1, f"{done.stdout}{done.stderr}"


# Written apart, so that this file does not contain them.
HOMES = ("/ho" + "me/", "/ro" + "ot/", "/wo" + "rk/", "/Us" + "ers/")
MACHINE_PATH = re.compile(rf"(?<![\w.~*}}/])(?:{'|'.join(HOMES)})\w")
NOTES = re.compile(r"\bshared/(?:des" + "ign|rese" + r"arch)\b|/tmp/" + r"brief")


def foreign_text(text: str) -> list[str]:
    """Paths of one machine, and of notes that a reader of the repository does not have."""
    return [m[0] for pattern in (MACHINE_PATH, NOTES) for m in pattern.finditer(text)]


def tracked_files() -> list[Path]:
    """Every text file under version control; all text files of an unpacked archive."""
    command = ["git", "ls-files", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        names = done.stdout.rstrip("\0").split("\0")
    else:
        names = [str(f.relative_to(ROOT)) for f in ROOT.rglob("*") if f.suffix in {".py", ".md"}]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_files_name_no_machine_and_no_private_notes():
    found = {}
    for file in tracked_files():
        text = file.read_bytes().decode("utf-8", errors="replace")
        if hits := foreign_text(text):
            found[str(file.relative_to(ROOT))] = hits
    assert found == {}


@pytest.mark.parametrize(
    "text", [f"see {HOMES[0]}me/x", f"in {HOMES[2]}a", "shared/" + "design/a.md"]
)
def test_foreign_text_is_found(text):
    assert foreign_text(text)


def test_web_addresses_and_own_folders_are_not_foreign():
    assert not foreign_text(f"https://x.org{HOMES[0]}page, runs{HOMES[2]}a, ~{HOMES[0]}b, home/x")


@pytest.mark.parametrize("command", [*COMMANDS, None])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"] if command else ["--help"])
    assert exit_info.value.code == 0
    assert f"usage: spectral-scale {command or ''}" in capsys.readouterr().out


def test_module_and_pretrain_script_are_the_command():
    for arguments in (["-m", "spectral_scale", "train"], ["launch/pretrain.py"]):
        command = [sys.executable, *arguments, "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "usage: spectral-scale train" in done.stdout


def test_versions_agree(capsys):
    assert PROJECT["version"] == spectral_scale.__version__
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"spectral-scale {PROJECT['version']}\n"


def pins() -> dict[str, str]:
    """Name -> version of every line of constraints.txt."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    assert len(pairs) == len({canonicalize_name(name) for name, _ in pairs}), "a name twice"
    return {canonicalize_name(name): version for name, version in pairs}


def unpinned(requirements: list[str], pinned: dict[str, str]) -> list[str]:
    """Requirements that no pin satisfies."""
    wanted = [Requirement(line) for line in requirements]
    return [
        str(r)
        for r in wanted
        if not r.specifier.contains(pinned.get(canonicalize_name(r.name), "0"))
        or canonicalize_name(r.name) not in pinned
    ]


def test_every_dependency_is_pinned_within_its_bounds():
    extras = PROJECT["optional-dependencies"]["test"]
    assert unpinned([*PROJECT["dependencies"], *extras], pins()) == []


def test_a_pin_that_is_missing_or_out_of_bounds_is_found():
    pinned = {"torch": "2.9.0", "numpy": "2.4.6"}
    wanted = ["torch>=2.10", "numpy>=2.0", "tqdm"]
    assert unpinned(wanted, pinned) == ["torch>=2.10", "tqdm"]


@pytest.mark.parametrize("name", ["launch/quickstart", "launch/selftest", ".ci/run"])
def test_scripts_can_be_started(name):
    file = ROOT / name
    assert file.stat().st_mode & 0o111, f"{name} is not executable"
    first = file.read_text(encoding="utf-8").splitlines()
    assert first[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in first


def test_quickstart_settings_are_valid():
    from spectral_scale.config.check import check_config
    from spectral_scale.config.load import load_config

    config = load_config([ROOT / "launch" / "quickstart.yaml"], []).config
    check_config(config, world_size=1)
    assert config.train.run_dir == "runs/quickstart"
    assert (config.data.train, config.spectral.method) == ("embedded", "sst")
    assert config.spectral.storage == "residual"
    assert config.checkpoint.interval <= 50


def misplaced(tests: list[PurePosixPath], sources: list[PurePosixPath]) -> list[PurePosixPath]:
    """Test files that do not lie where the code lies that they test.

    Args:
        tests: test files, relative to tests/unit. Those beside no package folder are about the
            repository as a whole and may be there.
        sources: modules, relative to the package.

    A test's name begins with `test_` and the name of a module of the folder of the same path, or
    of that folder itself; a topic may follow, as in test_swap_failures.py.
    """
    names = {folder: {folder.name} for source in sources for folder in source.parents}
    for source in sources:
        names[source.parent].add(source.stem)
    return [
        test
        for test in tests
        if test.parent.name
        and not any(
            f"{test.stem}_".startswith(f"test_{name}_") for name in names.get(test.parent, ())
        )
    ]


def python_files(folder: Path, pattern: str) -> list[PurePosixPath]:
    found = (file.relative_to(folder) for file in folder.rglob(pattern))
    return sorted(PurePosixPath(file.as_posix()) for file in found)


def test_unit_tests_mirror_the_package():
    tests = python_files(ROOT / "tests" / "unit", "test_*.py")
    assert misplaced(tests, python_files(ROOT / "spectral_scale", "*.py")) == []


def test_a_misplaced_unit_test_is_found():
    sources = [PurePosixPath(name) for name in ("ops/graphs.py", "methods/sst/swap.py")]
    right = ["test_rules.py", "ops/test_graphs_knn.py", "methods/sst/test_sst_bank.py"]
    wrong = ["ops/test_graphsx.py", "ops/test_swap.py", "sst/test_swap.py", "old/test_old.py"]
    found = misplaced([PurePosixPath(name) for name in right + wrong], sources)
    assert found == [PurePosixPath(name) for name in wrong]


def without_fast_tests(folders: dict[str, set[str]]) -> list[str]:
    """Folders of tests of which the fast tier runs nothing, neither in them nor below them.

    Args:
        folders: folder -> its test files that have fast tests, which may be none.
    """
    return [
        folder
        for folder in folders
        if not any(
            files and f"{other}/".startswith(f"{folder}/") for other, files in folders.items()
        )
    ]


def test_the_fast_tier_covers_every_package():
    folders: dict[str, set[str]] = {}
    for file in (ROOT / "tests" / "unit").glob("*/**/test_*.py"):
        files = folders.setdefault(str(file.parent.relative_to(ROOT / "tests" / "unit")), set())
        if has_fast_tests(file):
            files.add(file.name)
    assert len(folders) > 20
    assert without_fast_tests(folders) == []


def test_a_package_that_the_fast_tier_misses_is_found():
    folders = {"methods": set(), "methods/sst": {"test_sst_swap.py"}, "data": set()}
    assert without_fast_tests(folders) == ["data"]


@pytest.mark.parametrize(
    "line",
    [
        "import subprocess",
        "from spectral_scale.testing import distributed",
        "import multiprocessing",
    ],
)
def test_a_file_that_starts_processes_is_not_fast(line):
    assert starts_nothing("import torch\n")
    assert not starts_nothing(f"def test():\n    {line}\n")


def twins(sources: dict[str, str]) -> dict[str, list[str]]:
    """Public class name -> the files that define it, for names that are defined more than once."""
    found: dict[str, list[str]] = {}
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(path)
    return {name: paths for name, paths in found.items() if len(paths) > 1}


def test_no_class_name_is_defined_twice():
    files = sorted((ROOT / "spectral_scale").rglob("*.py"))
    assert twins({str(file): file.read_text(encoding="utf-8") for file in files}) == {}


def test_a_class_name_that_is_defined_twice_is_found():
    sources = {"a.py": "class Layout: ...\nclass _Own: ...", "b.py": "class Layout: ..."}
    assert twins(sources | {"c.py": "class _Own: ..."}) == {"Layout": ["a.py", "b.py"]}
