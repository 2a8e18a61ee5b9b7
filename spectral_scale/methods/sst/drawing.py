"""Drawing the triplets of an iteration on their owner."""

from spectral_scale.config.schema import SpectralConfig
from spectral_scale.methods.sst.bank import Triplets
from spectral_scale.ops.sampling import sample_triplets


def draw_triplets(
    entry: Triplets,
    config: SpectralConfig,
    *,
    seed: int,
    layer: str,
    position: tuple[int, int],
) -> int:
    """Choose the active and extra triplets, in place; how many were not active before.

    Args:
        entry: of the layer.
        config: how many, and by which rule.
        seed: of the run; with layer and position it determines the draw.
        layer: its name.
        position: (round, iteration within the round).
    """
    round_, iteration = position
    drawn = sample_triplets(
        entry.sigma,
        config.spectral_rank,
        config.sampling,
        seed=seed,
        layer=layer,
        round=round_,
        iteration=iteration,
    )
    before = set(entry.active.tolist())
    entry.active = drawn.to(entry.sigma.device)
    if config.extra_sigma:
        others = entry.complement()
        extra = sample_triplets(
            entry.sigma[others],
            config.extra_sigma,
            "uniform",
            seed=seed,
            layer=f"{layer}/extra",
            round=round_,
            iteration=iteration,
        )
        entry.extra = others[extra.to(others.device)]
    return len(set(drawn.tolist()) - before)
