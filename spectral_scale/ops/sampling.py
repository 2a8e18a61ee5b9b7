"""Draws the singular triplets to train next: keyed sampling without replacement.

SST (arXiv 2405.15481) draws r of k triplets by p_i = (1/k + sigma_i / sum sigma) / 2.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spectral_scale.ops.keyed_random import keyed_uniform

Sampling = Literal["mixed", "sigma", "uniform", "partitioned", "top", "sequential"]


def sampling_probabilities(sigma: Tensor, rule: Sampling) -> Tensor:
    """Probabilities (k,) float64 of one draw. `sigma` (k,) must be >= 0."""
    k = sigma.numel()
    weights = sigma.detach().to("cpu", torch.float64)
    uniform = torch.full((k,), 1.0 / k, dtype=torch.float64)
    total = weights.sum()
    if rule in ("uniform", "partitioned") or total <= 0:
        return uniform
    by_value = weights / total
    return by_value if rule == "sigma" else (uniform + by_value) / 2


def sample_without_replacement(probabilities: Tensor, r: int, *key: object) -> Tensor:
    """r distinct indices, ascending int64, by Gumbel-top-r on log p (equal to sequential draws).

    Ties and zero probabilities are resolved by index, so the result is a function of its inputs.

    With p = (0.5, 0.3, 0.2), r = 2 and keyed uniforms (0.2, 0.9, 0.5), the noise -log(-log u) is
    (-0.48, 2.25, 0.37) and the scores log p + noise are (-1.17, 1.05, -1.24): [0, 1] are drawn. One
    sort replaces r dependent draws, and the key replaces a generator's state in checkpoints.
    """
    uniform = keyed_uniform(probabilities.numel(), *key)
    with np.errstate(divide="ignore"):
        scores = np.log(probabilities.numpy()) - np.log(-np.log(uniform))
    chosen = np.argsort(-scores, kind="stable")[:r]
    return torch.from_numpy(np.sort(chosen).astype(np.int64))


def partition_block(k: int, r: int, block: int, *key: object) -> Tensor:
    """Block `block` of a keyed random permutation of range(k), ascending int64 of length r.

    Blocks 0 .. ceil(k/r) - 1 visit every index; the last is filled up from the first's members.
    """
    order = np.argsort(keyed_uniform(k, *key), kind="stable")
    positions = np.arange(block * r, (block + 1) * r) % k
    return torch.from_numpy(np.sort(order[positions]).astype(np.int64))


def sample_triplets(
    sigma: Tensor, r: int, rule: Sampling, *, seed: int, layer: str, round: int, iteration: int
) -> Tensor:
    """The r triplets of `layer` that train in (round, iteration): ascending int64 indices into k.

    A pure function of its arguments. `top` takes the r largest singular values, `sequential` the
    next r indices of the round, which begins with the largest: both are controls of the paper's
    ablation and draw nothing. Raises ValueError if r exceeds k.
    """
    k = sigma.numel()
    if r > k:
        raise ValueError(f"{layer}: cannot draw r={r} of k={k} triplets")
    if rule == "top":
        return torch.argsort(sigma.detach().cpu(), descending=True, stable=True)[:r].sort().values
    blocks = -(-k // r)
    if rule == "sequential":
        return torch.arange(iteration * r, (iteration + 1) * r).remainder(k).sort().values
    if rule == "partitioned":
        return partition_block(
            k, r, iteration % blocks, seed, "partition", layer, round, iteration // blocks
        )
    probabilities = sampling_probabilities(sigma, rule)
    return sample_without_replacement(probabilities, r, seed, "triplets", layer, round, iteration)
