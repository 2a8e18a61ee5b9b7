"""The page: every number comes from a result, what is missing is said."""

import re

import pytest
from study import settings as declared
from study.dip import dip_ratios
from study.figures import draw_figures
from study.plan import all_trials
from study.render import BEGIN, END, measured, render
from study.results import StudyError
from study.tables import ablation_table, curve_table, finals_table, tuning_table
from study_results import complete, result_of

LOSS = re.compile(r"\d+\.\d{4}")


def test_without_results_the_page_holds_no_measured_number(tmp_path):
    page = measured({}, draw_figures({}, tmp_path))
    assert not LOSS.search(re.sub(r"`[^`]*`", "", page))  # names of settings apart
    assert "Nothing has been measured yet." in page
    assert list(tmp_path.iterdir()) == []
    for trial in all_trials({}):
        assert f"`{trial.name}`" in page


def test_a_mean_needs_every_seed():
    results = complete(
        until=lambda trial: trial.stage == "final" and trial.settings["train.seed"] == 1
    )
    seeds = [len(variant.seeds) for variant in declared.VARIANTS if variant.seeds]
    both = [n == len(declared.SEEDS) for n in seeds]
    assert any(both) and not all(both)
    first, every = (finals_table(r).splitlines()[2:] for r in (results, complete()))
    # The loss of the first seed; with all of the variant's seeds, their mean, too.
    assert [row.count("5.0000") for row in first] == [1 if two else 2 for two in both]
    assert [row.count("5.0000") for row in every] == [n + 1 for n in seeds]
    curves = [LOSS.search(row) for row in curve_table(results).splitlines()[2:]]
    assert [found is None for found in curves] == both


def test_differences_are_to_full_rank_and_to_the_base_run():
    losses = {"final-lora_r12-seed_0": 5.5, "final-lora_r12-seed_1": 5.25, "ablation-rate_x2": 4.9}
    results = complete(lambda trial: losses.get(trial.name, 5.0))
    lora = next(row for row in finals_table(results).splitlines() if "LoRA, r = 12" in row)
    assert "| 5.5000 | 5.2500 | 5.3750 |" in lora
    assert "+0.3750" in lora
    rate = next(row for row in ablation_table(results).splitlines() if "rate x 2" in row)
    assert "4.9000 | -0.1000" in rate
    del results["ablation-base"]
    assert "-0.1000" not in ablation_table(results)


def test_a_diverged_run_is_called_so():
    results = complete()
    trial = next(t for t in all_trials(results) if t.name == "final-lora_r12-seed_0")
    results[trial.name] = result_of(trial, diverged=True)
    lora = next(row for row in finals_table(results).splitlines() if "LoRA, r = 12" in row)
    assert lora.count("diverged") == 3  # the seed, the mean and its perplexity
    assert "inf" not in lora


def test_a_best_rate_at_the_edge_is_said():
    results = complete(lambda t: 6.0 - 1e2 * t.settings.get("optimizer.spectral_lr", 0.0))
    lora = next(row for row in tuning_table(results).splitlines() if "LoRA, r = 12" in row)
    assert "**0.008: 5.2000**" in lora
    assert "at the edge" in lora


def test_the_dip_is_measured_just_after_each_boundary():
    trial = next(t for t in all_trials({}) if t.name == "dip-relora_r12")
    result = result_of(trial)
    assert dip_ratios(result) == ([1.0] * 5, [1.0] * 5)
    norms = result.gradient_norms["low_rank"]
    for step in range(50, 300, 50):
        norms[step] = 0.25  # of the step that follows step 50, 100, ...
    first, window = dip_ratios(result)
    assert first == [0.25] * 5
    assert window == pytest.approx([0.925] * 5)


def test_only_the_part_between_the_marks_is_replaced(tmp_path):
    (tmp_path / "study.md").write_text(f"words\n{BEGIN}\nold\n{END}\nmore words\n")
    written = render(complete(), tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert text.startswith("words\n") and text.endswith("\nmore words\n") and "old" not in text
    assert "None: every declared run is done." in text
    names = {name.rpartition("/")[2] for name in written}
    assert names == {
        "study.md", "tuning.png", "curves.png", "ablations.png", "epsilon.png", "gradient_norm.png"
    }  # fmt: skip
    again = (tmp_path / "study/curves.png").read_bytes()
    render(complete(), tmp_path)
    assert (tmp_path / "study/curves.png").read_bytes() == again
    (tmp_path / "study.md").write_text("no marks")
    with pytest.raises(StudyError, match="lacks the lines"):
        render(complete(), tmp_path)
