"""Every fault is listed, with tests that exist, on a page that says the same."""

import ast
import sys
from pathlib import Path

import pytest
from battery import COUNT, SECTIONS, Scenario, render

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import launchers  # noqa: E402

ALL = [scenario for scenarios in SECTIONS.values() for scenario in scenarios]


def missing(scenario: Scenario) -> list[str]:
    """What it names and is not there."""
    found = []
    for test in scenario.tests:
        path, _, function = test.partition("::")
        if not (ROOT / path).is_file():
            found.append(test)
        elif function:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            if function not in names:
                found.append(test)
    return found


def test_there_are_as_many_as_the_page_says() -> None:
    assert len(ALL) == COUNT


@pytest.mark.parametrize("scenario", ALL, ids=lambda s: s.fault[:40])
def test_it_names_tests_that_exist_or_says_why_not(scenario: Scenario) -> None:
    assert missing(scenario) == []
    assert scenario.tests or scenario.outcome.startswith("no test: ")


def test_a_test_that_is_not_there_is_found() -> None:
    assert missing(Scenario("x", "y", ("tests/faults/test_battery.py::test_nothing", "no.py")))


def test_every_launcher_did_what_is_documented() -> None:
    """What benchmarks/launchers.py observed last; it marks what differs in bold."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "launchers.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ][2:]
    seen = {(row[0], row[1]) for row in rows}
    for launcher in launchers.LAUNCHERS:
        expected = launchers.events(launcher)
        assert {event for name, event in seen if name == launcher} == expected.keys()
    assert [row for row in rows if row[2] != launchers.events(row[0])[row[1]]] == []


def test_the_page_says_the_same() -> None:
    assert (ROOT / "docs" / "faults.md").read_text(encoding="utf-8") == render()
