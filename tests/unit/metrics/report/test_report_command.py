"""`spectral-scale report`: what it prints and where it writes."""

import argparse
import json
import math

import pytest

from spectral_scale.cli import report as command
from spectral_scale.errors import ConfigError

pytestmark = pytest.mark.usefixtures("quick_charts")


def report(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["report", *map(str, arguments)])
    return command.run(args)


def test_one_run_writes_into_its_folder_and_prints_the_numbers(make_run, capsys):
    run = make_run("first", steps=200, kills=((90, 50),))
    assert report(run) == 0
    out = capsys.readouterr().out
    assert f"report: {run / 'report.html'}" in out and (run / "report.html").is_file()
    for part in ("first\n", "state                  done", "resumed at steps       50", "200"):
        assert part in out, part


def test_several_runs_write_into_the_working_folder(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report(make_run("a", steps=20), make_run("b", steps=20)) == 0
    assert (tmp_path / "report.html").is_file()
    assert "report: report.html" in capsys.readouterr().out


def test_json_is_strict_and_whole(make_run, tmp_path, capsys):
    def diverge(attempt, step, values):
        return values | {"train/loss": math.nan}

    output = tmp_path / "deep" / "page.html"
    run = make_run("first", steps=20, change=diverge)
    assert report(run, "--output", output, "--format", "json") == 0

    def refuse(name):
        raise AssertionError(name)

    document = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert document["report"] == str(output) and output.is_file()
    assert document["runs"][0]["train_loss_last"] == "NaN"
    assert document["runs"][0]["steps"] == 20


def test_different_data_needs_the_flag(make_run, tmp_path):
    runs = [make_run("a", steps=20), make_run("b", steps=20, fingerprint="other")]
    with pytest.raises(ConfigError, match="--allow-different-data"):
        report(*runs, "--output", tmp_path / "x.html")
    assert report(*runs, "--output", tmp_path / "x.html", "--allow-different-data") == 0


def test_a_run_without_any_number_still_prints(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: {name: opt-tiny}")
    assert report(tmp_path) == 0
    assert "state" in capsys.readouterr().out
