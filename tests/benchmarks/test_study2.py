"""The second study: valid settings, its order, its rates, and a page of what was measured."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from study.render import BEGIN, END
from study.results import Result, StudyError, read_results, write_result
from study.settings import TUNING_RUNS, Settings
from study.trial import Trial
from study2 import settings as declared
from study2.axes import at, over_seconds, over_tokens, state_bytes
from study2.figures import draw_figures
from study2.listing import listing
from study2.plan import all_trials, group, width_of
from study2.prepare import make_tokenizer
from study2.render import measured, render
from study2.tables import finals_table, rank_table, time_table, tuning_table

from spectral_scale.config.check import check_config, keys_without_effect
from spectral_scale.config.presets import linear_shapes, resolve_architecture
from spectral_scale.config.schema import RunConfig

LOSS = re.compile(r"\d+\.\d{4}")
SECONDS = {True: 0.5, False: 0.25}
"""A made-up step of methods other than dense training and of dense training."""


def config_of(settings: Settings) -> RunConfig:
    """The configuration of a run, without the seconds that its command line takes to be read."""
    run = RunConfig()
    for key, value in settings.items():
        section, _, name = key.partition(".")
        run = replace(run, **{section: replace(getattr(run, section), **{name: value})})
    return run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Width 128 with four variants, and width 64 with dense training."""
    names = {declared.WIDTH: (declared.FULL, "tangent_adam", declared.SST, declared.LORA)}
    names[declared.SMALL] = (declared.FULL,)
    variants = {w: [declared.variant(n, w) for n in of] for w, of in names.items()}
    monkeypatch.setattr(declared, "VARIANTS", variants)


_WHOLE: dict[str, Result] = {}


@pytest.fixture
def whole(small: None) -> dict[str, Result]:
    """Results of the whole small study, made up once."""
    if not _WHOLE:
        _WHOLE.update(complete(bowl))
    return _WHOLE


def rate_of(trial: Trial) -> float:
    settings = trial.settings or {}
    return settings.get("optimizer.spectral_lr", settings["optimizer.lr"])


def result_of(trial: Trial, loss: float) -> Result:
    settings = dict(trial.settings or {})
    steps = sorted({*range(0, trial.steps, settings["train.eval_interval"]), trial.steps})
    a_step = SECONDS["spectral.spectral_rank" in settings]
    tokens = declared.TOKENS_PER_STEP
    return Result(
        name=trial.name,
        stage=trial.stage,
        settings=settings,
        diverged=False,
        validation=[(step, loss + 1e-3 * (trial.steps - step)) for step in steps],
        training=[(trial.steps, loss)],
        costs=[(step, step * tokens, step * a_step, 1_500_000) for step in steps],
        facts={
            "data_fingerprint": "books",
            "machine": {"cpu": "a processor", "cores": 2},
            "versions": {"torch": "2"},
            "commit": "abc",
        },
    )


def complete(
    loss_of: Callable[[Trial], float], until: Callable[[Trial], bool] = lambda _: False
) -> dict[str, Result]:
    """Results of all runs in the order of the plan, up to the first that `until` names."""
    results: dict[str, Result] = {}
    while True:
        left = [t for t in all_trials(results) if t.name not in results and t.settings]
        if not left or until(left[0]):
            return results
        results[left[0].name] = result_of(left[0], loss_of(left[0]))


def bowl(trial: Trial) -> float:
    """A loss with its best rate at 4e-3 for every variant; final runs lose less the more train."""
    if trial.stage == "tune":
        return 2.0 + abs(rate_of(trial) - 4e-3)
    return 1.7 if "full" in trial.name else 1.8


def test_every_declared_run_is_a_valid_configuration_in_which_nothing_is_vain() -> None:
    for width, variants in declared.VARIANTS.items():
        for variant in variants:
            settings = group(width).settings_of(variant, 3e-3, 4e-3) | declared.FINAL
            config = config_of(settings)
            check_config(config, world_size=1)
            assert keys_without_effect(config) == [], variant.name
    by_name = {v.name: v for v in declared.VARIANTS[declared.WIDTH]}
    for change in (*declared.RANK_CHANGES, *declared.ABLATIONS):
        variant = by_name[f"w{declared.WIDTH}_{change.of}"]
        base = group(declared.WIDTH).settings_of(variant, 3e-3, 4e-3)
        config = config_of(base | change.settings)
        check_config(config, world_size=1)
        assert config != config_of(base) and keys_without_effect(config) == [], change.run(0)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_the_blocks_hold_the_parameters(width: int) -> None:
    """Weights of the linears, against embeddings, positions (two more than tokens), 9 d of biases
    and 4 d of norms a block, and the last norm."""
    settings = declared.common(width) | {"model.vocab_size": declared.VOCABULARY}
    shapes = resolve_architecture(config_of(settings).model)
    blocks = declared.LAYERS * sum(m * n for m, n in linear_shapes(shapes).values())
    assert blocks == 2 * 12 * width**2
    rest = width * (shapes.vocab_size + shapes.max_positions + 2 + 13 * declared.LAYERS + 2)
    assert blocks > 0.85 * (blocks + rest)


def test_iterations_make_six_rounds() -> None:
    rounds = declared.FINAL_STEPS / (declared.T3 * declared.RANK_FRACTION)
    assert rounds >= 6 and declared.FINAL_STEPS <= 3000


def test_the_whole_study_takes_at_most_twenty_processor_hours() -> None:
    last = listing({}, 1).splitlines()[-1]
    hours = float(re.search(r"about ([\d.]+) h", last)[1])
    assert 5 < hours <= 20, last


def test_the_most_telling_runs_come_first(whole: dict[str, Result]) -> None:
    """Of width 128 the core first, each of its variants once before any twice; seeds in turn."""
    order = all_trials(whole)
    widths = [width_of(t) for t in order]
    assert widths == sorted(widths, reverse=True)
    of_main = [t for t in order if width_of(t) == declared.WIDTH]
    names = [t.name.split("-")[1] for t in of_main if t.stage in ("tune", "final")]
    assert names.index("w128_tangent_adam") > max(i for i, n in enumerate(names) if "lora" in n)
    tunes = [t.name.split("-")[1] for t in of_main if t.stage == "tune"]
    assert tunes[:5] == [*["w128_full"] * 3, "w128_sst_residual", "w128_lora"]
    finals = [t.settings["train.seed"] for t in of_main if t.stage == "final"]
    assert finals == [0] * 3 + [1] * 3 + [2] * 3 + [0, 1, 2]


def test_a_best_rate_at_an_edge_is_followed(small: None) -> None:
    """Towards small rates, seven at most, and no further try where the best one lies inside."""
    lora = declared.variant(declared.LORA, declared.WIDTH)

    def falling(trial: Trial) -> float:
        return 2.0 + rate_of(trial) if "lora" in trial.name else bowl(trial)

    results = complete(falling, until=lambda t: t.stage == "final")
    tried = group(declared.WIDTH).tuned_rates(results, lora)
    assert len(tried) == declared.MOST_RATES and min(tried) == pytest.approx(4e-3 / 32, rel=0.02)
    row = next(r for r in tuning_table(results).splitlines() if "| LoRA |" in r)
    assert row.endswith("| chosen at an edge |")
    inside = complete(bowl, until=lambda t: t.stage == "final")
    assert len(group(declared.WIDTH).tuned_rates(inside, lora)) == TUNING_RUNS
    assert group(declared.WIDTH).chosen_rate(inside, lora) == 4e-3


def test_dense_parameters_take_the_dense_rate_of_their_width(whole: dict[str, Result]) -> None:
    for trial in all_trials(whole):
        if trial.stage == "final":
            assert trial.settings["optimizer.lr"] == 4e-3
            assert trial.settings["optimizer.decay_steps"] == 450


def test_the_three_axes_are_read_from_the_same_run(whole: dict[str, Result]) -> None:
    run = whole["final-w128_tangent_adam-seed_0"]
    assert over_tokens(run)[-1] == (3000 * 2048, 1.8)
    assert over_seconds(run)[-1] == (1500.0, 1.8)
    assert state_bytes(run) == 1_500_000
    assert at(over_seconds(run), 1500.0 - 75.0 / 2) == pytest.approx(1.8 + 0.075)
    assert at(over_seconds(run), 1501.0) is None
    # At 750 s of dense training's 750 s, half of this run is done.
    row = next(r for r in time_table(whole, 128).splitlines() if "tangent, AdamW |" in r)
    assert "| 2.00 |" in row
    half = 1.8 + 1e-3 * (3000 - 0.5 * 1500)
    assert f"| {half:.4f} |" in row


def test_a_claim_needs_every_seed(whole: dict[str, Result]) -> None:
    part = {name: result for name, result in whole.items() if "seed_2" not in name}
    rows = {r.split("|")[1].strip(): r for r in finals_table(part, 128).splitlines()}
    assert "+0.1" not in rows["LoRA"] and rows["LoRA"].count("1.8000") == 2
    rows = {r.split("|")[1].strip(): r for r in finals_table(whole, 128).splitlines()}
    assert "| +0.1000 | +0.1000 to +0.1000 | 1.00 |" in rows["LoRA"]
    assert "+0.1000 | +0.1000 | +0.1000 | +0.1000" in rank_table(whole)


def test_without_results_the_page_holds_no_measured_number(tmp_path: Path) -> None:
    page = measured({}, draw_figures({}, tmp_path))
    assert not LOSS.search(re.sub(r"`[^`]*`", "", page))
    assert "Nothing has been measured yet." in page and list(tmp_path.iterdir()) == []
    for trial in all_trials({}):
        assert f"`{trial.name}`" in page


def test_the_page_is_written_between_its_marks(whole: dict[str, Result], tmp_path: Path) -> None:
    (tmp_path / "study2.md").write_text(f"words\n{BEGIN}\nold\n{END}\nmore words\n")
    written = render(whole, tmp_path)
    text = (tmp_path / "study2.md").read_text()
    assert text.startswith("words\n") and text.endswith("\nmore words\n") and "old" not in text
    names = {name.rpartition("/")[2] for name in written}
    assert names == {
        *("study2.md", "tokens.png", "seconds.png", "bytes.png", "rank.png", "tuning.png")
    }
    assert all(f"study2/{name}" in text for name in names if name.endswith(".png"))


def test_costs_survive_their_file_and_other_settings_are_refused(tmp_path: Path) -> None:
    trial = all_trials({})[0]
    result = result_of(trial, 2.0)
    write_result(tmp_path, result)
    assert read_results(tmp_path) == {trial.name: result}
    changed = replace(result, settings=result.settings | {"optimizer.eps": 1e-6})
    with pytest.raises(StudyError, match="optimizer.eps: 1e-06 -> default"):
        all_trials({trial.name: changed})


def test_the_vocabulary_is_the_most_frequent_characters(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = "".join(chr(200 + i) * (i + 1) for i in range(130)) + "\n  x"
    (tmp_path / "a.jsonl").write_text(f'{{"text": {json_text(text)}}}\n', encoding="utf-8")
    folder = make_tokenizer([tmp_path / "a.jsonl"], tmp_path / "characters")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == declared.VOCABULARY
    ids = tokenizer("Š" + chr(329) + chr(329) + chr(200))["input_ids"]
    assert len(ids) == 4 and ids[1] == ids[2] == 2 and ids[3] == 1  # the rarest is unknown


def json_text(text: str) -> Any:
    import json

    return json.dumps(text)
