"""Verdicts follow from figures, survive JSON, and show on the page."""

import json

import pytest

from spectral_scale.gpu_checks.catalogue import CHECKS
from spectral_scale.gpu_checks.findings import (
    CheckFinding,
    Figure,
    Result,
    at_most,
    equal,
    holds,
    judged,
    recorded,
)
from spectral_scale.gpu_checks.page import to_markdown

FACTS = {"torch": "2.13.0"}


@pytest.mark.parametrize(
    ("figure", "ok"),
    [
        (at_most("e", 1.0, 1.0), True),
        (at_most("e", 1.1, 1.0), False),
        (at_most("e", float("nan"), 1.0), False),
        (at_most("e", float("inf"), 1.0), False),
        (equal("n", 0, 0), True),
        (equal("n", 1, 0), False),
        (holds("h", False, value="no", required="yes"), False),
        (recorded("r", float("nan")), True),
    ],
)
def test_one_wrong_figure_fails_a_check(figure: Figure, ok: bool) -> None:
    finding = CheckFinding(figures=[recorded("first", 1.0), figure])
    result = judged("layers", finding, seconds=1.0, facts=FACTS)
    assert result.verdict == ("pass" if ok else "fail")
    assert bool(result.reason) is not ok
    if not ok:
        assert figure.name in result.reason and figure.required in result.reason


def test_results_survive_json() -> None:
    finding = CheckFinding(figures=[at_most("e", 2.0, 1.0), recorded("r", "word")], text="| a |")
    result = judged("svd", finding, seconds=2.0, facts=FACTS)
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result
    for damaged in ({}, {"figures": []}, result.to_json() | {"more": 1}):
        with pytest.raises((TypeError, KeyError)):
            Result.from_json(damaged)


def test_the_page_shows_verdicts_figures_and_versions() -> None:
    checks = CHECKS[:3]
    results = [
        judged(
            checks[0].name, CheckFinding(figures=[at_most("e", 2.0, 1.0)]), seconds=3.0, facts=FACTS
        ),
        Result(name=checks[1].name, verdict="skip", reason="needs a | b"),
        Result(name=checks[2].name, verdict="not run", reason="later"),
    ]
    page = to_markdown(checks, results, FACTS, rehearsal=False)
    assert "1 fail, 1 skip, 1 not run" in page and "| torch | 2.13.0 |" in page
    assert f"| `{checks[0].name}` | {checks[0].title} | **FAIL** | 3 | e is 2" in page
    assert "| e | 2 | at most 1 | **not so** |" in page
    assert "needs a \\| b" in page
    assert "rehearsal" not in page
    assert "says nothing about a GPU" in to_markdown(checks, results, FACTS, rehearsal=True)
