"""Checks run one by one in processes that end in time; results are kept and taken up again."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from spectral_scale.cli.main import main
from spectral_scale.gpu_checks import one, runner
from spectral_scale.gpu_checks.catalogue import CHECKS, Check
from spectral_scale.gpu_checks.findings import CheckFinding, Result, at_most
from spectral_scale.gpu_checks.place import Place, facts
from spectral_scale.gpu_checks.runner import PAGE, Session, exit_code, run_check, run_checks

FIRST, SECOND = CHECKS[:2]


@pytest.fixture
def session(place: Place) -> Session:
    return Session(place=place)


def outcome(verdicts: dict[str, str], started: list[str]) -> Callable[..., int]:
    """In place of starting processes: writes results as they would, and notes their names."""

    def run(words: Sequence[str], output: int, seconds: float) -> int:
        name, _, file = words[1:4]
        started.append(name)
        verdict = verdicts.get(name, "pass")
        if verdict == "died":
            return -11
        result = Result(name=name, verdict=verdict, facts=FACTS)  # type: ignore[arg-type]
        Path(file).write_text(json.dumps(result.to_json()))
        return 0

    return run


FACTS: dict[str, str] = {}


@pytest.fixture
def started(place: Place, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the checks that were started; each passes."""
    FACTS.clear()
    FACTS.update(facts(place))
    names: list[str] = []
    monkeypatch.setattr(runner, "_run", outcome({}, names))
    return names


def test_a_real_check_runs_in_a_process_of_its_own(session: Session) -> None:
    svd = next(check for check in CHECKS if check.name == "svd")
    result = run_check(session, svd, seconds=120)
    assert result.verdict == "pass", result.text
    assert result.facts == facts(session.place) and result.figures and result.text
    assert not (session.place.folder / "scratch" / "svd").exists()


def test_all_checks_run_in_order_and_the_page_is_written(
    session: Session, started: list[str]
) -> None:
    told: list[str] = []
    results = run_checks(session, CHECKS, resume=False, notify=lambda r: told.append(r.name))
    assert started == told == [check.name for check in CHECKS]
    assert exit_code(results) == 0
    page = (session.place.folder / PAGE).read_text()
    assert f"{len(CHECKS)} pass." in page


def test_the_page_is_there_while_checks_are_left(
    session: Session, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(result: Result) -> None:
        if result.name == SECOND.name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_checks(session, CHECKS, resume=False, notify=interrupted)
    page = (session.place.folder / PAGE).read_text()
    assert f"1 pass, {len(CHECKS) - 1} not run" in page


def test_resume_repeats_what_failed_died_or_ran_with_other_versions(
    session: Session, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = CHECKS[:4]
    names = [check.name for check in checks]
    verdicts = {names[1]: "fail", names[2]: "died", names[3]: "skip"}
    monkeypatch.setattr(runner, "_run", outcome(verdicts, started))
    results = run_checks(session, checks, resume=False)
    assert [r.verdict for r in results] == ["pass", "fail", "fail", "skip"]
    assert exit_code(results) == 1 and "exit code -11" in results[2].reason
    started.clear()
    monkeypatch.setattr(runner, "_run", outcome({}, started))
    results = run_checks(session, checks, resume=True)
    assert started == names[1:3] and exit_code(results) == 0
    started.clear()
    monkeypatch.setattr(runner, "facts", lambda place: FACTS | {"torch": "another"})
    run_checks(session, checks, resume=True)
    assert started == names
    started.clear()
    run_checks(session, checks, resume=False)
    assert started == names


def test_a_result_that_cannot_be_read_is_run_again(session: Session, started: list[str]) -> None:
    run_checks(session, [FIRST], resume=False)
    session.result_file(FIRST.name).write_text("{}")
    run_checks(session, [FIRST], resume=True)
    assert started == [FIRST.name] * 2


def test_no_check_begins_when_the_time_is_over(session: Session, started: list[str]) -> None:
    short = replace(session, total_seconds=1.0)
    results = run_checks(short, CHECKS[:2], resume=False)
    assert started == [] and [r.verdict for r in results] == ["not run"] * 2
    assert "go on with --resume" in results[0].reason and exit_code(results) == 1


HANGS = """
import subprocess, sys, time, pathlib
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("here it hangs", flush=True)
time.sleep(600)
"""


def test_a_check_that_hangs_is_ended_with_all_that_it_started(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    note = tmp_path / "child"
    right = runner._run

    def run(words: Sequence[str], output: int, seconds: float) -> int | None:
        return right(["hangs", str(note)], output, seconds)

    monkeypatch.setattr(runner, "_run", run)
    result = run_check(session, FIRST, seconds=4.0)
    assert result.verdict == "fail" and "not done after 4 s" in result.reason
    assert "here it hangs" in result.text
    child = int(note.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != "zombie":
        assert time.monotonic() < deadline, "the child lives"
        time.sleep(0.05)


def test_what_a_check_raises_is_its_failure(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(place: Place) -> CheckFinding:
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    from spectral_scale.gpu_checks import numerics

    monkeypatch.setattr(numerics, FIRST.function, broken)
    result = one.perform(FIRST, place)
    assert result.verdict == "fail"
    assert result.reason == "RuntimeError: CUDA error: an illegal memory access"
    assert "in broken" in result.text
    monkeypatch.setattr(
        numerics, FIRST.function, lambda p: CheckFinding(figures=[at_most("e", 2, 1)])
    )
    assert one.perform(FIRST, place).verdict == "fail"
    many = Check(name="many", title="", module="", function="", gpus=99)
    assert one.perform(many, place).verdict == "skip"


# -- the command -----------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_command_says_that_there_is_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--gpu", "--output", str(tmp_path / "out")]) == 78
    assert "doctor --gpu checks GPUs, and torch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "layers"], "belong to --gpu"),
        (["--rehearsal"], "belong to --gpu"),
        (["--gpu", "--only", "nonsense"], "there is no such check"),
        (["--gpu", "--train.steps", "3"], "brings its own runs"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *words]) == 78
    assert says in capsys.readouterr().err


def test_the_command_runs_resumes_and_tells_the_result(
    tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["doctor", "--gpu", "--rehearsal", "--output", str(tmp_path / "out")]
    assert main([*words, "--only", SECOND.name, "--only", FIRST.name]) == 0
    assert started == [FIRST.name, SECOND.name]
    output = capsys.readouterr()
    assert f"page: {tmp_path / 'out' / PAGE}" in output.out
    assert f"pass    {FIRST.name} (" in output.err
    monkeypatch.setattr(runner, "_run", outcome({CHECKS[2].name: "fail"}, started))
    assert main([*words, "--resume", "--format", "json"]) == 1
    assert len(started) == len(CHECKS)
    result = json.loads(capsys.readouterr().out)
    assert [c["verdict"] for c in result["checks"]].count("fail") == result["exit_code"] == 1


def test_an_output_that_cannot_be_written_is_a_configuration_error(
    tmp_path: Path, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = ["doctor", "--gpu", "--rehearsal", "--output", str(tmp_path / "file")]
    assert main(words) == 78
    assert "--output" in capsys.readouterr().err


def test_the_checks_are_named_without_torch() -> None:
    code = (
        "import sys; import spectral_scale.gpu_checks.catalogue;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
