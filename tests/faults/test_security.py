"""Nothing that a run reads executes, leaves its folder, or gives a secret away."""

import os
import pickle
import re
import socket
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectral_scale.cli.main import main
from spectral_scale.testing.tiny import tiny_words

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "model__num_layers": 1,
    "train__steps": 3,
    "train__eval_interval": 100,
    "checkpoint__interval": 1,
    "data__validation_sequences": 4,
}


class Bomb:
    """A pickle that leaves a file where it explodes."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.crater),)


@pytest.fixture
def crater(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "exploded"
    assert not (tmp_path / "exploded").exists(), "a file was executed"


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").is_dir()


PLANTED = (
    *("checkpoints/step_00000003/.metadata", "checkpoints/step_00000003/__0_0.distcp"),
    *("checkpoints/step_00000003/optimizer.pt", "checkpoints/latest", "checkpoints/rng.pkl"),
    *("tensorboard/x.pkl", "trainer_state.pt", "sitecustomize.py", "torch.py"),
)


def test_nothing_in_a_run_folder_executes(corpus: Path, tmp_path: Path, crater: Path) -> None:
    """Files that other frameworks would unpickle or import lie in every place they look at."""
    run_dir = tmp_path / "run"
    assert main(["train", *tiny_words(corpus, run_dir, **SMALL)]) == 0
    for name in PLANTED:
        path = run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        code = f"import os; os.mkdir({str(crater)!r})".encode()
        path.write_bytes(code if name.endswith(".py") else pickle.dumps(Bomb(crater)))
    assert main(["train", *tiny_words(corpus, run_dir, **SMALL | {"train__steps": 4})]) == 0
    for command in ("evaluate", "report", "verify", "status"):
        assert main([command, str(run_dir)]) == 0, command


def test_a_dataset_s_script_does_not_execute(
    tmp_path: Path, crater: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(crater)!r})")
    words = ["--train-bpe", "300", "--output", str(tmp_path / "prepared")]
    assert main(["prepare", "--input", f"hf:{folder}", *words]) != 0
    assert "evil" in capsys.readouterr().err


TAGS = (
    "!!python/object/apply:os.mkdir [{crater}]",
    "!!python/object/new:os.mkdir [{crater}]",
    "!!python/name:os.mkdir",
    "!!python/module:os",
)


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_that_would_execute_is_refused(
    corpus: Path, tmp_path: Path, crater: Path, tag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the file that is given, and in the one that a run folder holds."""
    text = f"train:\n  run_dir: {tag.format(crater=crater)}\n"
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["train", "--config", str(file)]) == 78
    assert "not plain YAML" in capsys.readouterr().err
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(text)
    (run_dir / "status.json").write_text("{}")
    assert main(["evaluate", str(run_dir)]) != 0
    assert main(["report", str(run_dir)]) in (0, 1, 78)


def test_the_unsafe_loader_would_have_executed_it(tmp_path: Path) -> None:
    yaml.unsafe_load(TAGS[0].format(crater=tmp_path / "exploded"))
    assert (tmp_path / "exploded").is_dir()


SECRETS = {
    "HF_TOKEN": "hf_plantedtokenplantedtokenplanted",
    "HUGGING_FACE_HUB_TOKEN": "hf_anotherplantedtokenplanted",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIplantedplantedEXAMPLEKEY",
    "MY_PASSWORD": "planted-correct-horse-battery",
}


def leaks(folder: Path) -> list[str]:
    """Files that hold one of the planted secrets."""
    return [
        f"{path.relative_to(folder)}: {name}"
        for path in folder.rglob("*")
        if path.is_file()
        for name, secret in SECRETS.items()
        if secret.encode() in path.read_bytes()
    ]


def test_no_secret_reaches_a_file_of_the_run_folder(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is saved, reported, and one that fails with a traceback."""
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    run_dir = tmp_path / "run"
    words = tiny_words(corpus, run_dir, **SMALL, metrics__tensorboard=True)
    assert main(["train", *words]) == 0
    monkeypatch.setattr("spectral_scale.engine.loop.token_loss_sum", lambda *_: {}["no such batch"])
    with pytest.raises(KeyError):
        main(["train", *words, "--train.steps=5"])
    assert leaks(run_dir) == []
    (run_dir / "planted").write_text(SECRETS["HF_TOKEN"])
    assert leaks(run_dir) == ["planted: HF_TOKEN"], "the search finds what is there"


OPEN_TO_ALL = re.compile(r"--bind_all|--host[ =]0\.0\.0\.0|--host[ =]::")


def test_no_instruction_opens_tensorboard_to_the_network() -> None:
    command = ["git", "ls-files", "*.md", "*.py", "*.sh", "*.sbatch", "launch/*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.split() or ["README.md", "SECURITY.md"]
    this = str(Path(__file__).relative_to(ROOT))
    texts = {n: (ROOT / n).read_text(encoding="utf-8") for n in names if n != this}
    assert [name for name, text in texts.items() if OPEN_TO_ALL.search(text)] == []
    assert OPEN_TO_ALL.search("tensorboard --logdir x --bind_all")


def test_stopping_and_saving_follow_no_link_out_of_the_run_folder(tmp_path: Path) -> None:
    """Removing STOP removes the link, not what it points to."""
    from spectral_scale.supervision.control_files import ControlFiles

    outside = tmp_path / "outside"
    outside.write_text("now")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "STOP").symlink_to(outside)
    control_files = ControlFiles(run_dir)
    control_files.remove_all()
    assert outside.read_text() == "now" and not (run_dir / "STOP").is_symlink()


def test_a_hostile_heartbeat_names_no_foreign_process(tmp_path: Path) -> None:
    """A hanging rank's process is ended by number: only one that began when it says is."""
    from spectral_scale.supervision.heartbeat import Beat, process_of

    beat = Beat(rank=1, host=socket.gethostname(), pid=os.getppid(), born=0.0)
    assert process_of(beat) is None


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_the_lock_names_every_file_and_agrees_with_the_pins(build: str) -> None:
    text = (ROOT / f"requirements-linux-x86_64-py311-{build}.lock").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith(("#", "--"))]
    locked = {}
    for line in lines:
        name, version = re.fullmatch(
            r"([\w.-]+)==([\w.+]+)(?: --hash=sha256:[0-9a-f]{64})+", line
        ).groups()
        locked[name.lower().replace("_", "-")] = version.partition("+")[0]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in pins if "==" in line and line[0] != "#")
    assert {n: v for n, v in locked.items() if n in pinned and pinned[n] != v} == {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {re.match(r"[\w.-]+", line)[0].lower() for line in project["dependencies"]}
    assert wanted <= locked.keys()
    assert ("nvidia-nccl-cu13" in locked) is (build == "cuda")
    index = "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert (index in text.splitlines()) is (build == "cpu")


def lock_of(*packages: tuple[str, str]) -> str:
    """What launch/lock.py makes of a report that names these packages and versions."""
    import runpy

    install = [
        {
            "metadata": {"name": name, "version": version},
            "download_info": {"archive_info": {"hashes": {"sha256": "0" * 64}}},
        }
        for name, version in packages
    ]
    facts = {"python_full_version": "3.11.7", "sys_platform": "linux", "platform_machine": "x86_64"}
    make = runpy.run_path(str(ROOT / "launch" / "lock.py"))["lock"]
    text: str = make({"environment": facts, "install": install})
    return text


@pytest.mark.parametrize(
    ("version", "index"), [("2.13.0", None), ("2.13.0+cpu", "cpu"), ("2.13.0+cu126", "cu126")]
)
def test_the_lock_names_the_index_of_its_build(version: str, index: str | None) -> None:
    text = lock_of(("torch", version), ("numpy", "2.4.6"))
    named = [line for line in text.splitlines() if line.startswith("--")]
    wanted = (
        [] if index is None else [f"--extra-index-url https://download.pytorch.org/whl/{index}"]
    )
    assert named == wanted
    assert f"torch=={version} --hash=sha256:{'0' * 64}" in text
