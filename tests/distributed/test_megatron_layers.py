"""Spectral layers on megatron-core against the plain product: output and every gradient."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import megatron_refusals as refusals
import pytest
import torch
from torch import Tensor

from spectral_scale.testing.distributed import run_distributed

SEQUENCE, BATCH, WIDTH, RANK = 8, 2, 12, 3
HEADS, GROUPS, HEAD = 8, 4, 2
TOLERANCE = 1e-10


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer."""

    kind: str = "column"
    tp: int = 2
    sequence_parallel: bool = False
    storage: str = "residual"
    bias: bool = True
    skip_bias_add: bool = False
    gathered: bool = False
    """column: gather_output; row: the input is whole on every rank."""
    completion: str = "bottleneck"
    gradient: str = "enhanced"
    extra_sigma: int = 0
    fault: str = "none"


def _cases() -> list[Case]:
    found = []
    for tp in (1, 2, 4):
        for sequence_parallel in (False, True) if tp > 1 else (False,):
            for storage in ("residual", "factored"):
                found += [
                    Case(kind=kind, tp=tp, sequence_parallel=sequence_parallel, storage=storage)
                    for kind in ("column", "row", "qkv", "gated")
                ]
    for kind in ("column", "row", "qkv"):
        found += [
            Case(kind=kind, skip_bias_add=True),
            Case(kind=kind, skip_bias_add=True, sequence_parallel=True, tp=4),
            Case(kind=kind, bias=False, gradient="default"),
            Case(kind=kind, gathered=True, tp=4),
            Case(kind=kind, extra_sigma=2),
            Case(kind=kind, completion="per_step", tp=4),
            Case(kind=kind, completion="per_step", storage="factored", sequence_parallel=True),
        ]
    return found


AUTOCAST = [
    Case(kind=kind, tp=tp, storage=storage)
    for kind in ("column", "row", "qkv", "gated")
    for tp, storage in ((1, "factored"), (2, "residual"), (4, "factored"))
]
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _layer(case: Case, group: Any, dtype: torch.dtype = torch.float64) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from spectral_scale.backends.megatron.layers import (
        SpectralColumnParallelLinear,
        SpectralRowParallelLinear,
        bound,
    )
    from spectral_scale.backends.megatron.matrix import MatrixSettings
    from spectral_scale.config.schema import SpectralConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD,
        params_dtype=dtype,
        use_cpu_initialization=True,
        tensor_model_parallel_size=case.tp,
        sequence_parallel=case.sequence_parallel,
    )
    spectral = SpectralConfig(
        spectral_rank=RANK,
        storage=case.storage,
        gradient=case.gradient,
        extra_sigma=case.extra_sigma,
    )
    settings = MatrixSettings(spectral=spectral, completion=case.completion)
    common: dict[str, Any] = {
        "config": config,
        "init_method": torch.nn.init.normal_,
        "bias": case.bias,
        "skip_bias_add": case.skip_bias_add,
        "tp_group": group,
    }
    if case.kind == "row":
        row = bound(SpectralRowParallelLinear, settings)
        return row(16, WIDTH, input_is_parallel=not case.gathered, **common)
    fused = "none" if case.kind == "column" else case.kind
    size = {"none": 16, "gated": 32, "qkv": (HEADS + 2 * GROUPS) * HEAD}[fused]
    column = bound(SpectralColumnParallelLinear, settings, fused)
    return column(WIDTH, size, gather_output=case.gathered, **common)


def _whole_values(layer: Any, seed: int) -> dict[str, Tensor]:
    """Whole parameters of every matrix, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values = {}
    for name in layer.matrix_names:
        matrix = layer.get_submodule(name)
        shapes = matrix.trained_shapes() | matrix.frozen_shapes()
        values |= {f"{name}.{leaf}": random(*shape) for leaf, shape in shapes.items()}
        if matrix.bias is not None:
            values[f"{name}.bias"] = random(matrix.out_features)
    return values


def _part(parameter: Tensor, whole: Tensor, group: Any) -> Tensor:
    """By comparing shapes: independent of the layers' own table of cuts."""
    for dim, (mine, full) in enumerate(zip(parameter.shape, whole.shape, strict=True)):
        if mine != full:
            return whole.chunk(group.size(), dim=dim)[group.rank()]
    return whole


def _reference(case: Case, layer: Any, values: dict[str, Tensor], x: Tensor) -> Tensor:
    """The fused output in whole matrices and plain words."""
    from spectral_scale.testing.oracle import PlainSpectralProduct

    outputs = []
    for name in layer.matrix_names:
        leaves = {leaf: values.get(f"{name}.{leaf}") for leaf in ("residual", "u", "v", "u_fixed")}
        leaves |= {leaf: values.get(f"{name}.{leaf}") for leaf in ("v_fixed", "sigma", "bias")}
        outputs.append(
            PlainSpectralProduct.apply(
                x.reshape(-1, x.shape[-1]), *leaves.values(), case.gradient == "enhanced", False
            )
        )
    if case.kind == "qkv":
        outputs = [_by_group(*outputs)]
    if case.kind == "gated":  # each rank's outputs are its part of the gate, then of the other
        gate, up = (output.chunk(case.tp, dim=-1) for output in outputs)
        outputs = [half for pair in zip(gate, up, strict=True) for half in pair]
    return torch.cat(outputs, dim=-1).view(*x.shape[:-1], -1)


def _by_group(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    columns, per_group = [], HEADS // GROUPS * HEAD
    for g in range(GROUPS):
        columns.append(query[:, g * per_group : (g + 1) * per_group])
        columns += [t[:, g * HEAD : (g + 1) * HEAD] for t in (key, value)]
    return torch.cat(columns, dim=-1)


def _no_sum(partial: Tensor) -> Callable[[], Tensor]:
    return partial.clone


def _compare(case: Case, group: Any) -> float:
    """Largest error of the output and of every gradient, this rank's parts."""
    from spectral_scale.backends.megatron.gradients import sum_partial_gradients

    layer = _layer(case, group)
    whole = {k: v.requires_grad_("residual" not in k) for k, v in _whole_values(layer, 1).items()}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(_part(parameter, whole[name], group))
    for name in layer.matrix_names:
        layer.get_submodule(name).ready = True
        if case.fault == "skip sum" and layer.get_submodule(name).bottleneck is not None:
            object.__setattr__(layer.get_submodule(name).bottleneck, "start_sum", _no_sum)
    generator = torch.Generator().manual_seed(2)
    features = 16 if case.kind == "row" else WIDTH
    x = torch.randn(SEQUENCE, BATCH, features, generator=generator, dtype=torch.float64)
    expected_x = x.clone().requires_grad_()
    expected = _reference(case, layer, whole, expected_x)
    g = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected.backward(g)
    rank, tp = group.rank(), group.size()
    input_dim = 0 if case.sequence_parallel else 2
    cut_input = case.sequence_parallel if case.kind != "row" else not case.gathered
    if case.kind == "row":
        input_dim = 2
    mine = x.chunk(tp, dim=input_dim)[rank] if cut_input else x
    mine = mine.clone().requires_grad_()
    output, bias = layer(mine)
    if bias is not None:
        output = output + bias
    dim = None if case.gathered else 2
    if case.kind == "row":
        dim = 0 if case.sequence_parallel else None
    own = (lambda t: t) if dim is None else (lambda t: t.chunk(tp, dim=dim)[rank])
    output.backward(own(g).contiguous())
    if case.completion == "per_step":
        assert sum_partial_gradients(layer.parameters(), group) > 0
    for parameter in layer.parameters():
        if getattr(parameter, "sequence_parallel", False):  # as finalize_model_grads does
            torch.distributed.all_reduce(parameter.grad, group=group)
    grad_x = expected_x.grad.chunk(tp, dim=input_dim)[rank] if cut_input else expected_x.grad
    errors = [(output - own(expected)).abs().max(), (mine.grad - grad_x).abs().max()]
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            if case.fault == "sum twice" and name.endswith(".v"):
                torch.distributed.all_reduce(parameter.grad, group=group)
            wanted = _part(parameter, whole[name].grad, group)
            errors.append((parameter.grad - wanted).abs().max())
    return float(max(errors))


def _under_autocast(case: Case, precision: torch.dtype, group: Any) -> float:
    """Largest distance from `nn.Linear` under autocast, in roundings of the largest entry: of the
    output and the gradient of the input. Gradients of factors are compared with those of the plain
    product in fp32. Infinite where a dtype is another."""
    layer = _layer(case, group, torch.float32)
    whole = {k: v.float().requires_grad_() for k, v in _whole_values(layer, 1).items()}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(_part(parameter, whole[name], group))
    for name in layer.matrix_names:
        layer.get_submodule(name).ready = True
    features = 16 if case.kind == "row" else WIDTH
    x = torch.randn(SEQUENCE, BATCH, features, generator=torch.Generator().manual_seed(2))
    plain = _reference(case, layer, whole, x)
    g = torch.randn(plain.shape, generator=torch.Generator().manual_seed(3))
    plain.backward(g)
    linear = torch.nn.Linear(features, plain.shape[-1])
    with torch.no_grad():
        bias = _reference(case, layer, whole, torch.zeros(1, features))
        linear.weight.copy_((_reference(case, layer, whole, torch.eye(features)) - bias).t())
        linear.bias.copy_(bias[0])

    def cut(t: Tensor) -> Tensor:
        return t.chunk(group.size(), dim=-1)[group.rank()]

    mine, expected_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    is_row = case.kind == "row"
    with torch.autocast("cpu", precision):
        output = layer(cut(mine) if is_row else mine)[0]
        expected = linear(expected_x)
    expected.backward(g.to(expected.dtype))
    output.backward(g.to(output.dtype) if is_row else cut(g.to(output.dtype)))
    grads = (cut(mine.grad), cut(expected_x.grad)) if is_row else (mine.grad, expected_x.grad)
    pairs = [(output, expected if is_row else cut(expected)), grads]
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            pairs.append((parameter.grad, _part(parameter, whole[name].grad, group)))
    if any(found.dtype != wanted.dtype for found, wanted in pairs):
        return float("inf")
    rounding = torch.finfo(precision).eps
    return max(float((a - b).abs().max() / b.abs().max() / rounding) for a, b in pairs)


def _misplaced_shards(case: Case, group: Any) -> list[str]:
    """Factors that megatron-core's own checkpoints would take for another part of the whole."""
    layer = _layer(case, group)
    whole = _whole_values(layer, 1)
    alone = torch.distributed.group.WORLD
    wrong = []
    for key, shard in layer.sharded_state_dict("", (), {"dp_cp_group": alone}).items():
        if "_extra_state" in key:
            continue
        box = tuple(
            slice(a, a + n) for a, n in zip(shard.global_offset, shard.local_shape, strict=True)
        )
        expected = _part(shard.data, whole[key], group)
        same_shape = tuple(shard.global_shape) == tuple(whole[key].shape)
        if not same_shape or not torch.equal(whole[key][box], expected):
            wrong.append(key)
    return wrong


def _work(cases: list[dict[str, Any]]) -> list[Any]:
    from spectral_scale.testing.megatron import run_on_cpu

    run_on_cpu()
    torch.distributed.init_process_group("gloo")
    groups = {}
    for size in (1, 2, 4):
        members = [list(range(i, i + size)) for i in range(0, 4, size)]
        made = [torch.distributed.new_group(ranks) for ranks in members]
        groups[size] = made[torch.distributed.get_rank() // size]
    errors: list[Any] = [_compare(c, groups[c.tp]) for c in (Case(**case) for case in cases)]
    shards = [Case(kind=kind, storage="factored") for kind in ("column", "row", "qkv")]
    errors.append([_misplaced_shards(case, groups[2]) for case in shards])
    errors.append(refusals.messages())
    errors.append(
        [
            _under_autocast(case, precision, groups[case.tp])
            for precision in PRECISIONS.values()
            for case in AUTOCAST
        ]
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return errors


FAULTY = [
    Case(fault="skip sum"),
    Case(kind="row", fault="skip sum", storage="factored"),
    Case(kind="qkv", fault="skip sum", sequence_parallel=True),
    Case(fault="sum twice", sequence_parallel=True),
]


@pytest.fixture(scope="module")
def ranks() -> list[list[Any]]:
    """Errors by case, misplaced shards and refusals, by rank; one group of processes for all."""
    cases = [asdict(case) for case in [*_cases(), *FAULTY]]
    return run_distributed(_work, 4, cases, timeout_seconds=150)


@pytest.fixture(scope="module")
def errors(ranks: list[list[Any]]) -> dict[Case, float]:
    """Each case's largest error over all ranks."""
    worst = [max(e) for e in zip(*(rank[:-3] for rank in ranks), strict=True)]
    return dict(zip([*_cases(), *FAULTY], worst, strict=True))


def test_megatrons_own_checkpoints_know_the_shards(ranks: list[list[Any]]) -> None:
    assert [rank[-3] for rank in ranks] == [[[], [], []]] * 4


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_output_and_gradients_equal_the_plain_product(
    case: Case, errors: dict[Case, float]
) -> None:
    assert errors[case] < TOLERANCE


def test_autocast_trains_them_as_it_trains_a_linear(ranks: list[list[Any]]) -> None:
    """The same dtypes; values apart by few roundings of the precision, also those of gradients."""
    worst = [max(e) for e in zip(*(rank[-1] for rank in ranks), strict=True)]
    names = [(name, case) for name in PRECISIONS for case in AUTOCAST]
    found = dict(zip(names, worst, strict=True))
    assert {key: error for key, error in found.items() if error > 4} == {}


@pytest.mark.parametrize("case", FAULTY, ids=str)
def test_a_broken_sum_is_seen(case: Case, errors: dict[Case, float]) -> None:
    assert errors[case] > 1e-3


@pytest.mark.parametrize("name", refusals.CASES)
def test_what_cannot_be_is_refused_on_every_rank(name: str, ranks: list[list[Any]]) -> None:
    for rank in ranks:
        assert name in rank[-2], "nothing was refused"
        assert re.search(refusals.CASES[name][1], rank[-2][name], flags=re.DOTALL), rank[-2][name]
