"""`~` is the home folder in every path that a user writes."""

from pathlib import Path

import pytest

from spectral_scale.cli.main import main
from spectral_scale.config.load import PATH_KEYS, load_config
from spectral_scale.errors import ConfigError
from spectral_scale.files.paths import user_path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize("key", sorted(PATH_KEYS))
def test_every_path_key_is_expanded_in_files_and_on_the_command_line(key: str, home: Path) -> None:
    section, name = key.split(".")
    Path("a.yaml").write_text(f"{section}: {{{name}: ~/x/y}}\n")
    expected = str(home / "x" / "y")
    for resolved in (load_config(["a.yaml"]), load_config([], [f"--{key}=~/x/y"])):
        assert getattr(getattr(resolved.config, section), name) == expected
    with pytest.raises(ConfigError, match=rf"a\.yaml: {key}=.*\$HOME is not expanded here"):
        Path("a.yaml").write_text(f"{section}: {{{name}: $HOME/x}}\n")
        load_config(["a.yaml"])


def test_paths_that_are_left_as_they_are() -> None:
    for text in ("a~b/c", "/x/~y", "runs/x", "embedded", "a$/b"):
        assert user_path(text, what="x") == text
    with pytest.raises(ConfigError, match="there is no such home folder"):
        user_path("~nobody_of_this_name/x", what="x")


@pytest.mark.parametrize("form", [["--input", "~/a.txt"], ["--input=~/a.txt"]])
def test_arguments_of_commands_are_expanded(
    form: list[str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home.mkdir()
    assert main(["prepare", *form, "--train-bpe", "300", "--output=~/out"]) == 78
    assert f"{home / 'a.txt'}: no such file" in capsys.readouterr().err
    assert not Path("~").exists()
    assert main(["prepare", "--input", "~nobody_of_this_name/a", "--output=x"]) == 78


@pytest.mark.parametrize("number", ["0100", "-012", "1:30"])
def test_numbers_that_yaml_would_read_otherwise_are_refused(number: str) -> None:
    Path("a.yaml").write_text(f"train: {{steps: {number}}}\n")
    with pytest.raises(ConfigError, match=f"{number}: not a decimal number"):
        load_config(["a.yaml"])


def test_leading_zeros_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match="--train.steps 0100: not a decimal number"):
        load_config([], ["--train.steps", "0100"])
    assert load_config([], ["--train.run_dir", "0100"]).config.train.run_dir == "0100"
    assert load_config([], ["--train.steps", "0"]).config.train.steps == 0
    assert load_config([], ["--train.seed", "10"]).config.train.seed == 10


@pytest.mark.parametrize("key", ["[0.9, 0.95]", "{a: 1}"])
def test_keys_that_are_no_names_are_refused(key: str) -> None:
    Path("a.yaml").write_text(f"optimizer: {{{key}: 1}}\n")
    with pytest.raises(ConfigError, match="not plain YAML: a key must be a name"):
        load_config(["a.yaml"])
