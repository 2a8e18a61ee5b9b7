"""FRoD's layer: nothing changes at first, gradients are right, merging changes nothing."""

import math

import pytest
import torch
import transformers
from torch import Tensor, nn

from spectral_scale.config.methods.frod import category_of, entries
from spectral_scale.config.schema import SpectralConfig
from spectral_scale.errors import ConfigError, SpectralError
from spectral_scale.methods.convert import merge
from spectral_scale.methods.frod.controller import FRoDController
from spectral_scale.methods.frod.layer import FRoDLinear, convert_frod, frod_layers
from spectral_scale.methods.frod.sparsity import Pattern, draw_positions
from spectral_scale.optim.groups import param_groups

WIDTH, SPARSITY = 16, 0.1
CONFIG = SpectralConfig(method="frod", sparsity=SPARSITY)


class Block(nn.Module):
    def __init__(self, width: int = WIDTH, out: int = 24) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q_proj(x)) + self.fc1(x)[..., : x.shape[-1]]


class Model(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


def dense(dtype: torch.dtype = torch.float64, blocks: int = 3) -> Model:
    torch.manual_seed(0)
    return Model(blocks).to(dtype)


def converted(model: nn.Module, dtype: torch.dtype = torch.float64, **kept: object) -> nn.Module:
    convert_frod(model, CONFIG)
    FRoDController(model, None, CONFIG, dtype=dtype, **kept)
    return model


def trained(model: nn.Module) -> nn.Module:
    """With coefficients as training would leave them."""
    generator = torch.Generator().manual_seed(1)
    for layer in frod_layers(model).values():
        for parameter in (layer.mixing, layer.value_delta):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.1 * noise)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_changes_at_first(dtype: torch.dtype) -> None:
    x = torch.randn(5, WIDTH, dtype=dtype)
    expected = dense(dtype)(x)
    assert torch.equal(converted(dense(dtype), torch.float32)(x), expected)


def test_merging_changes_nothing() -> None:
    model = trained(converted(dense()))
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    before = model(x)
    assert not torch.equal(before, dense()(x))
    assert merge(model) == 6
    assert not frod_layers(model)
    assert torch.equal(model(x), before)


def test_the_weight_is_the_formula() -> None:
    """W' = U (diag(lambda + delta) + S) V^T, from U and lambda of their definitions."""
    for layer in frod_layers(trained(converted(dense()))).values():
        basis, inverse = layer.shared()
        lengths = 1 / inverse
        u = layer.base @ basis.v_inverse_t * inverse
        s = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        s[tuple(basis.pattern.positions)] = layer.mixing.detach()
        expected = u @ (torch.diag(lengths + layer.value_delta.detach()) + s) @ basis.v.t()
        torch.testing.assert_close(layer.effective_weight(), expected, rtol=0, atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    layer = next(iter(frod_layers(trained(converted(dense()))).values()))
    basis, inverse = layer.shared()
    x = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    from spectral_scale.methods.frod.product import FRoDProduct

    def product(x: Tensor, mixing: Tensor, delta: Tensor, bias: Tensor) -> Tensor:
        return FRoDProduct.apply(x, layer.base, mixing, delta, bias, basis, inverse)

    arguments = (x, layer.mixing, layer.value_delta, layer.bias)
    assert torch.autograd.gradcheck(product, arguments)


def test_gradients_are_projections_of_the_dense_gradient() -> None:
    """dL/dS_pq = u_p^T G v_q and dL/ddelta = diag(U^T G V)."""
    layer = next(iter(frod_layers(trained(converted(dense()))).values()))
    x, g = (torch.randn(4, WIDTH, dtype=torch.float64) for _ in range(2))
    layer(x).backward(g)
    basis, inverse = layer.shared()
    full = (layer.base * 1.0 @ basis.v_inverse_t * inverse).t() @ (g.t() @ x) @ basis.v
    torch.testing.assert_close(layer.mixing.grad, full[tuple(basis.pattern.positions)])
    torch.testing.assert_close(layer.value_delta.grad, full.diagonal())


def test_sparse_and_dense_products_agree() -> None:
    positions = draw_positions(WIDTH, SPARSITY, 0)
    sparse, plain = (Pattern(positions, WIDTH, sparse=s) for s in (True, False))
    values = torch.randn(positions.shape[1], dtype=torch.float64)
    u, h = (torch.randn(WIDTH, 9, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(sparse.apply(values, u), plain.apply(values, u))
    torch.testing.assert_close(sparse.products(u, h), plain.products(u, h))


def test_layers_of_a_category_share_their_basis() -> None:
    layers = frod_layers(converted(dense()))
    bases = {id(layer.basis) for layer in layers.values()}
    assert len(bases) == 2
    assert layers["layers.0.q_proj"].basis is layers["layers.2.q_proj"].basis
    names = [n for n, _ in layers["layers.0.fc1"].named_parameters()]
    assert sorted(names) == ["base", "mixing", "value_delta"]
    assert not list(layers["layers.0.fc1"].buffers())


def test_the_update_has_full_rank() -> None:
    """S and the change of lambda together; S alone at 10 % of 16 x 16 cannot."""
    model = trained(converted(dense()))
    layer = frod_layers(model)["layers.1.q_proj"]
    update = layer.effective_weight() - layer.base
    assert int(torch.linalg.matrix_rank(update)) == WIDTH
    layer.value_delta.data.zero_()
    few = layer.effective_weight() - layer.base
    assert 2 < int(torch.linalg.matrix_rank(few)) < WIDTH


@pytest.mark.parametrize(("width", "sparsity"), [(16, 0.1), (7, 1.0), (64, 0.01), (3, 0.12)])
def test_positions(width: int, sparsity: float) -> None:
    positions = draw_positions(width, sparsity, "key")
    rows, columns = positions
    count = min(math.floor(sparsity * width**2), width * (width - 1))
    assert entries(width, sparsity) == len(rows) == count
    assert not bool((rows == columns).any())
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == count
    assert torch.equal(positions, draw_positions(width, sparsity, "key"))
    if count < width * (width - 1):
        assert not torch.equal(positions, draw_positions(width, sparsity, "another key"))


def test_positions_are_spread_evenly() -> None:
    """Every row and column has its share: chi-squared far below what one empty row would give."""
    rows, columns = draw_positions(200, 0.25, 3)
    for found in (rows, columns):
        counts = torch.bincount(found, minlength=200).double()
        assert float(((counts - 50) ** 2 / 50).sum()) < 300


def test_training_is_counted_and_silence_is_an_error() -> None:
    model = dense()
    convert_frod(model, CONFIG)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, spectral_lr=1e-3))
    rates = {g["name"]: g["base_lr"] for g in optimizer.param_groups}
    assert rates == {"dense_no_decay": 1e-3, "frod_mixing": 1e-3, "frod_value": 1e-2}
    controller = FRoDController(model, optimizer, CONFIG, dtype=torch.float64)
    with pytest.raises(SpectralError, match="moved none of the 6 layers' coefficients"):
        controller.after_step()
    controller.applied_steps = 0
    model(torch.randn(8, WIDTH, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    controller.after_step()


def test_a_layer_without_a_basis_is_refused() -> None:
    model = dense()
    convert_frod(model, CONFIG)
    with pytest.raises(SpectralError, match="create the FRoDController"):
        model(torch.randn(2, WIDTH, dtype=torch.float64))


def test_bad_categories_are_named() -> None:
    one = dense(blocks=1)
    convert_frod(one, CONFIG)
    with pytest.raises(ConfigError, match="category q_proj holds one layer, layers.0.q_proj"):
        FRoDController(one, None, CONFIG)
    mixed = dense()
    mixed.layers[1] = Block(width=20).double()
    convert_frod(mixed, CONFIG)
    with pytest.raises(ConfigError, match=r"category q_proj holds .* widths \[16, 20\]"):
        FRoDController(mixed, None, CONFIG)


@pytest.mark.parametrize(("value", "message"), [(math.nan, "NaN or infinity"), (0.0, "zero")])
def test_weights_that_cannot_be_decomposed_are_named(value: float, message: str) -> None:
    model = dense()
    for block in model.layers:
        block.fc1.weight.data.fill_(value)
    convert_frod(model, CONFIG)
    with pytest.raises(SpectralError, match=f"category fc1 .* cannot be decomposed: .*{message}"):
        FRoDController(model, None, CONFIG)


def test_directions_that_a_layer_does_not_use_stay_dead(caplog: pytest.LogCaptureFixture) -> None:
    """A singular stack is said aloud; its layers train in the directions that they use."""
    model = dense()
    for block in model.layers:
        block.fc1.weight.data[:, 3] = 0.0
    convert_frod(model, CONFIG)
    controller = FRoDController(model, None, CONFIG, dtype=torch.float64)
    assert "category fc1: its stack has no full column rank" in caplog.text
    assert controller.dead_directions == 3
    assert "3 directions are zero" in controller.describe()
    model = trained(model)
    model(torch.randn(4, WIDTH, dtype=torch.float64)).square().mean().backward()
    layer: FRoDLinear = model.layers[0].fc1
    dead = layer.shared()[1] == 0
    assert bool((layer.value_delta.grad[dead] == 0).all())
    assert bool((layer.value_delta.grad[~dead] != 0).all())


def test_a_saved_basis_is_taken_over_and_a_turned_sign_would_show() -> None:
    """Why V is saved: another valid basis reconstructs W, and gives a trained S another meaning."""
    model = trained(converted(dense()))
    source = FRoDController(trained(converted(dense())), None, CONFIG, decompose=False)
    state = {k: v.clone() for k, v in _controller(model).state_tensors()}
    weights = {n: layer.base.detach().clone() for n, layer in frod_layers(model).items()}
    other = dense()
    convert_frod(other, CONFIG)
    loaded = FRoDController(
        other, None, CONFIG, weights=weights.__getitem__, dtype=torch.float64, decompose=False
    )
    loaded.load_state(state.__getitem__, 5)
    assert loaded.applied_steps == 5
    assert source.layers.keys() == loaded.layers.keys()
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    assert torch.equal(trained(other)(x)[0], model(x)[0])
    for leaf in ("v", "v_inverse_t"):
        state[f"frod/q_proj/{leaf}"][:, ::2] *= -1
    loaded.load_state(state.__getitem__, 5)
    layer = other.layers[0].q_proj
    right, wrong = (m.layers[0].q_proj.effective_weight() - layer.base for m in (model, other))
    assert float((right - wrong).norm() / right.norm()) > 0.5


def _controller(model: nn.Module) -> FRoDController:
    return FRoDController(model, None, CONFIG, decompose=False, dtype=torch.float64)


@pytest.mark.parametrize(
    ("fqn", "category"),
    [
        ("model.decoder.layers.3.fc1", "fc1"),
        ("model.layers.11.self_attn.q_proj", "self_attn.q_proj"),
        ("fc1", "fc1"),
        ("layers.0", "layers"),
        ("3", "linear"),
        ("bert.encoder.layer.2.attention.output.dense", "attention.output.dense"),
        ("bert.encoder.layer.2.output.dense", "output.dense"),
        ("blocks.1.mlp.0", "mlp"),
    ],
)
def test_categories(fqn: str, category: str) -> None:
    assert category_of(fqn) == category


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_encoders_are_taken(family: str) -> None:
    """Their attention and their feed-forward part both end in `output.dense`, of two widths."""
    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 12,
    }
    config = getattr(transformers, f"{family}Config")(**sizes, attn_implementation="eager")
    model = getattr(transformers, f"{family}Model")(config).double().eval()
    ids = torch.arange(2, 8)[None]
    before = model(ids).last_hidden_state
    layers = converted(model)
    torch.testing.assert_close(layers(ids).last_hidden_state, before)
