"""The roofline of a step: which rate limits what, and what each method adds."""

from dataclasses import replace

import pytest

from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import ResolvedRun, resolve
from spectral_scale.metrics.flops import sst_linear_flops
from spectral_scale.plan.gpus import Cluster, Rates, assumed_rates, gpu_named
from spectral_scale.plan.inventory import Inventory, take_inventory
from spectral_scale.plan.memory import memory_of
from spectral_scale.plan.method_needs import method_work
from spectral_scale.plan.step_time import StepSeconds, pass_costs, step_seconds

CLUSTER = Cluster(gpu=gpu_named("a100-80gb"), nodes=2, gpus_per_node=4)
FIXED = ("--model.name=opt-125m", "--train.precision=bf16", "--train.global_batch_size=64")


def made(*words: str, world_size: int = 8) -> tuple[ResolvedRun, Inventory]:
    config = load_config([], [*FIXED, *words]).config
    run = resolve(config, world_size=world_size)
    return run, take_inventory(run.config, run.architecture, run.method)


def seconds(*words: str) -> StepSeconds:
    run, inventory = made(*words)
    rates = assumed_rates(CLUSTER.gpu, run.config)
    return step_seconds(run, inventory, memory_of(run, inventory), rates, CLUSTER)


def test_flops_of_products_are_the_formulas() -> None:
    run, inventory = made("--spectral.spectral_rank=64")
    tokens = run.config.train.micro_batch_size * run.config.model.sequence_length
    costs = pass_costs(run, inventory, blocks_alone=True)
    layers = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    expected = 12 * sum(sst_linear_flops(m, n, 64, tokens, "residual") for m, n in layers)
    assert sum(flops for flops, _ in costs.products) == expected
    whole = pass_costs(run, inventory)
    assert sum(f for f, _ in whole.products) == expected + 6 * tokens * 50272 * 768


def test_each_rate_limits_its_own_part() -> None:
    costs = pass_costs(*made())
    fast = Rates(
        products=1e30, exact_products=1e30, memory=1e30, decompositions=1e30,
        launch_seconds=0.0, peak=None, source="",
    )  # fmt: skip
    assert costs.seconds(fast) < 1e-12
    flops = sum(f for f, _ in costs.products) + costs.attention_flops
    assert costs.seconds(replace(fast, products=1e12)) == pytest.approx(flops / 1e12)
    moved = sum(b for _, b in costs.products) + costs.moved_bytes
    assert costs.seconds(replace(fast, memory=1e12)) == pytest.approx(moved / 1e12)
    queued = costs.seconds(replace(fast, launch_seconds=1e-5))
    assert queued == pytest.approx(costs.launches * 1e-5)


def test_recomputation_costs_a_forward_pass_of_the_blocks() -> None:
    plain, again = made(), made("--model.activation_checkpointing=true")
    before, after = pass_costs(*plain), pass_costs(*again)
    assert after.attention_flops == pytest.approx(4 / 3 * before.attention_flops)
    assert after.launches > before.launches
    assert sum(f for f, _ in after.products) > sum(f for f, _ in before.products)


def test_tensor_parallel_ranks_divide_the_work() -> None:
    parallel = ["--parallel.backend=fsdp2"]
    one = pass_costs(*made(*parallel))
    two = pass_costs(*made(*parallel, "--parallel.tensor_parallel=2"))
    flops_one, flops_two = (sum(f for f, _ in costs.products) for costs in (one, two))
    # Factors that every rank holds whole are not divided.
    assert flops_one / 2 < flops_two < 0.6 * flops_one


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--spectral.method=frod",), "exact_flops"),
        (("--spectral.method=full",), None),
    ],
)
def test_weights_that_are_formed(words: tuple[str, ...], part: str | None) -> None:
    costs = pass_costs(*made(*words))
    assert (costs.exact_flops > 0) is (part is not None)


def test_swaps_and_decompositions() -> None:
    sst, dense = seconds(), seconds("--spectral.method=full")
    assert sst.swap > 0 and 0 < sst.swap_share < 0.2
    assert (dense.swap, dense.swap_every, dense.swap_share) == (0, 0, 0)
    often = seconds("--spectral.steps_per_iteration=50")
    assert often.swap_a_step == pytest.approx(4 * sst.swap_a_step)
    galore = seconds("--spectral.method=galore")
    assert galore.swap > sst.swap  # every renewal decomposes every gradient
    assert galore.optimizer > 0
    run, inventory = made("--spectral.storage=factored")
    work = method_work(run.config, inventory, run.world_size)
    assert work.swap_flops == 0 < work.decomposed  # no residual is rebuilt


def test_sst_is_faster_than_dense_where_products_dominate() -> None:
    words = ("--model.name=opt-13b", "--parallel.backend=fsdp2", "--train.micro_batch_size=8")
    words += ("--model.sequence_length=2048",)
    sst, dense = seconds(*words), seconds(*words, "--spectral.method=full")
    assert 0.7 < sst.passes / dense.passes < 0.95
    assert sst.optimizer < dense.optimizer / 5
