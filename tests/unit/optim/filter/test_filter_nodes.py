"""What is filtered together, and what is refused or left out, with its reason."""

import logging

import pytest

from spectral_scale.config.schema import FilterConfig
from spectral_scale.errors import ConfigError
from spectral_scale.optim.filter.nodes import Member, NodeGroup, plan_groups

MATRIX, VECTOR = "matrix", "vector"


def plan(members: dict[str, tuple[tuple[int, ...], str]], **keys: object) -> list[NodeGroup]:
    given = {fqn: Member(shape, role) for fqn, (shape, role) in members.items()}
    config = FilterConfig(kind="rational", **keys)  # type: ignore[arg-type]
    return plan_groups(given, config, head_size=4)


MODEL = {
    "embed.weight": ((20, 8), MATRIX),
    "layers.0.q_proj.weight": ((8, 8), MATRIX),
    "layers.0.q_proj.bias": ((8,), VECTOR),
    "layers.0.out_proj.weight": ((6, 8), MATRIX),
    "layers.2.q_proj.weight": ((8, 8), MATRIX),
    "layers.10.q_proj.weight": ((8, 8), MATRIX),
    "layers.10.out_proj.weight": ((6, 8), MATRIX),
    "layers.0.first_only.weight": ((8, 8), MATRIX),
}


def test_layers_of_a_name_by_depth() -> None:
    groups = {g.name: g for g in plan(MODEL)}
    assert set(groups) == {"layers.*.q_proj.weight", "layers.*.out_proj.weight"}
    group = groups["layers.*.q_proj.weight"]
    assert group.fqns == tuple(f"layers.{i}.q_proj.weight" for i in (0, 2, 10))
    assert group.num_nodes == 3
    assert group.kind == "q_proj"


def test_shapes_are_not_mixed() -> None:
    model = {f"layers.{i}.fc1.weight": ((8 + i // 2, 8), MATRIX) for i in range(4)}
    assert [g.fqns for g in plan(model)] == [
        ("layers.0.fc1.weight", "layers.1.fc1.weight"),
        ("layers.2.fc1.weight", "layers.3.fc1.weight"),
    ]
    assert len({g.name for g in plan(model)}) == 2


def test_heads_are_rows_of_q_and_columns_of_the_output() -> None:
    groups = {g.name: g for g in plan(MODEL, nodes="heads")}
    assert groups["layers.2.q_proj.weight"].blocks == (1, 2, 4 * 8)
    assert groups["layers.10.out_proj.weight"].blocks == (6, 2, 4)
    assert "layers.0.first_only.weight" not in groups


def test_rows_and_blocks() -> None:
    assert {g.num_nodes for g in plan(MODEL, nodes="rows")} == {6, 8}
    (blocks,) = plan(MODEL, nodes="block_gains")
    assert blocks.num_nodes == len(blocks.fqns) == 6


def test_what_is_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        plan(MODEL)
    text = caplog.text
    assert "norms and biases are not filtered" in text
    assert "outside the numbered blocks" in text
    assert "layers.0.first_only.weight, ...): no other layer" in text


SPECTRAL = {f"layers.{i}.fc1.{leaf}": ((8, 2), "direction") for i in range(3) for leaf in "uv"} | {
    f"layers.{i}.fc1.sigma": ((2,), "value") for i in range(3)
}


def test_directions_are_left_out_and_refused_by_name() -> None:
    (sigma,) = plan(SPECTRAL)
    assert sigma.kind == "fc1.sigma" and sigma.num_nodes == 3
    with pytest.raises(ConfigError, match=r"layers.0.fc1.u, which cannot .* bases of their own"):
        plan(SPECTRAL, targets=["*.u"])
    assert len(plan(SPECTRAL, nodes="block_gains")[0].fqns) == 9


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        ({"layers.0.fc1.weight": ((8, 8), MATRIX)}, {}, "no other layer has a parameter"),
        ({"embed.weight": ((8, 8), MATRIX)}, {}, "outside the numbered blocks"),
        (SPECTRAL, {"nodes": "rows"}, "needs dense matrices"),
        (MODEL, {"targets": ["*fc9*"]}, r"'\*fc9\*' matches no trained parameter"),
        (MODEL, {"targets": ["*bias"]}, "norms and biases are not filtered"),
        ({"layers.0.fc1.weight": ((8, 8), MATRIX)}, {"nodes": "block_gains"}, "no other block"),
        ({"layers.0.q_proj.weight": ((6, 8), MATRIX)}, {"nodes": "heads"}, "two heads of 4"),
        ({}, {}, "no parameter was given"),
    ],
    ids=str,
)
def test_nothing_to_filter_is_an_error(model: dict, keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(model, **keys)
