"""FRoD's categories, whose layers have one common basis, and the owners of their matrices.

An example: `model.layers.0.self_attn.q_proj` and `model.layers.1.self_attn.q_proj` are in category
`self_attn.q_proj`; all layers of a category must have one width n, because V is n x n. With three
layers and two ranks, rank 0 owns layers 0 and 2 of every category, and rank 1 owns layer 1.
"""

from spectral_scale.config.methods.frod import category_of
from spectral_scale.errors import ConfigError
from spectral_scale.methods.frod.layer import FRoDLinear


def owners_by_category(categories: dict[str, list[str]], world_size: int) -> dict[str, int]:
    """Owner rank by layer, dealt out anew in every category.

    Categories are decomposed one after another, each by all ranks, so every category is balanced on
    its own.
    """
    return {n: i % world_size for names in categories.values() for i, n in enumerate(names)}


def group_by_category(layers: dict[str, FRoDLinear]) -> dict[str, list[str]]:
    """Layer names by category, in the model's order.

    Raises ConfigError for a category with one layer or with layers of different widths.
    """
    if not layers:
        raise ConfigError("the model holds no FRoD layer; call convert_frod() first")
    found: dict[str, list[str]] = {}
    for name in layers:
        found.setdefault(category_of(name), []).append(name)
    for category, names in found.items():
        widths = {layers[n].in_features for n in names}
        if len(widths) > 1:
            raise ConfigError(
                f"category {category} holds layers of different widths {sorted(widths)} "
                f"({names[0]} ...); a shared basis needs one width; leave them out of targets"
            )
        if len(names) == 1:
            raise ConfigError(
                f"category {category} holds one layer, {names[0]}, and a shared basis needs at "
                "least two; leave it out of targets, or use lora or sst"
            )
    return found
