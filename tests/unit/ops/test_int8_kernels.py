"""The compiled loops of eight-bit products: the bits of the plain form, and life without them."""

import logging
import shutil
from collections.abc import Iterator

import pytest
import torch

from spectral_scale.ops import int8, int8_kernels

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler"
)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing compiled is remembered, before and after."""
    int8_kernels.compiled_kernels.cache_clear()
    yield
    int8_kernels.compiled_kernels.cache_clear()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "rows apart", "transposed", "expanded"])
def test_bits_are_those_of_the_plain_form(
    dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, m, n = 70, 37, 61
    wide = torch.randn(tokens, 2 * n, generator=generator).mul_(3.0).to(dtype)
    x = {
        "contiguous": wide[:, :n].contiguous(),
        "rows apart": wide[:, :n],
        "transposed": wide[:, :n].t().contiguous().t(),
        "expanded": wide[:1, :n].expand(tokens, n),
    }[layout]
    g = torch.randn(tokens, m, generator=generator).to(dtype)
    q, scale = int8.quantise_rows(torch.randn(m, n, generator=generator))
    bias = torch.randn(m, generator=generator)

    def results() -> list[torch.Tensor]:
        made = [*int8.quantise_rows(x), *int8.quantise_rows(g, scale)]
        for b in (bias, bias.to(dtype), None):
            made.append(int8.linear(x, q, scale, b))
        return [*made, int8.input_gradient(g, q, scale)]

    assert int8_kernels.kernels_for(x) is not None
    compiled = results()
    monkeypatch.setattr(int8, "kernels_for", lambda _: None)
    assert all(torch.equal(a, b) for a, b in zip(compiled, results(), strict=True))


def test_without_a_compiler_the_plain_form_computes(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    x = torch.ones(2, 3)
    with caplog.at_level(logging.WARNING):
        assert int8.quantise_rows(x)[0].eq(127).all()
        int8.quantise_rows(x)
    said = [r.getMessage() for r in caplog.records if "plain, slower form" in r.getMessage()]
    assert len(said) == 1 and "no C compiler no-such-compiler" in said[0]


@needs_compiler
def test_a_compiler_that_fails_is_told(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path
) -> None:
    source = tmp_path / "broken.c"
    source.write_text("this is no C;", encoding="utf-8")
    monkeypatch.setattr(int8_kernels, "SOURCE", source)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert int8_kernels.compiled_kernels() is None
    assert "broken.c could not be compiled" in caplog.text
    assert not list((tmp_path / "spectral_scale").iterdir())


def test_precisions_that_are_not_compiled_take_the_plain_form() -> None:
    assert int8_kernels.kernels_for(torch.ones(1, dtype=torch.float64)) is None
    assert int8_kernels.kernels_for(torch.ones(1, device="meta")) is None
