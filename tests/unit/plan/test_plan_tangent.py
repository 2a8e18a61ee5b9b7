"""`plan` of the tangent form: weights in the place of a bank, and no decomposition unless asked."""

import pytest

from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.plan.build import Plan, plan_run
from spectral_scale.plan.inventory import take_inventory
from spectral_scale.plan.method_needs import method_memory, method_work

WORDS = (
    "--model.name=opt-125m",
    "--train.precision=bf16",
    "--spectral.spectral_rank=48",
    "--data.train=nowhere",
)
MATRICES = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
COLUMNS = 12 * (4 * 2 * 768 + 2 * (768 + 3072))


def planned(*words: str) -> Plan:
    run = resolve(load_config([], [*WORDS, *words]).config, world_size=1)
    return plan_run(run, gpu_memory_bytes=80e9)


def test_random_bases_need_neither_bank_nor_decomposition() -> None:
    sst, plan = planned(), planned("--spectral.form=tangent")
    assert plan.memory["svd_workspace"] == 0 < sst.memory["svd_workspace"]
    assert plan.memory["bank"] == 4 * MATRICES + 16 * 72 < 0.7 * sst.memory["bank"]
    assert plan.parameters_trained == sst.parameters_trained - 72 * 48
    assert plan.parameters_frozen == MATRICES + 48 * COLUMNS
    assert plan.step_traffic_bytes == plan.boundary_traffic_bytes == 0  # one process
    saved = 12 * plan.parameters_trained + 4 * MATRICES + 16 * 72
    assert plan.checkpoint_bytes == saved < sst.checkpoint_bytes


def test_singular_vectors_are_decomposed_and_kept() -> None:
    plan = planned("--spectral.form=tangent", "--spectral.basis=svd")
    assert plan.memory["svd_workspace"] == planned().memory["svd_workspace"]
    assert plan.memory["bank"] == 4 * (MATRICES + 48 * COLUMNS)


@pytest.mark.parametrize("basis", ["random", "svd"])
def test_host_memory_takes_the_weights(basis: str) -> None:
    words = ("--spectral.form=tangent", f"--spectral.basis={basis}")
    beside, host = planned(*words), planned(*words, "--spectral.bank_device=cpu")
    assert host.memory["bank"] == 0
    assert host.host_bytes == beside.memory["bank"]
    assert host.memory["svd_workspace"] > 0  # where a matrix is changed


def test_muon_keeps_one_moment_of_factors_and_of_dense_matrices() -> None:
    muon = "--optimizer.name=muon"
    for words, saved in (
        (("--spectral.form=tangent",), 4 * 48 * COLUMNS),
        (("--spectral.method=full",), 4 * MATRICES),
    ):
        adam, plan = planned(*words), planned(*words, muon)
        assert plan.memory["optimizer"] == adam.memory["optimizer"] - saved
        assert plan.checkpoint_bytes == adam.checkpoint_bytes - saved


def test_scale_keeps_one_moment_of_the_tied_embedding_alone() -> None:
    words = ("--spectral.method=full", "--model.vocab_size=50000")
    adam, plan = planned(*words), planned(*words, "--optimizer.name=scale")
    saved = 4 * (2 * (MATRICES + 2050 * 768) + 50000 * 768)
    assert plan.memory["optimizer"] == adam.memory["optimizer"] - saved
    assert plan.checkpoint_bytes == adam.checkpoint_bytes - saved


def test_muon_sums_gram_matrices_over_shards() -> None:
    words = [*WORDS, "--spectral.form=tangent", "--parallel.backend=fsdp2"]
    traffic = [
        plan_run(
            resolve(load_config([], [*words, f"--optimizer.name={name}"]).config, world_size=4),
            gpu_memory_bytes=80e9,
        ).step_traffic_bytes
        for name in ("adamw", "muon")
    ]
    assert traffic[1] - traffic[0] == 2 * 144 * 48 * 48 * 4 * 3 / 4


def test_a_formed_weight_is_counted_where_there_is_one() -> None:
    words = ("--spectral.form=tangent", "--model.sequence_length=512")
    half = planned(*words)
    single = planned(*words, "--train.precision=fp32", "--train.micro_batch_size=8")
    assert half.memory["gathered"] == 0
    assert single.memory["gathered"] == 4 * 768 * 3072


def test_a_shard_decides_by_its_own_shape_whether_it_is_formed() -> None:
    """With 400 tokens, halves of (768, 768) are formed; wholes and larger halves are not."""
    words = [*WORDS, "--spectral.form=tangent", "--model.sequence_length=400"]
    words += ["--train.precision=fp32", "--train.micro_batch_size=1", "--parallel.backend=fsdp2"]

    def formed(parts: int) -> tuple[int, float]:
        config = load_config([], [*words, f"--parallel.tensor_parallel={parts}"]).config
        inventory = take_inventory(config, resolve(config, world_size=2).architecture)
        needs = method_memory(config, inventory, 2), method_work(config, inventory, 2)
        return needs[0].gathered, needs[1].micro_batch_flops

    assert formed(1) == (0, 0)
    squares = 12 * 4 * 768 * 768
    assert formed(2) == (4 * 768 * 384, 8 * 48 * squares)
