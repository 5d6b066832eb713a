"""The decoder, for both shapes of the paper: Llama (section 7) and Baevski-Auli (section 6) differ by their config.

Dimensions in names: B batch, T tokens, S cached tokens, E d_model, F d_ff, H query heads, K key heads, D head_dim,
V vocabulary.
"""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from wavelet_jax import positions
from wavelet_jax.attention import BACKENDS, KEPT, attention, sharded
from wavelet_jax.config import numeric_keys
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.model.vocabulary import AdaptiveVocabulary
from wavelet_jax.parallel.sharding import ATTENTION_AXES, constrain
from wavelet_jax.positions.absolute import check_positions

NORMS = {"rms": nnx.RMSNorm, "layer": nnx.LayerNorm}
ACTIVATIONS = ("swiglu", "relu")
VOCABULARIES = ("full", "adaptive")
INITIALIZERS = {"fan_in": nnx.initializers.lecun_normal(), "xavier": nnx.initializers.xavier_uniform()}
DTYPES = ("float32", "bfloat16")
# What the blocks keep of a forward pass, beside their inputs, for the backward pass, which computes the rest again.
_KEEP_ATTENTION = jax.checkpoint_policies.save_only_these_names(KEPT)
_KEEP_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable  # products with parameters, and not scores
REMATS = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(_KEEP_DOTS, _KEEP_ATTENTION),
    "attention": _KEEP_ATTENTION,
    "block": jax.checkpoint_policies.nothing_saveable,
}

# One (key [B, S, K, D], value [B, S, K, D]) a layer, and how many of the S slots are filled (int32).
Cache = tuple[list[tuple[jax.Array, jax.Array]], jax.Array]


def make_position(config: ConfigDict) -> positions.PositionMethod:
    """The position method of `config.position`, in the sizes of `config.model`.

    Raises:
      UserError: an unknown method, an option of another method, or a value that the method refuses.
    """
    method = config.position.method
    own = [option for option in positions.config(method) if option != "method"]
    for option in config.position:
        if option not in (*own, "method"):
            raise positions.unknown_option(method, option)
    sizes = {name: config.model[name] for name in positions.OF_THE_MODEL if name in positions.fields(method)}
    return positions.make(method, **sizes, **{option: config.position[option] for option in own})


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ConfigDict, method: positions.PositionMethod, *, rngs: nnx.Rngs):
        width, heads, head_dim = config.model.d_model, config.model.num_heads, config.model.head_dim
        self.head_dim = head_dim
        self.method = method
        self.backend = config.model.attention_backend
        self.swiglu = config.model.activation == "swiglu"
        self.attention_dropout = config.model.attention_dropout
        norm = functools.partial(NORMS[config.model.norm], width, dtype=config.model.dtype, rngs=rngs)
        linear = functools.partial(
            nnx.Linear,
            use_bias=config.model.use_bias,
            dtype=config.model.dtype,
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
            self.position = _as_params(method.init(rngs.params()))

    def __call__(
        self, x_BxTxE, shared_position, *, query_positions, key_positions, segment_ids, cache, dropout_key, mesh
    ):
        """One layer. Returns x_BxTxE and, of the layer's cache, the new (key, value)."""
        position = self.position if self.method.per_layer else shared_position
        params = {name: param[...] for name, param in position.items()}
        keys = [None] * 4 if dropout_key is None else jax.random.split(dropout_key, 4)

        with jax.named_scope("attention"):
            query_BxTxHxD, key_BxSxKxD, value_BxSxKxD = self.project(x_BxTxE)
            if cache is not None:  # positions are then the first of consecutive ones, and slots the keys' positions
                start = (0, query_positions, 0, 0)
                key_BxSxKxD = jax.lax.dynamic_update_slice(cache[0], key_BxSxKxD, start)
                value_BxSxKxD = jax.lax.dynamic_update_slice(cache[1], value_BxSxKxD, start)
            dropout_rate = 0.0 if dropout_key is None else self.attention_dropout

            def terms_of(params):  # the embedding has its positions already
                return self.method.terms(params).without_embedding()

            if mesh is not None and mesh.size > 1 and dropout_rate == 0:
                h_BxTxHxD = sharded.attention(
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
            else:  # also what a dropout of weights draws for the whole score matrix, whatever the mesh
                h_BxTxHxD = attention(
                    query_BxTxHxD,
                    key_BxSxKxD,
                    value_BxSxKxD,
                    terms_of(params),
                    query_positions=query_positions,
                    key_positions=key_positions,
                    segment_ids=segment_ids,
                    dropout_rate=dropout_rate,
                    dropout_key=keys[0],
                    backend=self.backend,
                )
            x_BxTxE += _dropout(self.dropout, self.out(einops.rearrange(h_BxTxHxD, "b t h d -> b t (h d)")), keys[1])

        with jax.named_scope("feed_forward"):
            h_BxTxE = self.feed_forward_norm(x_BxTxE)
            up_BxTxF = self.up(h_BxTxE)
            h_BxTxF = jax.nn.silu(self.gate(h_BxTxE)) * up_BxTxF if self.swiglu else jax.nn.relu(up_BxTxF)
            h_BxTxF = constrain(h_BxTxF, mesh, "batch", "length", "width")
            x_BxTxE += _dropout(self.dropout, self.down(_dropout(self.activation_dropout, h_BxTxF, keys[2])), keys[3])
        return constrain(x_BxTxE, mesh, "batch", "length", None), (key_BxSxKxD, value_BxSxKxD)

    def project(self, x_BxTxE):
        """Queries [B, T, H, D], keys and values [B, T, K, D] of the layer's input, before any rotation."""
        h_BxTxE = self.attention_norm(x_BxTxE)
        split = functools.partial(einops.rearrange, pattern="b t (h d) -> b t h d", d=self.head_dim)
        return tuple(split(f(h_BxTxE)) for f in (self.query, self.key, self.value))


class Decoder(nnx.Module):
    """A causal language model whose positions are any of `positions.METHODS`.

    Parameters are float32; activations are in `config.model.dtype`; scores, softmax and logits are accumulated in
    float32.

    Args:
      config: reads `config.model` and `config.position`; every key is explained in `configs/default.py`.
      vocab_size: V.
      rngs: needs a "params" stream. Dropout keys are arguments of the call.

    Raises:
      UserError: a name that does not exist, head counts that do not divide, or what the position method refuses.
    """

    def __init__(self, config: ConfigDict, vocab_size: int, *, rngs: nnx.Rngs):
        check(config)
        width = config.model.d_model
        self.dtype = jnp.dtype(config.model.dtype)
        self.remat = config.model.remat
        self.embedding_scale = np.sqrt(width) if config.model.scale_embedding else 1.0
        self.kv_shape = (config.model.num_kv_heads, config.model.head_dim)
        self.method = make_position(config)
        self.adaptive = config.model.vocabulary == "adaptive"
        # Rows are taken in float32 and then cast: the gradient of a row is a sum over all of its tokens, and a
        # thousand ones in bfloat16 add up to 256.
        self.embedding = (
            AdaptiveVocabulary(config, vocab_size, kernel_init=INITIALIZERS[config.model.initializer], rngs=rngs)
            if self.adaptive
            else nnx.Embed(
                vocab_size, width, dtype=jnp.float32, embedding_init=nnx.initializers.normal(width**-0.5), rngs=rngs
            )
        )
        # Methods without parameters of their own for each layer have one set here, maybe empty.
        self.position = _as_params({} if self.method.per_layer else self.method.init(rngs.params()))
        self.dropout = nnx.Dropout(config.model.dropout)
        self.blocks = nnx.List([Block(config, self.method, rngs=rngs) for _ in range(config.model.num_layers)])
        self.final_norm = (
            NORMS[config.model.norm](width, dtype=self.dtype, rngs=rngs) if config.model.final_norm else None
        )
        self.head = (
            None
            if config.model.tied_head
            else nnx.Linear(width, vocab_size, use_bias=False, kernel_init=nnx.initializers.lecun_normal(), rngs=rngs)
        )

    def __call__(self, tokens_BxT, *, positions=None, segment_ids=None, dropout_key=None) -> jax.Array:
        """Logits [B, T, V] in float32; see `hidden`. Long sequences want `hidden` and logits in chunks."""
        return self.logits(
            self.hidden(tokens_BxT, positions=positions, segment_ids=segment_ids, dropout_key=dropout_key)
        )

    def hidden(
        self,
        tokens_BxT,
        *,
        positions=None,
        segment_ids=None,
        dropout_key=None,
        mesh: Mesh | None = None,
        nudge_BxTxE=None,
    ) -> jax.Array:
        """The last layer's output [B, T, E], normed where the config says so.

        Args:
          tokens_BxT: token ids, int32.
          positions: [T] or [B, T] int32, tokens; 0, 1, 2, .. where left out.
          segment_ids: [B, T] int32 for packed documents: attention stays inside a segment.
          dropout_key: a key for the dropout rates of the config; None turns dropout off.
          mesh: says how activations are divided over its devices, with tokens and positions in the order of
            `sharding.token_order`; None: the compiler sees to it.
          nudge_BxTxE: added to the embeddings, so that a gradient by what a token brings can be taken; None: nothing.
        """
        # NumPy positions are constants under jit, which lets methods check them and attention plan its tiles.
        positions = np.arange(tokens_BxT.shape[1]) if positions is None else positions
        return self._run(
            tokens_BxT,
            positions,
            positions,
            segment_ids=segment_ids,
            dropout_key=dropout_key,
            mesh=mesh,
            nudge_BxTxE=nudge_BxTxE,
        )[0]

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for `extend` with room for `length` tokens."""
        check_positions(length, self.terms().max_positions)
        empty = jnp.zeros((batch_size, length, *self.kv_shape), self.dtype)
        return [(empty, empty) for _ in self.blocks], jnp.int32(0)

    def extend(self, tokens_BxT, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads T more tokens after those in the cache. Returns their hidden states [B, T, E] and the longer cache.

        Past the cache's room is a `UserError`, or NaN where the count is traced.
        """
        layers, filled = cache
        room, wanted = layers[0][0].shape[1], filled + tokens_BxT.shape[1]
        if not isinstance(wanted, jax.core.Tracer) and wanted > room:
            raise UserError(f"the cache has room for {room} tokens, not for {wanted}: give init_cache a longer length")
        # Both positions by the first of consecutive ones; slots not filled yet lie after every query.
        hidden_BxTxE, layers, _ = self._run(tokens_BxT, filled, 0, layers=layers)
        return jnp.where(wanted <= room, hidden_BxTxE, jnp.nan), (layers, wanted)

    def queries(self, tokens_BxT, cache: Cache) -> tuple[list[jax.Array], Cache]:
        """As `extend`, but returns each layer's queries [B, T, H, D], not rotated; its keys are in the longer cache."""
        layers, filled = cache
        _, layers, inputs = self._run(tokens_BxT, filled, 0, layers=layers)
        queries = [block.project(x_BxTxE)[0] for block, x_BxTxE in zip(self.blocks, inputs, strict=True)]
        return queries, (layers, filled + tokens_BxT.shape[1])

    def terms(self, layer: int = 0) -> positions.Terms:
        """What the position method does to a layer's attention, or to the embedding, with this model's parameters."""
        position = self.blocks[layer].position if self.method.per_layer else self.position
        return self.method.terms({name: param[...] for name, param in position.items()})

    def logits(self, hidden_BxTxE) -> jax.Array:
        """Scores of every word, float32, from hidden states [..., E]; log-probabilities with an adaptive vocabulary."""
        with jax.named_scope("head"):
            if self.adaptive:
                return self.embedding.log_probs(hidden_BxTxE)
            kernel_ExV = self.embedding.embedding[...].T if self.head is None else self.head.kernel[...]
            return jnp.dot(hidden_BxTxE, kernel_ExV.astype(self.dtype), preferred_element_type=jnp.float32)

    def losses(self, hidden_BxTxE, targets_BxT, *, dropout_key=None) -> jax.Array:
        """-log p(target) in nats, float32, from hidden states [..., E]: logits of all of them are there at once."""
        if self.adaptive:
            with jax.named_scope("head"):
                return self.embedding.losses(hidden_BxTxE, targets_BxT, dropout_key)
        logits = self.logits(hidden_BxTxE)
        with jax.named_scope("loss"):
            return cross_entropy(logits, targets_BxT)

    def _run(
        self,
        tokens_BxT,
        query_positions,
        key_positions,
        *,
        segment_ids=None,
        layers=None,
        dropout_key=None,
        mesh=None,
        nudge_BxTxE=None,
    ):
        embed = self.terms().embed
        keys = [None] * (1 + len(self.blocks))
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, len(keys))

        with jax.named_scope("embedding"):
            x_BxTxE = self.embedding(tokens_BxT).astype(self.dtype) * self.embedding_scale
            if embed is not None:
                first = np.ndim(query_positions) == 0
                positions = query_positions + np.arange(tokens_BxT.shape[1]) if first else query_positions
                x_BxTxE += embed(positions).astype(self.dtype)
            if nudge_BxTxE is not None:
                x_BxTxE += nudge_BxTxE
            x_BxTxE = _dropout(self.dropout, x_BxTxE, keys[0]).astype(self.dtype)
            x_BxTxE = constrain(x_BxTxE, mesh, "batch", "length", None)

        def run_block(block, x_BxTxE, shared_position, segment_ids, cache, key):
            return block(
                x_BxTxE,
                shared_position,
                query_positions=query_positions,  # closed over, so that constants stay constants under remat
                key_positions=key_positions,
                segment_ids=segment_ids,
                cache=cache,
                dropout_key=key,
                mesh=mesh,
            )

        if self.remat != "none":
            run_block = jax.checkpoint(run_block, policy=REMATS[self.remat])
        new_layers, inputs = [], []
        for i, block in enumerate(self.blocks):
            with jax.named_scope(f"block_{i}"):
                inputs.append(x_BxTxE)
                cache = None if layers is None else layers[i]
                x_BxTxE, new = run_block(block, x_BxTxE, self.position, segment_ids, cache, keys[i + 1])
                new_layers.append(new)
        if self.final_norm is not None:
            with jax.named_scope("final_norm"):
                x_BxTxE = self.final_norm(x_BxTxE)
        return x_BxTxE, new_layers, inputs


def _as_params(arrays: dict[str, jax.Array]) -> nnx.Dict:
    return nnx.Dict({name: nnx.Param(array) for name, array in arrays.items()})


def _dropout(layer: nnx.Dropout, x: jax.Array, key: jax.Array | None) -> jax.Array:
    return layer(x, deterministic=key is None, rngs=key)


def check(config: ConfigDict) -> None:
    """Raises `UserError` for what no decoder can be made of, but for what the position method refuses."""
    numeric_keys.check(config, "model")
    for name, allowed in (
        ("norm", NORMS),
        ("activation", ACTIVATIONS),
        ("initializer", INITIALIZERS),
        ("vocabulary", VOCABULARIES),
        ("dtype", DTYPES),
        ("remat", REMATS),
        ("attention_backend", ("auto", *BACKENDS)),
    ):
        if config.model[name] not in allowed:
            raise unknown(f"model.{name}", config.model[name], allowed)
    if config.model.vocabulary == "adaptive" and not config.model.tied_head:
        raise UserError("model.vocabulary 'adaptive' ties its softmax to its input: set model.tied_head to True")
    if config.model.num_heads % config.model.num_kv_heads:
        raise UserError(
            f"model.num_kv_heads {config.model.num_kv_heads} must divide model.num_heads {config.model.num_heads}"
        )
