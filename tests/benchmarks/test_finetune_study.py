"""The fine-tuning study's plan: every run can run, choices follow results, the page shows them."""

from pathlib import Path

import pytest
from finetune_study import settings as declared
from finetune_study.execute import require_same_base
from finetune_study.plan import Trial, all_trials, by_seed, chosen, few, pairs, tuning
from finetune_study.render import changes_table, losses_table, render
from study.results import Result, StudyError

from spectral_scale.config.check import check_config
from spectral_scale.config.load import load_config

FULL, LORA, _, FROD = declared.METHODS
NONE, FILTER, MATCHED, _, REGULARISER = declared.VARIANTS


def result(trial: Trial, loss: float) -> Result:
    return Result(
        name=trial.name,
        stage=trial.stage,
        settings=trial.settings,
        diverged=False,
        validation=[(0, 5.0), (trial.steps, loss)],
        training=[],
        facts={"parameters_trained": 7, "processor_seconds": 1.0},
    )


def complete() -> dict[str, Result]:
    """Results of every run; the larger a rate, the better, and the filter helps by 0.1."""
    found: dict[str, Result] = {}
    while left := [t for t in all_trials(found) if t.name not in found]:
        for trial in left:
            rates = [v for k, v in trial.settings.items() if k.endswith("lr")]
            loss = 4.0 - max(rates) + 0.001 * trial.settings["train.seed"]
            loss -= 0.1 if "filter.kind" in trial.settings else 0.0
            found[trial.name] = result(trial, loss)
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    return complete()


def test_every_run_is_one_that_the_product_takes(results: dict[str, Result]) -> None:
    trials = list(all_trials(results))
    assert len(trials) == len({trial.name for trial in trials}) == len(results)
    kinds = {tuple(n for n in t.name.split("-") if not n[-1].isdigit()): t for t in trials}
    assert len(kinds) > 2 * len(pairs())  # of each one will do
    for trial in kinds.values():
        values = trial.settings | declared.SHAPE  # its shapes stand for those of the folder
        words = [f"--{k}={'null' if v is None else v}" for k, v in values.items()]
        assert check_config(load_config([], words).config, world_size=1)


def test_variants_wait_for_the_rate_of_the_method_alone() -> None:
    assert {t.name.split("-")[2] for t in all_trials({})} == {"none"}
    assert chosen(FULL, FILTER, {}) is None


def test_choices_follow_the_losses(results: dict[str, Result]) -> None:
    best = chosen(FROD, NONE, results)
    assert best is not None
    widest = 4 * 2**declared.WIDER * FROD.first_rate  # the largest is best, so more are tried
    assert best.settings["optimizer.spectral_lr"] == pytest.approx(widest)
    filtered = chosen(FROD, FILTER, results)
    assert filtered is not None
    assert filtered.settings["optimizer.spectral_lr"] == pytest.approx(
        widest * 2 * 2**declared.WIDER, rel=1e-2
    )
    matched = chosen(FROD, MATCHED, results)
    assert matched is not None
    assert matched.settings == filtered.settings | {"filter.norm_matched": True}
    seeds = by_seed(FROD, FILTER, results)
    assert [run.settings["train.seed"] for run in seeds] == list(declared.SEEDS)
    assert len({run.settings["optimizer.spectral_lr"] for run in seeds}) == 1


def test_nothing_is_tried_beyond_values_whose_best_lies_between() -> None:
    tried = tuning(FULL, NONE, {})
    losses = {t.name: result(t, abs(t.settings["optimizer.lr"] - FULL.first_rate)) for t in tried}
    assert tuning(FULL, NONE, losses) == tried
    best = chosen(FULL, NONE, losses)
    assert best is not None
    assert best.settings["optimizer.lr"] == FULL.first_rate
    assert [t.settings for t in few(FULL, 8, losses)] == [
        best.settings | {"data.examples": 8, "train.seed": seed} for seed in (0, 1, 2)
    ]


def test_results_of_another_base_are_refused(results: dict[str, Result]) -> None:
    with pytest.raises(StudyError, match="another pretrained model"):
        require_same_base(results, "a")


def test_lora_has_no_regulariser() -> None:
    assert (LORA, REGULARISER) not in pairs()
    assert (FROD, REGULARISER) in pairs()


def test_tables_show_what_is_done(results: dict[str, Result]) -> None:
    assert "| full | 3.9850 ± 0.0010 |" in losses_table(results)
    assert "(of 1 seeds)" not in losses_table(results)
    assert "| –" in changes_table(results)  # LoRA's regulariser
    partial = {n: r for n, r in results.items() if r.stage == "tune"}
    assert "(of 1 seeds)" in losses_table(partial)
    assert "| full | – | – | – | – | – |" in losses_table({})


def test_the_page_takes_tables_between_its_markers(
    results: dict[str, Result], tmp_path: Path
) -> None:
    page = Path(__file__).parents[2] / "docs" / "finetune_study.md"
    (tmp_path / page.name).write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    written = render(results, tmp_path)
    assert [Path(p).name for p in written] == ["finetune_study.md", "curves.png"]
    text = (tmp_path / page.name).read_text(encoding="utf-8")
    assert "the study is complete" in text
    assert "3.9850 ± 0.0010" in text
