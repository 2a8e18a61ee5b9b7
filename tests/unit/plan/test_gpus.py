"""The table of GPUs and the rates that follow from it."""

import pytest

from spectral_scale.config.load import load_config
from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError
from spectral_scale.metrics.flops import peak_flops
from spectral_scale.plan.gpus import GPUS, PRODUCT_SHARE, assumed_rates, gpu_named


def config(*words: str) -> RunConfig:
    return load_config([], list(words)).config


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_peak_in_the_table_of_the_mfu(name: str) -> None:
    gpu = gpu_named(name)
    assert peak_flops(gpu.device_name, "fp16") is not None
    assert gpu.name == name and gpu.memory_rate > gpu.link_rate


def test_an_unknown_gpu_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean a100-80gb"):
        gpu_named("a100-80")
    with pytest.raises(ConfigError, match="must be one of a100-40gb"):
        gpu_named("quantum")


def test_rates_are_shares_of_the_data_sheet() -> None:
    rates = assumed_rates(gpu_named("a100-80gb"), config("--train.precision=bf16"))
    assert rates.peak == 312e12 and rates.products == pytest.approx(PRODUCT_SHARE * 312e12)
    assert rates.exact_products == pytest.approx(PRODUCT_SHARE * 19.5e12)
    tf32 = assumed_rates(gpu_named("a100-80gb"), config("--train.tf32=true"))
    assert tf32.peak == 156e12


def test_a_precision_that_a_gpu_has_not() -> None:
    with pytest.raises(ConfigError, match="v100-32gb computes no products in bf16.*a100-40gb"):
        assumed_rates(gpu_named("v100-32gb"), config("--train.precision=bf16"))
