"""`plan` of residuals of eight bits: a byte an element, and four for the scale of each row."""

import pytest

from spectral_scale.config.load import load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.plan.build import Plan, plan_run

WORDS = ("--model.name=opt-125m", "--train.precision=bf16", "--data.train=nowhere")
ELEMENTS = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
ROWS = 12 * (4 * 768 + 3072 + 768)


def planned(*words: str, world_size: int = 1) -> Plan:
    run = resolve(load_config([], [*WORDS, *words]).config, world_size=world_size)
    return plan_run(run, gpu_memory_bytes=80e9)


@pytest.mark.parametrize("world_size", [1, 4])
def test_residuals_take_a_byte_an_element_and_half_the_traffic(world_size: int) -> None:
    plain = planned(world_size=world_size)
    eight = planned("--spectral.residual_dtype=int8", world_size=world_size)
    saved = 2 * ELEMENTS - (ELEMENTS + 4 * ROWS)
    assert plain.memory["weights"] - eight.memory["weights"] == saved
    same = plain.memory.keys() - {"weights", "reserved"}
    assert all(plain.memory[part] == eight.memory[part] for part in same)
    share = (world_size - 1) / world_size
    assert plain.boundary_traffic_bytes - eight.boundary_traffic_bytes == int(saved * share)
    assert plain.checkpoint_bytes == eight.checkpoint_bytes
