"""The GPU checks that train runs, rehearsed on the CPU: that they work, not what a GPU does.

Checks of numbers are rehearsed in tests/unit/gpu_checks, and so is every judgement, each with
something that it must refuse.
"""

from pathlib import Path

import pytest
import torch

from spectral_scale.gpu_checks import equivalence
from spectral_scale.gpu_checks.catalogue import named
from spectral_scale.gpu_checks.findings import Result
from spectral_scale.gpu_checks.one import perform
from spectral_scale.gpu_checks.place import find_place


def rehearse(name: str, folder: Path) -> Result:
    """The result of a check on this machine's CPU."""
    (check,) = named([name])
    return perform(check, find_place(folder, rehearsal=True))


@pytest.mark.parametrize(
    "name",
    [
        "synchronisations",
        "determinism",
        "swap",
        "async-save",
        "out-of-memory",
        "hang",
        "lost-rank",
        "start-peak",
        "bench-125m",
        "bench-1.3b",
    ],
)
@pytest.mark.timeout(600)
def test_the_check_passes_in_a_rehearsal(name: str, tmp_path: Path) -> None:
    result = rehearse(name, tmp_path)
    assert result.verdict == "pass", f"{result.reason}\n{result.text}"
    assert result.figures


@pytest.mark.timeout(600)
def test_backends_are_compared_through_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that train, and one that cannot: the check fails for it alone, with what it printed."""
    fsdp2 = [layout for layout in equivalence.TOGETHER if layout.name == "FSDP2"]
    broken = equivalence.CheckedLayout(name="broken", backend="torch", settings={"no.key": 1})
    monkeypatch.setattr(equivalence, "ALONE", (*fsdp2, broken))
    result = rehearse("backends", tmp_path)
    assert [f.name for f in result.figures if not f.ok] == ["broken, difference of the loss"]
    assert "no.key" in result.text and "exit codes [78]" in result.text


def test_compiled_runs_are_compared_with_eager_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo alone, as Inductor takes a minute; its graphs are counted the same."""
    right = torch.compile

    def without_inductor(*arguments: object, **options: object) -> object:
        return right(*arguments, **options | {"backend": "eager"})  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", without_inductor)
    result = rehearse("compile", tmp_path)
    assert result.verdict == "pass", f"{result.reason}\n{result.text}"
