"""What each model family is made of: one table, which every place that treats families apart reads.

A family is the `model_type` of transformers. Adding one means an entry of FAMILIES, one of
`models.build.MODELS` and, to run it on megatron-core, one of
`backends.megatron.gpt_config.MODELS`; whatever lacks an entry refuses the family by name. No torch
here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from spectral_scale.errors import ConfigError

Entry = TypeVar("Entry")
Size = Literal["hidden_size", "kv_size", "ffn_size"]
"""A field or property of `presets.Architecture`."""


@dataclass(frozen=True, kw_only=True)
class BlockLinear:
    """One linear layer of a transformer block."""

    name: str
    """Last component of the linear's dotted name."""
    parent: Literal["self_attn", "mlp", ""]
    """Module of the block that holds it; "" where the block itself does."""
    reads: Literal["attention", "heads", "mlp", "features"]
    """Input of the linear: the normalised input of attention or of the MLP, the heads' outputs, or
    the MLP's features. Linears that read the same have one gathered or summed input in common."""
    outputs: Size
    """Features that come out."""
    inputs: Size
    """Features that go in."""

    @property
    def path(self) -> str:
        """Dotted name of the linear within its block."""
        return f"{self.parent}.{self.name}" if self.parent else self.name

    @property
    def kind(self) -> Literal["column", "row"]:
        """How tensor parallelism splits it: by outputs (column-parallel) or by inputs (row)."""
        return "column" if self.reads in ("attention", "mlp") else "row"


@dataclass(frozen=True, kw_only=True)
class Family:
    """The structure that all models of a family have in common."""

    title: str
    """Name of the family for a person."""
    base: str
    """Module of the language model that holds embeddings, blocks and the last norm."""
    linears: tuple[BlockLinear, ...]
    """Linear layers of a block, in the order of its parameters."""
    attention_norm: str
    """Name of the block's norm around attention."""
    mlp_norm: str
    """Name of the block's norm around the MLP."""
    final_norm: str
    """Name of the norm after the last block."""
    norm: Literal["LayerNorm", "RMSNorm"]
    """Kind of all norms; LayerNorm has a bias, RMSNorm has none."""
    bias: bool
    """Whether the linears of a block have a bias."""
    positions: Literal["learned", "rotary"]
    """How tokens know their position: by an embedding that trains, or by rotating q and k."""
    position_offset: int
    """Rows of the position embedding before that of position 0."""
    gated_mlp: bool
    """Whether a gate multiplies the MLP's features."""
    dropout: bool
    """Whether its models have residual dropout."""
    config_keys: Mapping[str, tuple[str, ...]]
    """Field of `presets.Architecture` -> keys of config.json, of which the first one given counts;
    `hidden_size`, `num_layers`, `num_heads`, `vocab_size` and `max_positions` have the same key in
    every family."""
    pre_norm_key: str | None
    """Key of config.json that says whether norms precede their sub-layers; None: they do."""
    tied_by_default: bool
    """Whether the output layer is the token embedding where config.json does not say."""

    @property
    def norm_leaves(self) -> tuple[str, ...]:
        """Parameters of a norm."""
        return ("weight", "bias") if self.norm == "LayerNorm" else ("weight",)

    @property
    def linear_leaves(self) -> tuple[str, ...]:
        """Parameters of a dense linear of a block."""
        return ("weight", "bias") if self.bias else ("weight",)

    def linear(self, reads: str) -> BlockLinear:
        """The only linear with that input, such as the one that reads the heads' outputs."""
        (found,) = (linear for linear in self.linears if linear.reads == reads)
        return found


def _attention(output: str) -> tuple[BlockLinear, ...]:
    def projection(name: str, outputs: Size) -> BlockLinear:
        return BlockLinear(
            name=name, parent="self_attn", reads="attention", outputs=outputs, inputs="hidden_size"
        )

    return (
        projection("q_proj", "hidden_size"),
        projection("k_proj", "kv_size"),
        projection("v_proj", "kv_size"),
        BlockLinear(
            name=output,
            parent="self_attn",
            reads="heads",
            outputs="hidden_size",
            inputs="hidden_size",
        ),
    )


def _mlp(parent: Literal["mlp", ""], into: tuple[str, ...], out: str) -> tuple[BlockLinear, ...]:
    return (
        *(
            BlockLinear(
                name=name, parent=parent, reads="mlp", outputs="ffn_size", inputs="hidden_size"
            )
            for name in into
        ),
        BlockLinear(
            name=out, parent=parent, reads="features", outputs="hidden_size", inputs="ffn_size"
        ),
    )


FAMILIES: dict[str, Family] = {
    "opt": Family(
        title="OPT",
        base="model.decoder",
        linears=(*_attention("out_proj"), *_mlp("", ("fc1",), "fc2")),
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        final_norm="final_layer_norm",
        norm="LayerNorm",
        bias=True,
        positions="learned",
        position_offset=2,
        gated_mlp=False,
        dropout=True,
        config_keys={
            "num_kv_heads": ("num_attention_heads",),
            "ffn_size": ("ffn_dim",),
            "embedding_size": ("word_embed_proj_dim", "hidden_size"),
        },
        pre_norm_key="do_layer_norm_before",
        tied_by_default=True,
    ),
    "llama": Family(
        title="LLaMA",
        base="model",
        linears=(*_attention("o_proj"), *_mlp("mlp", ("gate_proj", "up_proj"), "down_proj")),
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        final_norm="norm",
        norm="RMSNorm",
        bias=False,
        positions="rotary",
        position_offset=0,
        gated_mlp=True,
        dropout=False,
        config_keys={
            "num_kv_heads": ("num_key_value_heads", "num_attention_heads"),
            "ffn_size": ("intermediate_size",),
            "embedding_size": ("hidden_size",),
        },
        pre_norm_key=None,
        tied_by_default=False,
    ),
}
"""Family, as config.json has it in `model_type` -> its structure."""


def family_of(name: str) -> Family:
    """The structure of a family. Raises ConfigError for an unknown one."""
    return family_entry(FAMILIES, name, what="model structure")


def family_entry(table: Mapping[str, Entry], name: str, *, what: str) -> Entry:
    """What a table says about a family.

    Args:
        table: entries by the name of the family.
        name: the family, as `Architecture.family` or `model_type` gives it.
        what: an entry of the table, for the message.

    Raises:
        ConfigError: the table has no entry of that name.
    """
    if name not in table:
        raise ConfigError(
            f"there is no {what} for model_type={name!r}; supported: {', '.join(table)}; choose a "
            "model of these families, or convert the weights to one of them"
        )
    return table[name]


def linears_reading(reads: str) -> tuple[str, ...]:
    """Names of the linears of any family that read a given input of their block."""
    names = (x.name for family in FAMILIES.values() for x in family.linears if x.reads == reads)
    return tuple(dict.fromkeys(names))
