"""Reading a killed and resumed run: clean curves, nothing lost, damage reported."""

import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_scale.metrics import MetricsHistory, MetricsLog, load_history, read_metrics


def write_attempt(run_dir, steps, value, resume_step=None):
    log = MetricsLog(run_dir, tensorboard=False, resume_step=resume_step)
    for step in steps:
        log.write(step, {"train/loss": value})
    log.close()


def test_resume_supersedes_later_steps_even_those_not_reached_again(tmp_path):
    write_attempt(tmp_path, range(0, 60, 10), 1.0)
    write_attempt(tmp_path, [30, 40], 2.0, resume_step=20)
    curve = [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)]
    assert curve == [(0, 1.0), (10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]
    history = load_history(tmp_path)
    assert [line["step"] for line in history.superseded()] == [30, 40, 50]
    assert history.resume_steps() == [20]
    assert len(read_metrics(tmp_path, superseded=True)) == len(history.lines) == 9


def test_an_earlier_resume_step_supersedes_two_attempts(tmp_path):
    write_attempt(tmp_path, [0, 10, 20, 30], 1.0)
    write_attempt(tmp_path, [30, 40], 2.0, resume_step=20)
    write_attempt(tmp_path, [20], 3.0, resume_step=10)
    curve = [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)]
    assert curve == [(0, 1.0), (10, 1.0), (20, 3.0)]


def test_a_start_supersedes_everything(tmp_path):
    write_attempt(tmp_path, [0, 10, 20], 1.0)
    write_attempt(tmp_path, [0, 10], 2.0)
    assert [(x["step"], x["train/loss"]) for x in read_metrics(tmp_path)] == [(0, 2.0), (10, 2.0)]
    assert load_history(tmp_path).resume_steps() == []


def test_lines_of_one_step_are_merged(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(10, {"train/loss": 2.0})
    log.write(10, {"validation/loss": 3.0})
    log.write(10, {"train/loss": 2.5})
    line = read_metrics(tmp_path)[-1]
    assert line["train/loss"] == 2.5 and line["validation/loss"] == 3.0


def test_step_of_the_checkpoint_keeps_its_line_on_resume(tmp_path):
    write_attempt(tmp_path, [0, 10], 1.0)
    log = MetricsLog(tmp_path, tensorboard=False, resume_step=10)
    log.write(10, {"validation/loss": 5.0})
    line = read_metrics(tmp_path)[-1]
    assert (line["train/loss"], line["validation/loss"], line["event"]) == (1.0, 5.0, "resume")


@pytest.mark.parametrize(
    "damage", ['{"step": 10, "train/lo', "[1, 2]", '{"loss": 1}', '{"step": "1"}', "\udcff"]
)
def test_damaged_lines_are_left_out_and_reported(tmp_path, caplog, damage):
    whole = json.dumps({"step": 0, "train/loss": 1.0})
    data = f"{whole}\n{damage}".encode("utf-8", "surrogateescape")
    (tmp_path / "metrics.jsonl").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        history = load_history(tmp_path)
    assert [line["step"] for line in history.current()] == [0]
    assert history.damaged_lines == (2,) and "[2]" in caplog.text


def test_a_folder_without_metrics_is_an_empty_history(tmp_path):
    assert read_metrics(tmp_path) == []


def simulate(resumes, total):
    """A run that logs every step, killed and resumed; and what a reader must see."""
    lines, truth = [], {}
    begin = 0
    for attempt, (resume_step, length) in enumerate(resumes):
        at = None if attempt == 0 else min(resume_step, begin)
        lines.append({"step": at or 0, "event": "start" if at is None else "resume"})
        truth = {step: who for step, who in truth.items() if at is not None and step <= at}
        for step in range((at or 0) + 1, min((at or 0) + 1 + length, total)):
            lines.append({"step": step, "attempt": attempt})
            truth[step] = attempt
            begin = step
    return lines, truth


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=6))
def test_current_is_the_work_that_was_not_lost(resumes):
    lines, truth = simulate(resumes, total=30)
    history = MetricsHistory(lines=tuple(lines), damaged_lines=())
    seen = {line["step"]: line["attempt"] for line in history.current() if "attempt" in line}
    assert seen == truth
    assert len(history.superseded()) + len(history.current()) <= len(lines)


def test_what_a_rollback_undid_is_neither_kept_nor_lost(tmp_path):
    """Steps 3 and 4 are undone at 2 and taken on other data; 5 is lost to a kill and done again."""
    log = MetricsLog(tmp_path, tensorboard=False)
    for step in (1, 2, 3, 4):
        log.write(step, {"train/loss": float(step)})
    log.go_back(2)
    for step in (3, 4, 5):
        log.write(step, {"train/loss": 10.0 * step})
    log.close()
    again = MetricsLog(tmp_path, tensorboard=False, resume_step=4)
    again.write(5, {"train/loss": 50.0})
    again.close()
    history = load_history(tmp_path)
    losses = {x["step"]: x["train/loss"] for x in history.current() if "train/loss" in x}
    assert losses == {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0, 5: 50.0}
    assert [(x["step"], x["train/loss"]) for x in history.superseded()] == [(5, 50.0)]
    assert (history.rollback_steps(), history.resume_steps()) == ([2], [4])
    assert [attempt[0]["event"] for attempt in history.attempts()] == [
        "start",
        "rollback",
        "resume",
    ]
