"""The GPUs and the rates that estimates of time assume, all in this file. No torch.

Peaks of products are those of `metrics.flops`, from which a run's MFU is computed as well. What is
not on a data sheet is an assumption; `plan --calibration` replaces it by a measurement.
"""

import difflib
from dataclasses import dataclass, replace

from spectral_scale.config.schema import RunConfig
from spectral_scale.errors import ConfigError
from spectral_scale.metrics.flops import peak_flops


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU, as its data sheet has it."""

    name: str
    """What `--gpu` gives."""
    device_name: str
    """Its name as `torch.cuda.get_device_name` has it, which `metrics.flops.peak_flops` knows."""
    memory_bytes: float
    """Device memory."""
    memory_rate: float
    """Bytes a second of its memory."""
    link_rate: float
    """Bytes a second, one way, between the GPUs of a node."""
    watts: float
    """Largest power of the board."""


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a100-40gb", device_name="NVIDIA A100-SXM4-40GB", memory_bytes=40e9,
            memory_rate=1.555e12, link_rate=300e9, watts=400),
        Gpu(name="a100-80gb", device_name="NVIDIA A100-SXM4-80GB", memory_bytes=80e9,
            memory_rate=2.039e12, link_rate=300e9, watts=400),
        Gpu(name="a40", device_name="NVIDIA A40", memory_bytes=48e9,
            memory_rate=0.696e12, link_rate=25e9, watts=300),
        Gpu(name="b200", device_name="NVIDIA B200", memory_bytes=180e9,
            memory_rate=7.7e12, link_rate=900e9, watts=1000),
        Gpu(name="h100", device_name="NVIDIA H100 80GB HBM3", memory_bytes=80e9,
            memory_rate=3.35e12, link_rate=450e9, watts=700),
        Gpu(name="h100-pcie", device_name="NVIDIA H100 PCIe", memory_bytes=80e9,
            memory_rate=2.0e12, link_rate=50e9, watts=350),
        Gpu(name="h200", device_name="NVIDIA H200", memory_bytes=141e9,
            memory_rate=4.8e12, link_rate=450e9, watts=700),
        Gpu(name="l40s", device_name="NVIDIA L40S", memory_bytes=48e9,
            memory_rate=0.864e12, link_rate=25e9, watts=350),
        Gpu(name="v100-32gb", device_name="Tesla V100-SXM2-32GB", memory_bytes=32e9,
            memory_rate=0.9e12, link_rate=150e9, watts=300),
    )
}  # fmt: skip
"""`--gpu` -> data sheet."""

NETWORK_GIGABITS = 200.0
"""Network of one GPU unless `--network` says otherwise, Gb/s, one way."""
PRODUCT_SHARE = 0.65
"""Share of the peak that products of matrices reach."""
HALF_OVER_FULL = 16
"""Peak of 16-bit products over that of fp32, where the data sheet's fp32 is not in the table."""
MEMORY_SHARE = 0.8
"""Share of the memory's rate that operations limited by it reach."""
LINK_SHARE = 0.8
"""Share of the rates of links and network that collectives reach."""
DECOMPOSITION_RATE = 5e9
"""max(m, n) min(m, n)^2 a second of an SVD on a GPU in fp32: 27 s for 5120 x 5120."""
LINK_SECONDS, NETWORK_SECONDS = 3e-6, 8e-6
"""Delay of one hop of a collective inside a node, and between nodes."""
LAUNCH_SECONDS = 6e-6
"""Time in which the host queues one operation."""
HOST_RATE = 50e9
"""Bytes a second of host memory at which an offloaded optimizer steps."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a rank reaches, by assumption or as measured."""

    products: float
    """FLOP/s of products in the run's precision."""
    exact_products: float
    """FLOP/s of products in the precision of what trains."""
    memory: float
    """Bytes a second of operations limited by memory."""
    decompositions: float
    """max(m, n) min(m, n)^2 a second."""
    launch_seconds: float
    """Time in which the host queues one operation."""
    peak: float | None
    """Peak FLOP/s of a rank, for the MFU; None where it is not known."""
    source: str
    """Where the rates come from."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes with the same number of GPUs each, one rank a GPU."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    network_rate: float = NETWORK_GIGABITS * 1e9 / 8
    """Bytes a second of the network of one GPU, one way."""

    @property
    def world_size(self) -> int:
        """Ranks of a run on all GPUs."""
        return self.nodes * self.gpus_per_node


def gpu_named(name: str) -> Gpu:
    """The data sheet of a GPU. Raises ConfigError, which names the nearest one."""
    if name in GPUS:
        return GPUS[name]
    near = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"--gpu {name} is not known; {hint}it must be one of {', '.join(GPUS)}")


def assumed_rates(gpu: Gpu, config: RunConfig) -> Rates:
    """The rates of a GPU by the shares above. Raises ConfigError for a precision it has not."""
    train = config.train
    product = "tf32" if train.tf32 else train.precision
    exact = "fp64" if train.precision == "fp64" else "fp32"
    peak = peak_flops(gpu.device_name, product)
    if peak is None:
        having = [g.name for g in GPUS.values() if peak_flops(g.device_name, product) is not None]
        raise ConfigError(
            f"--gpu {gpu.name} computes no products in {product}; set another train.precision, or "
            f"take one of {', '.join(having)}"
        )
    exact_peak = peak_flops(gpu.device_name, exact) or peak / HALF_OVER_FULL
    return Rates(
        products=PRODUCT_SHARE * peak,
        exact_products=PRODUCT_SHARE * min(exact_peak, peak),
        memory=MEMORY_SHARE * gpu.memory_rate,
        decompositions=DECOMPOSITION_RATE,
        launch_seconds=LAUNCH_SECONDS,
        peak=peak,
        source="assumed",
    )


def rate_assumptions(rates: Rates, cluster: Cluster) -> tuple[str, ...]:
    """The rates in words, for a person."""
    return (
        f"rates ({rates.source}): products {rates.products / 1e12:,.3g} TFLOP/s, exact ones "
        f"{rates.exact_products / 1e12:,.3g}, memory {rates.memory / 1e9:,.4g} GB/s, an SVD "
        f"{rates.decompositions / 1e9:.3g} G max(m, n) min(m, n)^2 a second",
        f"links: {LINK_SHARE:.0%} of {cluster.gpu.link_rate / 1e9:.0f} GB/s inside a node and of "
        f"{8 * cluster.network_rate / 1e9:.0f} Gb/s a GPU between nodes",
    )


def with_network(cluster: Cluster, gigabits: float) -> Cluster:
    """The same cluster with another network. Raises ConfigError."""
    if not gigabits > 0:
        raise ConfigError(f"--network {gigabits} must be above 0 Gb/s a GPU")
    return replace(cluster, network_rate=gigabits * 1e9 / 8)
