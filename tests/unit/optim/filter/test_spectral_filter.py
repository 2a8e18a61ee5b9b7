"""The filter against the plainest formulas, on whole parameters of one process."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_scale import FilterConfig, SpectralFilterAdamW, param_groups
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import CheckpointError, ConfigError, SpectralError
from spectral_scale.methods.sst.layer import convert
from spectral_scale.ops.filters import filter_matrix, response
from spectral_scale.ops.graphs import complete_graph, knn_graph, path_graph
from spectral_scale.ops.laplacian import dense_laplacian, eigenbasis
from spectral_scale.optim.filter import operator, signals

DEPTH, WIDTH = 5, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, 12)
        self.out_proj = nn.Linear(12, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out_proj(torch.tanh(self.q_proj(x)))


def make(depth: int = DEPTH, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(depth))
    model.head = nn.Linear(WIDTH, 3)
    return model.double()


def backward(model: nn.Module, seed: int = 0) -> None:
    x = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for block in model.layers:
        x = block(x)
    model.head(x).square().sum().backward()


def optimizer(model: nn.Module, **keys: Any) -> SpectralFilterAdamW:
    config = FilterConfig(**({"kind": "rational"} | keys))
    return SpectralFilterAdamW(model.named_parameters(), config, head_size=3, lr=0.01)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def filtered(before: Tensor, keys: dict[str, Any], graph: Any = None) -> Tensor:
    """H X by the definition, X (n, d)."""
    laplacian = dense_laplacian(
        graph or path_graph(len(before)), keys.get("laplacian", "normalized")
    )
    respond = response(keys.get("kind", "rational"), keys.get("strength", 1.0))
    return filter_matrix(eigenbasis(laplacian), respond) @ before


LAYER_CASES = [
    {},
    {"kind": "heat", "strength": 3.0, "laplacian": "combinatorial"},
    {"kind": "ideal", "strength": 0.7},
    {"graph": "complete", "strength": 0.2},
]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("keys", LAYER_CASES, ids=str)
def test_layers(keys: dict[str, Any], narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of one name mix over depth; everything else keeps its gradient, bit for bit."""
    if narrow:
        monkeypatch.setitem(signals.BLOCK_ELEMENTS, "cpu", 7 * DEPTH)
    model = make()
    chosen = optimizer(model, **keys)
    backward(model)
    before = gradients(model)
    chosen.filter_gradients()
    after = gradients(model)
    graph = complete_graph(DEPTH) if keys.get("graph") == "complete" else None
    for name in ("q_proj", "out_proj"):
        names = [f"layers.{i}.{name}.weight" for i in range(DEPTH)]
        stack = torch.stack([before[n].flatten() for n in names])
        found = torch.stack([after[n].flatten() for n in names])
        assert torch.allclose(found, filtered(stack, keys, graph), rtol=1e-12, atol=1e-14)
        assert not torch.allclose(found, stack, rtol=1e-3)
    for name in ("layers.0.q_proj.bias", "head.weight"):
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("exact", [True, False])
def test_rows(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small graphs by eigenvectors, large ones by polynomials within 1e-3 of them."""
    if not exact:
        monkeypatch.setattr(operator, "EXACT_NODES", 4)
    model = make()
    chosen = optimizer(model, nodes="rows", strength=2.0)
    backward(model)
    before = gradients(model)
    chosen.filter_gradients(measure=True)
    for name, parameter in model.layers.named_parameters():
        if name.endswith("weight"):
            expected = filtered(before[f"layers.{name}"], {"strength": 2.0})
            scale = before[f"layers.{name}"].norm()
            error = (parameter.grad - expected).norm() / scale
            assert float(error) < (1e-14 if exact else 1e-3)
    assert ("filter/energy/q_proj" in chosen.filter.metrics()) is exact
    assert chosen.filter.metrics()["filter/rayleigh"] > 0


def test_heads() -> None:
    """Rows of q_proj in blocks of 3, columns of out_proj likewise; no other parameter."""
    model = make()
    chosen = optimizer(model, nodes="heads")
    backward(model)
    before = gradients(model)
    chosen.filter_gradients()
    block = model.layers[2]
    rows = before["layers.2.q_proj.weight"].view(4, -1)
    assert torch.allclose(block.q_proj.weight.grad.view(4, -1), filtered(rows, {}), atol=1e-14)
    columns = before["layers.2.out_proj.weight"].t().reshape(4, -1)
    expected = filtered(columns, {})
    assert torch.allclose(block.out_proj.weight.grad.t().reshape(4, -1), expected, atol=1e-14)


def test_block_gains() -> None:
    """Sizes are filtered, directions kept; a block without a gradient stays without one."""
    model = make()
    chosen = optimizer(model, nodes="block_gains", strength=3.0)
    backward(model)
    model.layers[1].q_proj.weight.grad.zero_()
    before = gradients(model)
    chosen.filter_gradients(measure=True)
    names = [n for n in before if n.startswith("layers") and n.endswith("weight")]
    sizes = torch.stack([before[n].square().mean().sqrt() for n in names])[:, None]
    expected = filtered(sizes, {"strength": 3.0})
    for name, size in zip(names, expected, strict=True):
        found, was = model.get_parameter(name).grad, before[name]
        if bool(was.any()):
            assert float(found.square().mean().sqrt()) == pytest.approx(float(size), rel=1e-12)
            assert torch.allclose(found / found.norm(), was / was.norm(), atol=1e-14)
        else:
            assert not found.any()
    assert 0 < chosen.filter.metrics()["filter/removed"] < 1


def test_knn_compares_mean_gradients_and_is_renewed() -> None:
    """The first step passes; then the graph is that of decayed means, until it is renewed."""
    model = make()
    keys = {"graph": "knn", "neighbors": 1, "refresh_steps": 3, "gradient_decay": 0.5}
    chosen = optimizer(model, **keys)
    names = [f"layers.{i}.q_proj.weight" for i in range(DEPTH)]
    mean = torch.zeros(DEPTH, 12 * WIDTH, dtype=torch.float64)
    graph = None
    for step in range(1, 6):
        backward(model, seed=step)
        before = torch.stack([model.get_parameter(n).grad.flatten().clone() for n in names])
        chosen.filter_gradients()
        after = torch.stack([model.get_parameter(n).grad.flatten().clone() for n in names])
        expected = before if graph is None else filtered(before, {}, graph)
        assert torch.allclose(after, expected, atol=1e-12)
        mean = 0.5 * mean + 0.5 * before
        if step in (1, 3):
            graph = knn_graph(mean, 1)
        chosen.step()
        chosen.zero_grad()


def test_permuted_nodes_are_another_graph_with_the_same_spectrum() -> None:
    found = {}
    for permuted in (False, True):
        model = make()
        chosen = optimizer(model, permute_nodes=permuted)
        backward(model)
        chosen.filter_gradients(measure=True)
        found[permuted] = gradients(model), chosen.filter.metrics()
    name = "layers.2.q_proj.weight"
    assert not torch.allclose(found[False][0][name], found[True][0][name], rtol=1e-2)
    spectra = [found[p][1]["filter/laplacian/q_proj"] for p in (False, True)]
    assert spectra[0] == pytest.approx(spectra[1], abs=1e-12)


def test_matched_norms_change_direction_only() -> None:
    model = make()
    chosen = optimizer(model, norm_matched=True, strength=5.0)
    backward(model)
    before = gradients(model)
    chosen.filter_gradients()
    names = [f"layers.{i}.q_proj.weight" for i in range(DEPTH)]
    stacks = [torch.stack([g[n].flatten() for n in names]) for g in (before, gradients(model))]
    assert float(stacks[1].norm()) == pytest.approx(float(stacks[0].norm()), rel=1e-12)
    plain = filtered(stacks[0], {"strength": 5.0})
    assert torch.allclose(stacks[1] / stacks[1].norm(), plain / plain.norm(), atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "rational"])
def test_joint_loss_adds_its_gradient(kind: str) -> None:
    """H G + 2 mu L D, with D counted from the start, or from the last anchor."""
    model = make()
    chosen = optimizer(model, kind=kind, joint_loss_mu=0.3, anchor_steps=2)
    names = [f"layers.{i}.q_proj.weight" for i in range(DEPTH)]
    laplacian = dense_laplacian(path_graph(DEPTH), "normalized")

    def stack(part: str) -> Tensor:
        owners = [model.get_parameter(n) for n in names]
        tensors = [p.grad if part == "grad" else p.detach() for p in owners]
        return torch.stack([t.flatten().clone() for t in tensors])

    anchor = stack("value")
    for step in range(5):
        if step in (2, 4):
            anchor = stack("value")
        backward(model, seed=step)
        before, change = stack("grad"), stack("value") - anchor
        chosen.filter_gradients(measure=True)
        task = before if kind == "none" else filtered(before, {})
        assert torch.allclose(stack("grad"), task + 0.6 * laplacian @ change, atol=1e-12)
        logged = chosen.filter.metrics()["filter/joint_loss"]
        assert (logged > 0) is bool(change.any())
        chosen.step()
        chosen.zero_grad()


def test_measures() -> None:
    """Energies by frequency sum to 1, their mean frequency is the Rayleigh quotient, and what is
    removed follows from them; drift is that of sampled entries."""
    model = make()
    chosen = optimizer(model, strength=2.0)
    for step in range(3):
        backward(model, seed=step)
        chosen.filter_gradients(measure=True)
        chosen.step()
        chosen.zero_grad()
    found = chosen.filter.metrics()
    for kind in ("q_proj", "out_proj"):
        energy = torch.tensor(found[f"filter/energy/{kind}"], dtype=torch.float64)
        values = torch.tensor(found[f"filter/laplacian/{kind}"], dtype=torch.float64)
        assert float(energy.sum()) == pytest.approx(1.0)
        assert float((energy * values).sum()) == pytest.approx(found[f"filter/rayleigh/{kind}"])
        left = (energy * (1 + 2.0 * values) ** -2).sum()
        assert 1 - float(left) == pytest.approx(found[f"filter/removed/{kind}"])
    assert 0 < found["filter/drift"] < 1
    assert found["filter/isolated_nodes"] == 0


def test_identity_measures_and_changes_nothing() -> None:
    model = make()
    chosen = optimizer(model, kind="identity")
    backward(model)
    before = gradients(model)
    chosen.filter_gradients(measure=True)
    assert all(torch.equal(before[n], g) for n, g in gradients(model).items())
    assert chosen.filter.metrics()["filter/removed"] == 0


def test_steps_are_those_of_adamw_on_filtered_gradients() -> None:
    """Clipping comes between the filter and the step; a step without it filters by itself."""
    ours, theirs = make(), make()
    chosen = optimizer(ours)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    shadow = optimizer(theirs)
    for step in range(4):
        for model in (ours, theirs):
            backward(model, seed=step)
        if step % 2:
            chosen.filter_gradients()
        chosen.step()
        shadow.filter.apply()
        plain.step()
        for opt in (chosen, plain):
            opt.zero_grad()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def train(model: nn.Module, chosen: SpectralFilterAdamW, steps: range) -> None:
    for step in steps:
        backward(model, seed=step)
        chosen.step()
        chosen.zero_grad()


KNN = {"graph": "knn", "neighbors": 2, "refresh_steps": 3, "joint_loss_mu": 0.1}


def test_state_dict_resumes_bit_exactly(tmp_path: Any) -> None:
    """Saved between two renewals of the graph, through a file."""
    whole = make()
    train(whole, optimizer(whole, **KNN), range(8))
    first = make()
    chosen = optimizer(first, **KNN)
    train(first, chosen, range(4))
    torch.save([first.state_dict(), chosen.state_dict()], tmp_path / "state")
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    second = make(seed=1)
    resumed = optimizer(second, **KNN)
    second.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(second, resumed, range(4, 8))
    pairs = zip(whole.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("lost", ["graph", "mean_gradients", "steps", "anchor"])
def test_every_part_of_the_state_is_needed(lost: str) -> None:
    model = make()
    chosen = optimizer(model, **KNN)
    train(model, chosen, range(2))
    state = chosen.state_dict()
    for key in [k for k in state["filter"] if lost in k]:
        del state["filter"][key]
    with pytest.raises(CheckpointError, match="is missing from the filter's state"):
        optimizer(make(), **KNN).load_state_dict(state)
    with pytest.raises(CheckpointError, match="nothing of the spectral filter"):
        optimizer(make(), **KNN).load_state_dict({"state": {}, "param_groups": []})


def test_gradients_that_are_not_finite_are_reported_with_the_graph() -> None:
    model = make()
    chosen = optimizer(model, graph="knn", refresh_steps=2)
    train(model, chosen, range(1))
    backward(model)
    model.layers[1].q_proj.weight.grad[0, 0] = float("nan")
    with pytest.raises(SpectralError, match=r"layers.\*.q_proj.weight are not finite"):
        chosen.step()


def test_a_missing_gradient_and_a_forgotten_commit_are_errors() -> None:
    model = make()
    chosen = optimizer(model)
    backward(model)
    model.layers[3].out_proj.weight.grad = None
    with pytest.raises(SpectralError, match=r"layers.3.out_proj.weight has no gradient"):
        chosen.step()
    model = make()
    chosen = optimizer(model, graph="knn")
    backward(model)
    chosen.filter.steps = 1
    with pytest.raises(SpectralError, match="has no graph"):
        chosen.step()


def test_gradients_that_are_not_contiguous_are_filtered() -> None:
    """Filtering a copy would be silently off."""
    models = [make(), make()]
    for model in models:
        backward(model)
    for parameter in models[1].parameters():
        if parameter.ndim == 2:
            parameter.grad = parameter.grad.t().contiguous().t()
    for model in models:
        optimizer(model).filter_gradients()
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(*(m.parameters() for m in models), strict=True)
    )


def test_spectral_layers_filter_sigma_and_leave_directions() -> None:
    model = make().float()
    convert(model, SpectralConfig(spectral_rank=3), targets=["*.q_proj"])
    groups = param_groups(model, lr=0.01, spectral_lr=0.01)
    chosen = SpectralFilterAdamW(groups, FilterConfig(kind="heat"))
    assert {fqn.split(".", 2)[2] for fqn in chosen.filter.fqns} == {
        "q_proj.sigma",
        "out_proj.weight",
    }
    with pytest.raises(ConfigError, match="bases of their own"):
        SpectralFilterAdamW(groups, FilterConfig(kind="heat", targets=["*.q_proj.u"]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "none"}, "there is nothing to do"),
        ({"kind": "ideal", "nodes": "rows"}, "needs the eigenvectors"),
        ({"graph": "complete", "nodes": "rows"}, "joins every pair"),
        ({"nodes": "block_gains", "graph": "knn"}, "compares entries of blocks"),
        ({"nodes": "block_gains", "joint_loss_mu": 1.0}, "compares entries of blocks"),
        ({"norm_matched": True, "joint_loss_mu": 1.0}, "control of the filter alone"),
        ({"strength": -1.0}, "must be finite and at least 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(
    keys: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "EXACT_NODES", 5)
    with pytest.raises(ConfigError, match=message):
        optimizer(make(), **keys)


def test_parameters_need_names_and_must_stay() -> None:
    model = make()
    with pytest.raises(ConfigError, match="needs the parameters' names"):
        SpectralFilterAdamW(model.parameters(), FilterConfig(kind="heat"))
    chosen = optimizer(model)
    backward(model)
    chosen.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match="were changed after"):
        chosen.step()
