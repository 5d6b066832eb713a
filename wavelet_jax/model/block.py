"""One layer of the decoder: pre-norm attention and feed-forward. Dimensions in names are those of `decoder.py`."""

import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from wavelet_jax import positions
from wavelet_jax.attention import attention, sharded
from wavelet_jax.model.products import Linear, dropout, normed
from wavelet_jax.parallel.sharding import ATTENTION_AXES, constrain
from wavelet_jax.positions.terms import Params

NORMS = {"rms": nnx.RMSNorm, "layer": nnx.LayerNorm}
ACTIVATIONS = ("swiglu", "relu")
INITIALIZERS = {"fan_in": nnx.initializers.lecun_normal(), "xavier": nnx.initializers.xavier_uniform()}

# Positions of queries or keys: [T] or [B, T] int32, or the first of consecutive ones.
Positions = Any


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ConfigDict, method: positions.PositionMethod, *, rngs: nnx.Rngs):
        width, heads, head_dim = config.model.d_model, config.model.num_heads, config.model.head_dim
        self.head_dim = head_dim
        self.method = method
        self.backend = config.model.attention_backend
        self.swiglu = config.model.activation == "swiglu"
        self.attention_dropout = config.model.attention_dropout
        norm = functools.partial(NORMS[config.model.norm], width, dtype=jnp.float32, rngs=rngs)
        linear = functools.partial(
            Linear,
            config,
            use_bias=config.model.use_bias,
            kernel_init=INITIALIZERS[config.model.initializer],
            rngs=rngs,
        )
        self.attention_norm, self.feed_forward_norm = norm(), norm()
        self.query = linear(width, heads * head_dim)
        self.key = linear(width, config.model.num_kv_heads * head_dim)
        self.value = linear(width, config.model.num_kv_heads * head_dim)
        self.out = linear(heads * head_dim, width)
        self.up = linear(width, config.model.d_ff)
        if self.swiglu:
            self.gate = linear(width, config.model.d_ff)
        self.down = linear(config.model.d_ff, width)
        self.dropout = nnx.Dropout(config.model.dropout)
        self.activation_dropout = nnx.Dropout(config.model.activation_dropout)
        if method.per_layer:
            self.position = as_params(method.init(rngs.params()))

    def __call__(
        self,
        x_BxTxE: jax.Array,
        shared_position: nnx.Dict,
        *,
        query_positions: Positions,
        key_positions: Positions,
        turns: tuple[Any, Any] | None = None,
        segment_ids: jax.Array | None = None,
        slots: tuple[jax.Array, jax.Array] | None = None,
        dropout_key: jax.Array | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """One layer: x_BxTxE, and the keys and values [B, S, K, D] that were attended to.

        Args:
          x_BxTxE: the residual stream.
          shared_position: the position parameters of all layers, for methods that have no others.
          query_positions, key_positions: tokens.
          turns: `Terms.turns_of` the positions of queries and of keys, which all layers share; None: the layer's own.
          segment_ids: [B, T] int32; attention stays inside a segment.
          slots: keys and values of a cache [B, S, K, D]; positions are then those of its first query and first slot.
          dropout_key: None turns dropout off.
          mesh: see `Decoder.hidden`.
        """
        keys = [None] * 4 if dropout_key is None else jax.random.split(dropout_key, 4)
        with jax.named_scope("attention"):
            query_BxTxHxD, key_BxSxKxD, value_BxSxKxD = self.project(x_BxTxE)
            if slots is not None:
                start = (0, query_positions, 0, 0)
                key_BxSxKxD = jax.lax.dynamic_update_slice(slots[0], key_BxSxKxD, start)
                value_BxSxKxD = jax.lax.dynamic_update_slice(slots[1], value_BxSxKxD, start)
            h_BxTxHxD = self._attend(
                query_BxTxHxD,
                key_BxSxKxD,
                value_BxSxKxD,
                self.position if self.method.per_layer else shared_position,
                query_positions,
                key_positions,
                turns,
                segment_ids,
                keys[0],
                mesh,
            )
            x_BxTxE += dropout(self.dropout, self.out(einops.rearrange(h_BxTxHxD, "b t h d -> b t (h d)")), keys[1])

        with jax.named_scope("feed_forward"):
            h_BxTxE = normed(self.feed_forward_norm, x_BxTxE)
            up_BxTxF = self.up(h_BxTxE)
            h_BxTxF = jax.nn.silu(self.gate(h_BxTxE)) * up_BxTxF if self.swiglu else jax.nn.relu(up_BxTxF)
            h_BxTxF = constrain(h_BxTxF, mesh, "batch", "length", "width")
            x_BxTxE += dropout(self.dropout, self.down(dropout(self.activation_dropout, h_BxTxF, keys[2])), keys[3])
        return constrain(x_BxTxE, mesh, "batch", "length", None), (key_BxSxKxD, value_BxSxKxD)

    def _attend(
        self,
        query_BxTxHxD: jax.Array,
        key_BxSxKxD: jax.Array,
        value_BxSxKxD: jax.Array,
        position: nnx.Dict,
        query_positions: Positions,
        key_positions: Positions,
        turns: tuple[Any, Any] | None,
        segment_ids: jax.Array | None,
        dropout_key: jax.Array | None,
        mesh: Mesh | None,
    ) -> jax.Array:
        params = {name: param[...] for name, param in position.items()}
        dropout_rate = 0.0 if dropout_key is None else self.attention_dropout

        def terms_of(params: Params) -> positions.Terms:  # the embedding has its positions already
            terms = self.method.terms(params).without_embedding()
            return terms if turns is None else terms.without_rotation()

        if turns is not None:
            terms = self.method.terms(params)
            query_BxTxHxD, key_BxSxKxD = terms.rotated(query_BxTxHxD, turns[0]), terms.rotated(key_BxSxKxD, turns[1])

        if mesh is not None and mesh.size > 1 and dropout_rate == 0:
            return sharded.attention(
                query_BxTxHxD,
                key_BxSxKxD,
                value_BxSxKxD,
                terms_of,
                params,
                query_positions,
                mesh=mesh,
                **ATTENTION_AXES,
                segment_ids=segment_ids,
                backend=self.backend,
            )
        # Also with dropout, which draws numbers for the whole score matrix, whatever the mesh.
        return attention(
            query_BxTxHxD,
            key_BxSxKxD,
            value_BxSxKxD,
            terms_of(params),
            query_positions=query_positions,
            key_positions=key_positions,
            segment_ids=segment_ids,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            backend=self.backend,
        )

    def project(self, x_BxTxE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, D], keys and values [B, T, K, D] of the layer's input, before any rotation."""
        h_BxTxE = normed(self.attention_norm, x_BxTxE)
        split = functools.partial(einops.rearrange, pattern="b t (h d) -> b t h d", d=self.head_dim)
        return split(self.query(h_BxTxE)), split(self.key(h_BxTxE)), split(self.value(h_BxTxE))


def as_params(arrays: dict[str, jax.Array]) -> nnx.Dict:
    """A position method's arrays as parameters of a module."""
    return nnx.Dict({name: nnx.Param(array) for name, array in arrays.items()})
