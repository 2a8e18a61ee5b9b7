"""Which FRoD layers share a basis, and which rank reads which of their matrices."""

from spectral_scale.config.methods.frod import category_of
from spectral_scale.errors import ConfigError
from spectral_scale.methods.frod.layer import FRoDLinear


def share_out(categories: dict[str, list[str]], world_size: int) -> dict[str, int]:
    """Owner rank by layer: categories are decomposed one after another, each by all ranks."""
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
