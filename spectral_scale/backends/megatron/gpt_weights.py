"""Where every element of a transformers model lies in the Megatron parameters of one rank.

megatron-core fuses query, key and value per query group, and gate and up projection per rank; it
shards matrices over tensor-parallel ranks and may pad the vocabulary. The map says so as
rectangles, so that a rank reads and writes logical tensors of the transformers model and nothing
else: saved that way, weights and moments load at any number of ranks and on any backend.
"""

from dataclasses import dataclass

from spectral_scale.backends.megatron.gpt_config import position_rows
from spectral_scale.config.families import family_of
from spectral_scale.config.presets import Architecture
from spectral_scale.errors import ConfigError
from spectral_scale.parallel.shard_geometry import Rectangle, Shape
from spectral_scale.parallel.tensor_parallel_table import local_rectangle, sharded_dimension


@dataclass(frozen=True, kw_only=True)
class WeightRegion:
    """A rectangle of a logical tensor, and the equal one of a Megatron parameter."""

    fqn: str
    """Name in the transformers model."""
    global_shape: Shape
    """Shape of the whole logical tensor."""
    logical: Rectangle
    """The rectangle of the logical tensor."""
    local: Rectangle
    """The equal rectangle of this rank's parameter."""


@dataclass(frozen=True, kw_only=True)
class MegatronWeight:
    """One parameter of the GPTModel, as one tensor-parallel rank holds it."""

    shape: Shape
    """Shape of this rank's parameter."""
    regions: tuple[WeightRegion, ...]
    """The rectangles it is made of; elements of no region are padding, and zero."""
    replicated: bool
    """Whether every tensor-parallel rank holds all of it."""


WeightMap = dict[str, MegatronWeight]
"""Every parameter of a GPTModel by name, tied ones once."""


def megatron_weights(
    architecture: Architecture,
    *,
    parts: int,
    index: int,
    padded_vocab_size: int | None = None,
) -> WeightMap:
    """The map of rank `index` of `parts` tensor-parallel ranks (see `MegatronSettings`).

    Raises ConfigError if a size cannot be sharded equally.
    """
    if not 0 <= index < parts:
        raise ConfigError(f"there is no rank {index} among {parts}; give 0 to {parts - 1}")
    return _Mapper(architecture, parts, index, padded_vocab_size).weights()


def logical_shapes(weights: WeightMap) -> dict[str, Shape]:
    """Shape of every logical tensor, by name."""
    return {p.fqn: p.global_shape for weight in weights.values() for p in weight.regions}


class _Mapper:
    """Writes the map of one rank, parameter by parameter."""

    def __init__(self, a: Architecture, parts: int, index: int, padded: int | None) -> None:
        self.a, self.parts, self.index = a, parts, index
        self.padded = a.vocab_size if padded is None else padded
        self.family = family_of(a.family)

    def weights(self) -> WeightMap:
        a, family, found = self.a, self.family, {}
        found["embedding.word_embeddings.weight"] = self._vocabulary(
            f"{family.base}.embed_tokens.weight"
        )
        if family.positions == "learned":
            found["embedding.position_embeddings.weight"] = self._plain(
                f"{family.base}.embed_positions.weight", (position_rows(a), a.hidden_size)
            )
        for layer in range(a.num_layers):
            found |= self._block(f"decoder.layers.{layer}", f"{family.base}.layers.{layer}")
        found |= self._norm("decoder.final_layernorm", f"{family.base}.{family.final_norm}")
        if not a.tied_embeddings:
            found["output_layer.weight"] = self._vocabulary("lm_head.weight")
        return found

    def _block(self, to: str, of: str) -> WeightMap:
        a, family = self.a, self.family
        out, down = family.linear("heads").path, family.linear("features").path
        found = self._norm(f"{to}.input_layernorm", f"{of}.{family.attention_norm}")
        found |= self._norm(f"{to}.pre_mlp_layernorm", f"{of}.{family.mlp_norm}")
        for leaf in family.linear_leaves:
            found[f"{to}.self_attention.linear_qkv.{leaf}"] = self._qkv(of, leaf)
            if family.gated_mlp:
                found[f"{to}.mlp.linear_fc1.{leaf}"] = self._gate_and_up(of, leaf)
            else:
                up = f"{of}.{family.linear('mlp').path}.{leaf}"
                shape = self._shape(leaf, a.ffn_size, a.hidden_size)
                found[f"{to}.mlp.linear_fc1.{leaf}"] = self._plain(up, shape)
            attended = a.num_heads * a.head_size
            found[f"{to}.self_attention.linear_proj.{leaf}"] = self._plain(
                f"{of}.{out}.{leaf}", self._shape(leaf, a.hidden_size, attended)
            )
            found[f"{to}.mlp.linear_fc2.{leaf}"] = self._plain(
                f"{of}.{down}.{leaf}", self._shape(leaf, a.hidden_size, a.ffn_size)
            )
        return found

    def _norm(self, to: str, of: str) -> WeightMap:
        size = (self.a.hidden_size,)
        return {
            f"{to}.{leaf}": self._plain(f"{of}.{leaf}", size) for leaf in self.family.norm_leaves
        }

    def _shape(self, leaf: str, out_features: int, in_features: int) -> Shape:
        return (out_features, in_features) if leaf == "weight" else (out_features,)

    def _plain(self, fqn: str, shape: Shape) -> MegatronWeight:
        """One logical tensor: all of it, or this rank's shard of equal ones."""
        shard = local_rectangle(fqn, shape, parts=self.parts, index=self.index)
        here = Rectangle((0,) * len(shape), shard.shape)
        region = WeightRegion(fqn=fqn, global_shape=shape, logical=shard, local=here)
        whole = self.parts == 1 or sharded_dimension(fqn) is None
        return MegatronWeight(shape=shard.shape, regions=(region,), replicated=whole)

    def _vocabulary(self, fqn: str) -> MegatronWeight:
        """Equal shards of the padded vocabulary's rows; the last ones may hold padding.

        Of 5 tokens padded to 8 rows over 4 ranks, ranks 0 and 1 hold two tokens each, rank 2 one
        token and a row of padding, rank 3 two rows of padding.
        """
        if self.padded % self.parts or self.padded < self.a.vocab_size:
            raise ConfigError(
                f"a vocabulary padded to {self.padded} must hold {self.a.vocab_size} tokens and be "
                f"divided by {self.parts} tensor-parallel ranks"
            )
        rows, width = self.padded // self.parts, self.a.hidden_size
        start = min(self.index * rows, self.a.vocab_size)
        count = min(rows, self.a.vocab_size - start)
        shape = (self.a.vocab_size, width)
        region = self._rows(fqn, shape, start, count, 0)
        return MegatronWeight(
            shape=(rows, width),
            regions=(region,) if count else (),
            replicated=self.parts == 1,
        )

    def _qkv(self, of: str, leaf: str) -> MegatronWeight:
        """Query group by query group: its queries, its key, its value.

        With 4 query heads and 2 key and value heads the rows of the whole fused weight are, in
        heads, q0 q1 k0 v0 q2 q3 k1 v1; of two ranks, each holds one group.
        """
        a, d = self.a, self.a.head_size
        groups, per_group = a.num_kv_heads // self.parts, a.num_heads // a.num_kv_heads
        if a.num_kv_heads % self.parts:
            raise ConfigError(
                f"{a.num_kv_heads} key and value heads cannot be sharded equally over {self.parts} "
                "tensor-parallel ranks"
            )
        regions, at = [], 0
        for group in range(self.index * groups, (self.index + 1) * groups):
            for name, heads in (("q_proj", per_group), ("k_proj", 1), ("v_proj", 1)):
                total = a.num_heads if name == "q_proj" else a.num_kv_heads
                shape = self._shape(leaf, total * d, a.hidden_size)
                start, count = group * heads * d, heads * d
                fqn = f"{of}.self_attn.{name}.{leaf}"
                regions.append(self._rows(fqn, shape, start, count, at))
                at += count
        return self._stacked(regions, at, leaf)

    def _gate_and_up(self, of: str, leaf: str) -> MegatronWeight:
        """This rank's rows of the gate, then its rows of the up projection."""
        shape = self._shape(leaf, self.a.ffn_size, self.a.hidden_size)
        regions, at = [], 0
        for name in ("gate_proj", "up_proj"):
            fqn = f"{of}.mlp.{name}.{leaf}"
            shard = local_rectangle(fqn, shape, parts=self.parts, index=self.index)
            regions.append(self._rows(fqn, shape, shard.offset[0], shard.shape[0], at))
            at += shard.shape[0]
        return self._stacked(regions, at, leaf)

    def _stacked(self, regions: list[WeightRegion], rows: int, leaf: str) -> MegatronWeight:
        shape = self._shape(leaf, rows, self.a.hidden_size)
        return MegatronWeight(shape=shape, regions=tuple(regions), replicated=self.parts == 1)

    def _rows(self, fqn: str, shape: Shape, start: int, count: int, at: int) -> WeightRegion:
        rest = (0,) * (len(shape) - 1)
        size = (count, *shape[1:])
        return WeightRegion(
            fqn=fqn,
            global_shape=shape,
            logical=Rectangle((start, *rest), size),
            local=Rectangle((at, *rest), size),
        )
