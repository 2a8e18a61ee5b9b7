"""The search finds what an estimate of every layout finds, and says why others are not."""

import json
from pathlib import Path

import pytest

from spectral_scale.cli.main import main
from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError
from spectral_scale.plan import search as module
from spectral_scale.plan.build import plan_of
from spectral_scale.plan.gpus import Cluster, assumed_rates, gpu_named
from spectral_scale.plan.inventory import take_inventory
from spectral_scale.plan.memory import memory_of
from spectral_scale.plan.search import Search, candidates, search, title_of
from spectral_scale.plan.step_time import step_seconds

CLUSTERS = {
    "one node": ("opt-1.3b", "a100-80gb", 1, 8, 200),
    "small memory": ("opt-1.3b", "a100-40gb", 1, 4, 200),
    "slow network": ("opt-6.7b", "a100-80gb", 2, 8, 25),
    "large": ("opt-13b", "h100", 16, 8, 400),
    "one GPU": ("opt-125m", "l40s", 1, 1, 200),
}


def config(model: str, ranks: int, *words: str) -> RunConfig:
    fixed = [f"--model.name={model}", "--train.precision=bf16", "--spectral.spectral_rank=64"]
    batch = ["--model.sequence_length=1024", f"--train.global_batch_size={4 * ranks}"]
    return load_config([], [*fixed, *batch, *words]).config


def cluster_of(gpu: str, nodes: int, gpus: int, gigabits: float = 200) -> Cluster:
    rate = gigabits * 1e9 / 8
    return Cluster(gpu=gpu_named(gpu), nodes=nodes, gpus_per_node=gpus, network_rate=rate)


def found_on(cluster: Cluster, run: RunConfig) -> Search:
    rates = assumed_rates(cluster.gpu, run)
    return search(run, rates, cluster, gpu_memory_bytes=cluster.gpu.memory_bytes)


def every_layout(cluster: Cluster, run: RunConfig) -> list[tuple[float, str]]:
    """Step and layout of all that fit, the shortest step first."""
    rates, memory = assumed_rates(cluster.gpu, run), cluster.gpu.memory_bytes
    runs, _ = candidates(run, cluster)
    inventory = take_inventory(runs[0].config, runs[0].architecture)
    steps = []
    for order, one in enumerate(runs):
        if plan_of(one, inventory, gpu_memory_bytes=memory).verdict == "fits":
            seconds = step_seconds(one, inventory, memory_of(one, inventory), rates, cluster)
            steps.append((seconds.step, order, title_of(one.config)))
    return [(step, title) for step, _, title in sorted(steps)]


@pytest.mark.parametrize("name", CLUSTERS)
def test_it_agrees_with_the_estimate_of_every_layout(name: str) -> None:
    model, gpu, nodes, gpus, gigabits = CLUSTERS[name]
    cluster = cluster_of(gpu, nodes, gpus, gigabits)
    run = config(model, cluster.world_size)
    found = found_on(cluster, run)
    expected = every_layout(cluster, run)[: module.SHOWN]
    assert [(x.estimate.step_seconds, x.title) for x in found.best] == expected
    assert found.estimated <= found.candidates


def test_a_wrong_bound_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts that are passed over for a bound that is too high are missed."""
    cluster = cluster_of("a100-80gb", 2, 8, 25)
    run = config("opt-1.3b", 16)
    expected = every_layout(cluster, run)[0][1]
    right = module._shortest

    def wrong(one, *given):  # type: ignore[no-untyped-def]
        return right(one, *given) + 1e3 * (title_of(one.config) == expected)

    monkeypatch.setattr(module, "_shortest", wrong)
    assert found_on(cluster, run).best[0].title != expected


def test_rejected_layouts_have_reasons() -> None:
    cluster = cluster_of("a100-40gb", 1, 4)
    found = found_on(cluster, config("opt-6.7b", 4, "--spectral.method=full"))
    reasons = {x.title: x.reason for x in found.rejected}
    assert any("does not fit" in reason for reason in reasons.values())
    assert "megatron" in reasons["megatron"]
    assert any("tensor_parallel 2" in title for title in reasons)


def test_a_model_that_cannot_fit_is_told_with_what_does() -> None:
    with pytest.raises(
        ConfigError, match=r"no layout fits into 40 GB.*the nearest, .*; take \d+ n"
    ):
        found_on(cluster_of("a100-40gb", 1, 4), config("opt-30b", 16))
    with pytest.raises(ConfigError, match="no layout fits.*choose a smaller model"):
        found_on(cluster_of("a100-40gb", 1, 1), config("opt-66b", 1))


def test_a_batch_that_no_layout_divides() -> None:
    run = config("opt-125m", 1, "--train.global_batch_size=7")
    with pytest.raises(ConfigError, match="no layout can run.*not divisible"):
        found_on(cluster_of("h100", 1, 8), run)


def test_the_command_writes_a_run_that_is_ready(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    words = ["plan", "--search", "--gpu", "h100", "--nodes", "2", "--gpus-per-node", "4"]
    words += ["--model.name=opt-125m", "--train.global_batch_size=32"]
    assert main([*words, "--write", str(file)]) == 0
    text = capsys.readouterr().out
    assert "the best of" in text and "layout" in text
    written = load_config([file]).config
    assert resolve(written, world_size=8).config.model.vocab_size == "auto"
    job = (tmp_path / "run.yaml.sbatch").read_text()
    assert "#SBATCH --nodes=2" in job and "#SBATCH --gpus-per-node=4" in job and str(file) in job
    assert main([*words, "--write", str(file)]) == 78
    assert "exists" in capsys.readouterr().err
    assert main([*words, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"][0]["title"] and found["candidates"] >= found["estimated"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--search"], "--search needs --gpu"),
        (["--search", "--gpu", "h100", "--compare", "sst"], "and not --compare"),
        (["--write", "a.yaml"], "give --search"),
    ],
)
def test_what_the_command_refuses(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 78
    assert message in capsys.readouterr().err
