"""The plan: valid settings, an informative order, results that fit or are refused."""

import functools
from dataclasses import replace

import pytest
from study import settings as declared
from study.plan import all_trials, chosen_rate, settings_of, tuned_variants, unknown_results
from study.results import StudyError, read_results, require_same_data, write_result
from study.trial import Trial
from study_results import complete, result_of

from spectral_scale.config.check import check_config, keys_without_effect
from spectral_scale.config.load import load_config


@functools.cache
def _config(words):
    return load_config([], words).config


def config_of(settings):
    values = {k: str(v).lower() if isinstance(v, bool) else v for k, v in settings.items()}
    return _config(tuple(f"--{key}={value}" for key, value in values.items()))


def test_every_declared_run_is_a_valid_configuration():
    results = complete()
    trials = all_trials(results)
    assert len(trials) == len({trial.name for trial in trials}) == len(results)
    for trial in trials:
        if trial.stage != "tune" and trial.settings["train.seed"] == 0:  # tuning differs in rates
            check_config(config_of(trial.settings), world_size=1)


def test_no_declared_setting_is_without_effect():
    for variant in declared.VARIANTS:
        assert keys_without_effect(config_of(settings_of(variant, 3e-3, 4e-3))) == [], variant.name
    vain = settings_of(declared.FULL, 3e-3, None) | {"spectral.spectral_rank": 12}
    assert keys_without_effect(config_of(vain)) == ["spectral.spectral_rank"]


def test_each_ablation_changes_the_base_run():
    trials = {t.name: t.settings for t in all_trials(complete()) if t.stage == "ablation"}
    base = config_of(trials.pop("ablation-base"))
    assert len(trials) == len(declared.ABLATIONS) - 1 + len(declared.CONFIRMED)
    configs = [config_of(settings) for settings in trials.values()]
    assert all(config != base for config in configs)
    assert len(set(map(repr, configs))) == len(configs)


def test_each_variant_is_tried_once_before_any_is_tried_twice():
    order = [t.name for t in all_trials(complete()) if t.stage == "tune"]
    others = order[declared.TUNING_RUNS :]
    first_turn = others[: len(tuned_variants()) - 1]
    assert len({name.split("-")[1] for name in first_turn}) == len(first_turn)


def test_ablations_come_before_finals_and_finals_of_one_seed_before_the_next():
    order = [t for t in all_trials(complete()) if t.stage in ("final", "ablation")]
    keys = [(t.stage == "final", t.settings["train.seed"]) for t in order]
    assert keys == sorted(keys)


def test_dense_parameters_take_the_rate_tuned_for_full_rank():
    def loss(trial: Trial) -> float:
        wanted = trial.settings["optimizer.lr"] == 4e-3 and trial.name.startswith("tune-full")
        return 4.0 if wanted else 5.0

    results = complete(loss)
    assert chosen_rate(results, declared.FULL) == 4e-3
    others = [t for t in all_trials(results) if t.stage == "final" and "full" not in t.name]
    assert {t.settings["optimizer.lr"] for t in others} == {4e-3}


def test_what_depends_on_missing_results_waits():
    waiting = [t for t in all_trials({}) if t.settings is None]
    ready = [t.name for t in all_trials({}) if t.settings is not None]
    assert ready[0] == "tune-full-lr_0.002"
    assert all(name.startswith(("tune-full", "dip")) for name in ready)
    assert all(trial.waits_for for trial in waiting)


def test_a_result_with_other_settings_is_refused():
    results = complete()
    name = "final-full-seed_0"
    changed = replace(results[name], settings=results[name].settings | {"optimizer.eps": 1e-6})
    with pytest.raises(StudyError, match=r"final-full-seed_0.*optimizer.eps: 1e-06 -> 1e-08"):
        all_trials(results | {name: changed})


def test_results_of_other_data_are_refused():
    results = complete()
    name = "final-full-seed_0"
    changed = replace(results[name], facts={"data_fingerprint": "poems"})
    require_same_data(results)
    with pytest.raises(StudyError, match="different data"):
        require_same_data(results | {name: changed})


def test_results_survive_their_files_and_foreign_ones_are_named(tmp_path):
    trial = all_trials({})[0]
    result = result_of(trial, 5.25)
    write_result(tmp_path, result)
    assert read_results(tmp_path) == {trial.name: result}
    write_result(tmp_path, replace(result, name="tune-other"))
    assert unknown_results(read_results(tmp_path)) == ["tune-other"]


@pytest.mark.parametrize("content", ["", "[]", '{"format": "other", "format_version": 1}', "{"])
def test_a_damaged_result_is_named(tmp_path, content):
    (tmp_path / "tune-x.json").write_text(content)
    with pytest.raises(StudyError, match=r"tune-x\.json is no result .* remove it"):
        read_results(tmp_path)
