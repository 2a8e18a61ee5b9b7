"""Model shapes by name, and the shapes of a local transformers folder. Pure data, no torch.

OPT: Zhang et al. 2022 (arXiv 2205.01068), table 1. LLaMA: the configurations of the
low-rank-pretraining literature (GaLore, arXiv 2403.03507).
"""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectral_scale.config.families import FAMILIES, family_of
from spectral_scale.config.schema import ModelConfig
from spectral_scale.errors import ConfigError
from spectral_scale.files.json_text import parse_json


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The numbers that determine every weight's shape."""

    family: str
    """A name of `families.FAMILIES`."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Number of transformer blocks."""
    num_heads: int
    """Attention heads."""
    num_kv_heads: int
    """Key and value heads; equal to `num_heads` without grouped-query attention."""
    ffn_size: int
    """Feed-forward width."""
    vocab_size: int
    """Rows of the embedding."""
    max_positions: int
    """Longest sequence the model can hold."""
    embedding_size: int
    """Width of the token embedding (OPT-350M projects it to `hidden_size`)."""
    pre_norm: bool = True
    """Normalise before (True) or after (OPT-350M) each sub-layer."""
    tied_embeddings: bool = False
    """Whether the output layer is the token embedding."""

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_size(self) -> int:
        """Width of all keys, and of all values."""
        return self.num_kv_heads * self.head_size


def _opt(hidden: int, layers: int, heads: int, **changes: Any) -> Architecture:
    base = Architecture(
        family="opt",
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        ffn_size=4 * hidden,
        vocab_size=50272,
        max_positions=2048,
        embedding_size=hidden,
        tied_embeddings=True,
    )
    return replace(base, **changes)


def _llama(hidden: int, ffn: int, layers: int, heads: int, positions: int = 1024) -> Architecture:
    return Architecture(
        family="llama",
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        ffn_size=ffn,
        vocab_size=32000,
        max_positions=positions,
        embedding_size=hidden,
    )


PRESETS: dict[str, Architecture] = {
    "opt-tiny": _opt(256, 4, 4, max_positions=1024),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, embedding_size=512, pre_norm=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "llama-60m": _llama(512, 1376, 8, 8),
    "llama-130m": _llama(768, 2048, 12, 12),
    "llama-350m": _llama(1024, 2736, 24, 16),
    "llama-1b": _llama(2048, 5461, 24, 32),
    "llama-7b": _llama(4096, 11008, 32, 32, positions=2048),
}


def resolve_architecture(model: ModelConfig) -> Architecture:
    """Shapes of the configured model, overrides applied. Raises ConfigError."""
    if model.path is not None:
        return _architecture_of_folder(Path(model.path), model)
    if model.name not in PRESETS:
        near = difflib.get_close_matches(str(model.name), PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"model.name={model.name} is no preset; {hint}known: {', '.join(PRESETS)}; "
            "or give model.path, a local transformers folder"
        )
    return _check(_override(PRESETS[model.name], model), model)


def _override(base: Architecture, model: ModelConfig) -> Architecture:
    hidden = model.hidden_size or base.hidden_size
    ffn = model.ffn_size or base.ffn_size * hidden // base.hidden_size
    heads = model.num_heads or base.num_heads
    embedding = hidden if base.embedding_size == base.hidden_size else base.embedding_size
    vocab = base.vocab_size if model.vocab_size == "auto" else model.vocab_size
    return replace(
        base,
        hidden_size=hidden,
        embedding_size=embedding,
        num_layers=model.num_layers or base.num_layers,
        num_heads=heads,
        num_kv_heads=heads if base.num_kv_heads == base.num_heads else base.num_kv_heads,
        ffn_size=ffn,
        vocab_size=vocab,
        max_positions=model.max_positions or base.max_positions,
    )


def _architecture_of_folder(folder: Path, model: ModelConfig) -> Architecture:
    overrides = ("hidden_size", "num_layers", "num_heads", "ffn_size", "max_positions")
    given = [key for key in overrides if getattr(model, key) is not None]
    if given:
        raise ConfigError(
            f"model.path={folder} fixes the shapes, but model.{given[0]} is also given; remove one"
        )
    try:
        raw = parse_json((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path={folder}: config.json cannot be read ({error}); "
            "give a folder written by save_pretrained"
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"model.path={folder}: config.json must hold an object")
    try:
        found = architecture_of(raw)
    except KeyError as error:
        raise ConfigError(f"model.path={folder}: config.json lacks {error}") from None
    except ValueError as error:
        raise ConfigError(f"model.path={folder}: config.json: {error}") from None
    if model.vocab_size not in ("auto", found.vocab_size):
        raise ConfigError(
            f"model.vocab_size={model.vocab_size}, but {folder} has {found.vocab_size}; use auto"
        )
    return _check(found, model)


def architecture_of(raw: dict[str, Any]) -> Architecture:
    """Shapes of a transformers configuration (the content of config.json).

    Raises KeyError for a missing size and ValueError for one that cannot be used.
    """
    name = str(raw.get("model_type"))
    if name not in FAMILIES:
        raise ValueError(
            f"model_type={raw.get('model_type')!r}; "
            f"supported: {', '.join(FAMILIES)}; convert the weights to one of them"
        )
    family = FAMILIES[name]
    hidden, heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    if raw.get("head_dim") not in (None, hidden // heads):
        raise ValueError(
            f"head_dim is {raw['head_dim']}; only hidden_size / num_attention_heads = "
            f"{hidden // heads} is supported"
        )
    return Architecture(
        family=name,
        hidden_size=hidden,
        num_layers=_size(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_size(raw, *family.config_keys["num_kv_heads"]),
        ffn_size=_size(raw, *family.config_keys["ffn_size"]),
        vocab_size=_size(raw, "vocab_size"),
        max_positions=_size(raw, "max_position_embeddings"),
        embedding_size=_size(raw, *family.config_keys["embedding_size"]),
        pre_norm=True if family.pre_norm_key is None else raw.get(family.pre_norm_key, True),
        tied_embeddings=raw.get("tie_word_embeddings", family.tied_by_default),
    )


def _size(raw: dict[str, Any], *keys: str) -> int:
    """The first of `keys` that is given; KeyError without one, ValueError unless it is a size."""
    key = next((key for key in keys if raw.get(key) is not None), keys[-1])
    size = raw[key]
    if type(size) is not int or size < 1:
        raise ValueError(f"{key} is {size!r}, a whole number of at least 1 is required")
    return size


def _check(found: Architecture, model: ModelConfig) -> Architecture:
    family = family_of(found.family)
    if found.hidden_size % found.num_heads:
        raise ConfigError(
            f"hidden size {found.hidden_size} is not divisible by {found.num_heads} heads; "
            "change model.hidden_size or model.num_heads"
        )
    if found.num_heads % found.num_kv_heads:
        raise ConfigError(
            f"{found.num_heads} attention heads are not divisible by {found.num_kv_heads} key and "
            "value heads; correct num_key_value_heads in config.json"
        )
    if family.positions == "rotary" and found.head_size % 2:
        raise ConfigError(
            f"rotary positions need an even head size, not {found.hidden_size} / "
            f"{found.num_heads} = {found.head_size}; change model.hidden_size or model.num_heads"
        )
    if model.sequence_length > found.max_positions:
        raise ConfigError(
            f"model.sequence_length={model.sequence_length} exceeds the model's "
            f"{found.max_positions} positions; lower it to at most {found.max_positions}"
        )
    if model.dropout and not family.dropout:
        raise ConfigError(
            f"model.dropout={model.dropout}: {family.title} has no residual dropout; set 0"
        )
    return found


def linear_shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear of one block, by its last name."""
    return {
        linear.name: (getattr(architecture, linear.outputs), getattr(architecture, linear.inputs))
        for linear in family_of(architecture.family).linears
    }
