"""The page: right numbers, missing and broken data survived, everything escaped."""

import json
import logging
import math
import os
import re
from html.parser import HTMLParser

import pytest

from spectral_scale.errors import ConfigError
from spectral_scale.metrics.report import page as report_module
from spectral_scale.metrics.report.page import build_report, write_report

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_charts")]

VOID = {"meta", "img", "br", "hr", "link"}


class Page(HTMLParser):
    """Parses strictly: every tag closes; collects texts, sections and attributes."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.images: list[dict[str, str]] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        named = dict(attributes)
        assert not any(name.startswith("on") for name in named)
        if tag == "section":
            self.sections.append(named["id"])
        if tag == "img":
            self.images.append(named)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(part for part in self.texts if part)


@pytest.fixture(autouse=True)
def no_chart_fails(caplog):
    """A chart that raises becomes a note on the page; in these tests that is a failure."""
    yield
    assert "could not" not in caplog.text and "failed" not in caplog.text


@pytest.mark.parametrize("quick_charts", [False], indirect=True)
def test_page_of_one_run_is_whole_and_self_contained(make_run):
    run = make_run("first", steps=600)
    output = write_report([run], run / "report.html")
    page = Page(output.read_text())
    assert page.sections == [
        "headline",
        "loss",
        "rates",
        "speed",
        "memory",
        "spectral",
        "spectra",
        "configuration",
    ]
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in page.images)
    assert all(image["alt"] for image in page.images)
    assert len(page.images) == 2 + 2 + 2 + 1 + 2 + 6
    assert not re.search(r"(src|href)=\"(?!data:|#)", output.read_text())
    assert "Notes" not in page.text


def test_headline_numbers_are_those_of_the_log(make_run):
    run = make_run("first", steps=600, kills=((330, 200),))
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    report = build_report([run])
    (numbers,) = report.headlines
    validation = [x["validation/perplexity"] for x in lines if "validation/perplexity" in x]
    assert numbers["validation_perplexity_first"] == validation[0]
    assert numbers["validation_perplexity_last"] == validation[-1]
    assert numbers["validation_perplexity_best"] == min(validation)
    assert numbers["train_loss_last"] == [x["train/loss"] for x in lines if "train/loss" in x][-1]
    assert numbers["tokens"] == 600 * 8192 and numbers["steps"] == 600
    assert numbers["resumed_at_steps"] == [200] and numbers["attempts"] == 2
    assert numbers["parameters_trained"] == 1_234_567
    assert numbers["peak_memory_bytes"] == 712_000_000 + 600 * 100
    assert numbers["swapped_vectors"] == 3 * 24 * 16  # the swap at step 200 is not counted twice
    assert numbers["state"] == "done" and numbers["mfu"] is None
    resume = next(index for index, line in enumerate(lines) if line.get("event") == "resume")
    lived = [lines[:resume], lines[resume:]]
    assert numbers["wall_seconds"] == pytest.approx(
        sum(part[-1]["time"] - part[0]["time"] for part in lived)
    )
    page = Page(report.html)
    for shown in (
        f"{validation[0]:,.2f}",
        f"{validation[-1]:,.2f}",
        f"{min(validation):,.2f}",
        "1,234,567 of 4,567,890",
        "sst, residual, rank 16",
        "600 of 600",
        "1 ×, at step 200",
        "1,152 at 3 swaps",
        "s each of 3 swaps",
        "opt-tiny",
    ):
        assert shown in page.text, shown


def test_state_comes_from_the_status_file_else_from_the_log(make_run):
    run = make_run("first", steps=40, kills=((30, 20),))
    for status, shown in (("completed", "completed"), ("running", "running or killed")):
        (run / "status.json").write_text(json.dumps({"state": status}))
        assert build_report([run]).headlines[0]["state"] == shown
    (run / "status.json").unlink()
    assert build_report([run]).headlines[0]["state"] == "done"
    lines = (run / "metrics.jsonl").read_text().replace('"event": "done"', '"event": "other"')
    (run / "metrics.jsonl").write_text(lines)
    assert build_report([run]).headlines[0]["state"] == "running or killed"


def test_share_of_the_time_spent_in_swaps_counts_unlogged_steps(make_run):
    def exact(attempt, step, values):
        return values | {"train/step_seconds": 0.5}

    page = Page(build_report([make_run("timed", steps=400, change=exact)]).html)
    # Two swaps of 0.9 s in 400 steps of 0.5 s, of which every tenth was logged.
    assert "Median 0.5 s a step, 0.9 s each of 2 swaps, 0.9% of the time." in page.text


def test_exact_resume_is_shown_as_exact(make_run):
    run = make_run("killed", steps=600, kills=((330, 200), (450, 400)))
    report = build_report([run])
    # Lost and done again: 210 to 330, then 410 to 450.
    assert report.headlines[0]["recomputed"]["identical_steps"] == 13 + 5
    text = Page(report.html).text
    assert "Exact: all 18 logged losses" in text and "Not exact" not in text
    assert "step 200" in text and "step 400" in text and "scratch" in text


def test_inexact_resume_is_shown_as_such(make_run):
    def drift(attempt, step, values):
        off = 1e-12 if attempt == 1 and step == 250 else 0.0
        return values | {"train/loss": values["train/loss"] + off}

    run = make_run("drifting", steps=400, kills=((330, 200),), change=drift)
    report = build_report([run])
    recomputed = report.headlines[0]["recomputed"]
    assert (recomputed["shared_steps"], recomputed["identical_steps"]) == (13, 12)
    assert recomputed["first_difference_step"] == 250
    assert 0 < recomputed["largest_difference"] < 1e-11
    text = Page(report.html).text
    assert "Not exact: of 13" in text and "first at step 250" in text


@pytest.mark.parametrize("quick_charts", [False], indirect=True)
def test_runs_compare_on_one_page(make_run):
    runs = [
        make_run("calm", steps=400),
        make_run("killed", steps=400, kills=((330, 200),)),
        make_run("other", steps=400, seed=1),
    ]
    page = Page(build_report(runs).html)
    assert "comparison" in page.sections and "attempts" in page.sections
    assert "all 41" in page.text and "0 of 41" in page.text
    assert "train.seed" in page.text
    for name in ("calm", "killed", "other"):
        assert name in page.text


def test_steps_of_unequal_size_are_compared_by_tokens(make_run):
    def doubled(attempt, step, values):
        return values | {"train/tokens": step * 16384}

    runs = [make_run("small", steps=200), make_run("large", steps=200, change=doubled)]
    assert report_axis(runs).in_tokens
    assert not report_axis(runs[:1]).in_tokens
    same = [runs[0], make_run("same", steps=200, kills=((100, 50),))]
    assert not report_axis(same).in_tokens


def report_axis(run_dirs):
    from spectral_scale.metrics.report.figures import common_axis
    from spectral_scale.metrics.report.run import load_runs

    return common_axis(load_runs(run_dirs))


@pytest.mark.parametrize("quick_charts", [False], indirect=True)
def test_non_finite_losses_are_counted_and_drawn_around(make_run):
    def diverge(attempt, step, values):
        if step >= 300:
            values["train/loss"] = math.nan if step % 20 else math.inf
            values["train/grad_norm"] = math.nan
        return values

    report = build_report([make_run("diverged", steps=400, change=diverge)])
    assert report.headlines[0]["non_finite_losses"] == 11
    assert "11 logged steps" in Page(report.html).text


FAMILIES = {
    "loss": ("train/loss", "validation/"),
    "rates": ("train/lr", "train/grad_norm"),
    "speed": ("train/step_seconds", "train/tokens_per_second"),
    "memory": ("memory/",),
    "spectral": ("spectral/effective_rank", "spectral/orthogonality_error"),
    "spectra": ("spectral/spectrum",),
}


@pytest.mark.parametrize("missing", FAMILIES)
def test_missing_data_leaves_a_section_out_with_a_note(make_run, missing):
    def without(attempt, step, values):
        return {k: v for k, v in values.items() if not k.startswith(FAMILIES[missing])}

    page = Page(build_report([make_run("part", steps=60, change=without)]).html)
    assert missing not in page.sections
    assert {"headline", "configuration"} <= set(page.sections)
    assert len(page.sections) == len(FAMILIES) + 1
    assert "Notes" in page.text


def test_values_of_wrong_types_are_passed_over(make_run):
    def spoil(attempt, step, values):
        wrong = {key: "oops" for key in values if step == 0 or key.startswith("spectral/spectrum")}
        return values | wrong | {"memory/peak_bytes": None, "train/lr": [1.0]}

    page = Page(build_report([make_run("odd", steps=60, change=spoil)]).html)
    assert "spectra" not in page.sections and "loss" in page.sections


@pytest.mark.parametrize("keep", ["config.yaml", "environment.json", "metrics.jsonl"])
def test_any_one_file_is_enough(make_run, keep):
    run = make_run("bare", steps=30)
    for file in list(run.iterdir()):
        if file.name != keep:
            file.unlink()
    page = Page(build_report([run]).html)
    assert "headline" in page.sections and "missing" in page.text


@pytest.mark.parametrize(
    "file, content",
    [
        ("config.yaml", "a: [1, 2\nb: {"),
        ("config.yaml", "- just\n- a list"),
        ("config.yaml", "model: opt-tiny\nspectral: [1]"),
        ("config.yaml", "!!python/object/apply:os.system ['true']"),
        ("environment.json", "{not json"),
        ("environment.json", "\ud800"),
        ("status.json", "[]"),
        ("metrics.jsonl", '{"step": 0, "train/loss": 3.0}\n{"step": 10, "trai'),
        ("metrics.jsonl", ""),
    ],
)
def test_broken_files_become_notes(make_run, file, content):
    run = make_run("broken", steps=30)
    (run / file).write_bytes(content.encode("utf-8", "surrogatepass"))
    page = Page(build_report([run]).html)
    assert "headline" in page.sections
    assert file in page.text or content.startswith("model")


HOSTILE = "_$x^<script>alert(1)<&script> \"'><img src=x onerror=alert(1)>$"


@pytest.mark.parametrize("quick_charts", [False], indirect=True)
def test_hostile_names_and_values_are_text(make_run):
    def hostile(attempt, step, values):
        named = {f"spectral/effective_rank/{HOSTILE}": 3.0, f"train/lr/{HOSTILE}": 1e-3}
        kept = ("train/loss", "memory/peak_bytes", "train/lr/dense")
        return {key: values[key] for key in kept} | named

    runs = [make_run(name, steps=20, change=hostile) for name in (HOSTILE, "$\\frac{$\u4e2d\n_")]
    for run in runs:
        (run / "config.yaml").write_text(json.dumps({"model": {"name": HOSTILE, HOSTILE: 1}}))
        (run / "status.json").write_text(json.dumps({"state": HOSTILE}))
    for folders in (runs[:1], runs):
        report = build_report(folders)
        page = Page(report.html)
        assert "script" not in page.tags and HOSTILE in page.text
        assert all(image["src"].startswith("data:") for image in page.images)
        assert "<script" not in report.html and "<img src=x" not in report.html


def test_different_data_is_refused_by_name_unless_allowed(make_run):
    runs = [make_run("ours", steps=20), make_run("theirs", steps=20, fingerprint="sha256:bb")]
    with pytest.raises(ConfigError) as caught:
        build_report(runs)
    for part in ("'ours'", "'theirs'", "sha256:aa", "sha256:bb", "--allow-different-data"):
        assert part in str(caught.value)
    assert len(build_report(runs, allow_different_data=True).headlines) == 2


def test_unknown_data_is_compared_with_a_note(make_run):
    runs = [make_run("ours", steps=20), make_run("unknown", steps=20, fingerprint=None)]
    assert "Not checked to be the same data: unknown" in Page(build_report(runs).html).text


def test_what_is_no_run_is_refused(make_run, tmp_path):
    run = make_run("first", steps=20)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds none of config.yaml"):
        build_report([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="holds none of"):
        build_report([tmp_path / "absent"])
    with pytest.raises(ConfigError, match="more than once"):
        build_report([run, run / ".." / "first"])
    with pytest.raises(ConfigError, match="no run folder"):
        build_report([])


def test_equal_folder_names_are_told_apart(make_run):
    runs = [make_run("a/first", steps=20), make_run("b/first", steps=20)]
    assert [x["name"] for x in build_report(runs).headlines] == ["a/first", "b/first"]


def test_unwritable_output_is_a_clear_error_and_leaves_the_old_page(
    make_run, tmp_path, monkeypatch
):
    run = make_run("first", steps=20)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output"):
        write_report([run], tmp_path / "file" / "report.html")
    (run / "report.html").write_text("old")

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_report([run], run / "report.html")
    assert (run / "report.html").read_bytes() == b"old"
    assert not list(run.glob("*.tmp"))


def test_a_chart_that_raises_costs_only_itself(make_run, monkeypatch, caplog):
    def broken(runs):
        raise RuntimeError("no such chart")

    run = make_run("first", steps=20)
    with monkeypatch.context() as patch:
        patch.setattr(report_module, "_SECTIONS", [(broken, None), *report_module._SECTIONS[:2]])
        with caplog.at_level(logging.WARNING):
            page = Page(build_report([run]).html)
    assert page.sections == ["headline", "loss"]
    assert "broken could not be drawn (RuntimeError: no such chart)" in page.text
    caplog.clear()


def test_a_run_folder_whose_name_is_no_utf8_gets_its_page(make_run):
    folder = make_run()
    odd = folder.rename(folder.with_name(os.fsdecode(b"r\xe9s")))
    page = write_report([odd], odd / "report.html")
    assert "r\\udce9s" in page.read_text(encoding="utf-8")
    assert [file.name for file in odd.glob("*.tmp")] == []
