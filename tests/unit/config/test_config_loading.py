"""From files and command-line words to a configuration: precedence, types, and every refusal."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from spectral_scale.config.load import (
    MAX_FILE_BYTES,
    build_parser,
    config_from_dict,
    known_keys,
    load_config,
    to_dict,
)
from spectral_scale.config.named_settings import PAPER
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    """Write a configuration file; its path."""

    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_without_sources_all_values_are_defaults() -> None:
    resolved = load_config()
    assert resolved.config == RunConfig()
    assert set(resolved.sources.values()) == {"default"}
    assert list(resolved.sources) == known_keys()


def test_the_papers_settings_have_one_name_and_yield_to_what_is_given(write) -> None:
    file = write("spectral: {settings: paper, steps_per_iteration: 100}")
    resolved = load_config([file], ["--optimizer.warmup_steps", "50"])
    config, sources = resolved.config, resolved.sources
    assert (config.spectral.storage, config.spectral.trained_sigma) == ("factored", "all")
    assert sources["spectral.storage"] == "spectral.settings paper"
    assert (config.spectral.steps_per_iteration, config.optimizer.warmup_steps) == (100, 50)
    assert config_from_dict(to_dict(config), "stored") == config


def test_the_papers_settings_are_keys_of_the_schema() -> None:
    assert set(PAPER) <= set(known_keys())
    assert load_config([], ["--spectral.settings", "default"]).config == RunConfig()
    with pytest.raises(ConfigError, match=r"spectral\.settings.*published"):
        load_config([], ["--spectral.settings", "published"])


def test_later_sources_win_and_are_named(write) -> None:
    first = write("optimizer: {lr: 0.1, eps: 1.0e-6}\ntrain: {steps: 5}", "first.yaml")
    second = write("optimizer: {lr: 0.2}", "second.yaml")
    words = ["--optimizer.lr=0.3", "--train.seed", "7", "--optimizer.lr", "0.4"]
    resolved = load_config([first, second], words)
    config, sources = resolved.config, resolved.sources
    assert (config.optimizer.lr, sources["optimizer.lr"]) == (0.4, "command line")
    assert (config.optimizer.eps, sources["optimizer.eps"]) == (1e-6, str(first))
    assert (config.train.steps, sources["train.steps"]) == (5, str(first))
    assert (config.train.seed, sources["train.seed"]) == (7, "command line")
    assert sources["optimizer.betas"] == "default"
    only_files = load_config([first, second])
    assert only_files.config.optimizer.lr == 0.2
    assert only_files.sources["optimizer.lr"] == str(second)
    assert load_config([second, first]).config.optimizer.lr == 0.1


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer: {lr: 1e-3}", "optimizer.lr", 1e-3),  # a string to YAML 1.1
        ("optimizer: {lr: 1}", "optimizer.lr", 1.0),
        ("optimizer: {betas: [0.8, 0.9]}", "optimizer.betas", (0.8, 0.9)),
        ("model: {name: null, path: folder}", "model.name", None),
        ("model: {vocab_size: auto}", "model.vocab_size", "auto"),
        ("model: {vocab_size: 77}", "model.vocab_size", 77),
        ("train: {allow_changed: [data.data, model.dropout]}", "train.allow_changed", None),
        ("model:\n  # name: opt-125m\n", "model.name", "opt-tiny"),
        ("", "train.steps", 1000),
    ],
)
def test_file_values_get_their_types(write, text: str, key: str, value: object) -> None:
    config = load_config([write(text)]).config
    section, _, name = key.partition(".")
    found = getattr(getattr(config, section), name)
    if key == "train.allow_changed":
        value = ["data.data", "model.dropout"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--optimizer.lr", "1e-3"], "optimizer.lr", 1e-3),
        (["--optimizer.lr", "-1"], "optimizer.lr", -1.0),  # of the right type; checked later
        (["--train.run_dir=123"], "train.run_dir", "123"),
        (["--train.run_dir=a=b"], "train.run_dir", "a=b"),
        (["--model.name=null"], "model.name", None),
        (["--data.validation", "null"], "data.validation", None),
        (["--optimizer.betas=[0.8, 0.9]"], "optimizer.betas", (0.8, 0.9)),
        (["--train.allow_changed", "[a.b, c.d]"], "train.allow_changed", ["a.b", "c.d"]),
        (["--metrics.tensorboard=false"], "metrics.tensorboard", False),
    ],
)
def test_words_get_their_types(words: list[str], key: str, value: object) -> None:
    section, _, name = key.partition(".")
    found = getattr(getattr(load_config([], words).config, section), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optimizr: {lr: 1}", ["optimizr", "did you mean optimizer?"]),
        ("optimizer: {lrr: 1}", ["optimizer.lrr", "did you mean optimizer.lr?"]),
        ("train: {lr: 1}", ["train.lr", "did you mean"]),
        ("spectral: {rank: 8}", ["spectral.rank", "did you mean spectral.spectral_rank?"]),
        ("1: {a: 2}", ["unknown section 1 (--print-config lists all)"]),
        ("optimizer: {1: 2}", ["unknown key optimizer.1"]),
        ("optimizer: 3", ["section optimizer must hold keys, not 3"]),
        ("optimizer: [a]", ["section optimizer must hold keys, not ['a']"]),
        ("- a\n- b", ["must hold sections", "not a list"]),
        ("hello", ["must hold sections", "not a str"]),
        ("optimizer: {lr: abc}", ["optimizer.lr='abc'", "Expected a float", "--help-config"]),
        ("optimizer: {lr: true}", ["optimizer.lr=True", "Expected a float"]),
        ("train: {steps: 10.5}", ["train.steps=10.5", "Expected an int"]),
        ("train: {steps: true}", ["train.steps=True", "Expected an int"]),
        ("train: {run_dir: 5}", ["train.run_dir=5", "Expected a str"]),
        ("optimizer: {betas: [0.9]}", ["optimizer.betas=[0.9]", "2 elements"]),
        ("spectral: {method: sstt}", ["spectral.method='sstt'", "one of", "'sst'"]),
        ("model: {name: [a]}", ["model.name=['a']", "str"]),
        ("model: {name: a, name: b}", ["name is given twice", "line 1"]),
        ("train: {steps: 1}\ntrain: {seed: 2}", ["train is given twice", "line 2"]),
        ("model: {name: &a x, path: *a}", ["aliases are not allowed", "line 1"]),
        ("model: !!python/object/apply:os.system ['true']", ["not plain YAML", "python/object"]),
        ("model: !!python/name:os.system", ["not plain YAML"]),
        ("model: {name: x", ["not plain YAML"]),
        ("\x00", ["not plain YAML"]),
    ],
)
def test_bad_files_are_refused_by_name(write, text: str, parts: list[str]) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    for part in [str(path), *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--train.step=5"], ["command line", "train.step", "did you mean train.steps?"]),
        (["--steps=5"], ["unknown key steps", "train.steps"]),
        (["--train.steps"], ["--train.steps needs a value"]),
        (["--train.steps", "--train.seed=1"], ["--train.steps needs a value"]),
        (["train.steps=5"], ["'train.steps=5' is not expected", "--section.key value"]),
        (["--train.steps=many"], ["command line: train.steps='many'", "an int"]),
        (["--optimizer.lr="], ["optimizer.lr=''", "a float"]),
        (["--train"], ["unknown key train"]),
    ],
)
def test_bad_words_are_refused_by_name(words: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], words)
    for part in parts:
        assert part in str(caught.value)


def test_values_are_data_and_never_code(write, tmp_path: Path) -> None:
    """A tag that would run a command does not; the file it would have made is not there."""
    witness = tmp_path / "witness"
    path = write(f"train: !!python/object/apply:os.mkdir ['{witness}']")
    with pytest.raises(ConfigError):
        load_config([path])
    assert not witness.exists()


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "huge.yaml").write_text("x: " + "y" * MAX_FILE_BYTES)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"huge\.yaml is larger than 1048576 bytes"):
        load_config([tmp_path / "huge.yaml"])
    with pytest.raises(ConfigError, match=r"binary\.yaml cannot be read"):
        load_config([tmp_path / "binary.yaml"])
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load_config([tmp_path / "none.yaml"])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config([tmp_path])


@pytest.mark.slow
def test_long_values_are_cut_in_messages(write) -> None:
    path = write("model: [" + ", ".join(["x"] * 50_000) + "]")
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    assert len(str(caught.value)) < 400


def test_a_printed_configuration_is_the_same_configuration(write) -> None:
    words = ["--optimizer.betas=[0.8, 0.9]", "--train.allow_changed=[a.b]", "--model.name=null"]
    resolved = load_config([], [*words, "--model.path=x: y # z", "--optimizer.lr=1e-7"])
    for with_sources in (False, True):
        text = resolved.to_yaml(with_sources=with_sources)
        assert load_config([write(text)]).config == resolved.config
    assert config_from_dict(to_dict(resolved.config), "test") == resolved.config
    assert "lr: 1.0e-07  # command line" in resolved.to_yaml(with_sources=True)


def test_every_key_is_described() -> None:
    """`--help-config` has the docstring line of every key of the schema."""
    text = build_parser().format_help()
    for section in dataclasses.fields(RunConfig):
        for key in dataclasses.fields(section.type):
            assert f"--{section.name}.{key.name}" in text
    described = "Number of tokens in a sequence, at most the number of the model's positions."
    assert described in " ".join(text.split())


def test_defaults_are_plain_values() -> None:
    assert yaml.safe_load(yaml.safe_dump(to_dict(RunConfig()))) == to_dict(RunConfig())


@pytest.mark.parametrize(("name", "steps", "ramp"), [("translation", 200, 20), ("graph", 100, 100)])
def test_the_papers_other_tasks_have_names(name: str, steps: int, ramp: int) -> None:
    config = load_config([], ["--spectral.settings", f"paper_{name}"]).config
    assert (config.spectral.storage, config.spectral.trained_sigma) == ("factored", "all")
    found = config.spectral.steps_per_iteration, config.spectral.iteration_warmup_steps
    assert found == (steps, ramp)
    assert config.optimizer == RunConfig().optimizer  # those of the baseline
