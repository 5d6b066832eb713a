"""The decoder, for both shapes of the paper: Llama (section 7) and Baevski-Auli (section 6) differ by their config.

Dimensions in names: B batch, T tokens, S cached tokens, E d_model, F d_ff, H query heads, K key heads, D head_dim,
V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh
from ml_collections import ConfigDict
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from wavelet_jax import positions
from wavelet_jax.attention import BACKENDS
from wavelet_jax.config import numeric_keys
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.model import layers
from wavelet_jax.model.block import ACTIVATIONS, INITIALIZERS, NORMS, Block, Positions, as_params
from wavelet_jax.model.cache import KVCache
from wavelet_jax.model.products import dropout, normed, precision_of, product
from wavelet_jax.model.vocabulary import AdaptiveVocabulary
from wavelet_jax.parallel.sharding import constrain
from wavelet_jax.positions.absolute import check_positions

VOCABULARIES = ("full", "adaptive")
DTYPES = ("float32", "bfloat16")
PRECISIONS = ("highest", "high", "default")


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


class Decoder(nnx.Module):
    """A causal language model whose positions are any of `positions.METHODS`.

    Parameters are float32; activations are in `config.model.dtype`; scores, softmax and logits are accumulated in
    float32.

    Args:
      config: reads `config.model` and `config.position`; every key is explained in `wavelet_jax/config/default.py`.
      vocab_size: V.
      rngs: needs a "params" stream. Dropout keys are arguments of the call.

    Raises:
      UserError: a name that does not exist, head counts that do not divide, or what the position method refuses.
    """

    def __init__(self, config: ConfigDict, vocab_size: int, *, rngs: nnx.Rngs):
        check(config)
        width = config.model.d_model
        self.dtype, self.precision = jnp.dtype(config.model.dtype), precision_of(config)
        self.remat, self.scanned = config.model.remat, layers.are_scanned(config)
        self.embedding_scale = np.sqrt(width) if config.model.scale_embedding else 1.0
        self.kv_shape = (config.model.num_kv_heads, config.model.head_dim)
        self.method = make_position(config)
        # Rows are taken in float32 and then cast: the gradient of a row is a sum over all of its tokens, and a
        # thousand ones in bfloat16 add up to 256.
        self.embedding = (
            AdaptiveVocabulary(config, vocab_size, kernel_init=INITIALIZERS[config.model.initializer], rngs=rngs)
            if config.model.vocabulary == "adaptive"
            else nnx.Embed(
                vocab_size, width, dtype=jnp.float32, embedding_init=nnx.initializers.normal(width**-0.5), rngs=rngs
            )
        )
        # Methods without parameters of their own for each layer have one set here, maybe empty.
        self.position = as_params({} if self.method.per_layer else self.method.init(rngs.params()))
        self.dropout = nnx.Dropout(config.model.dropout)
        self.num_layers = config.model.num_layers
        make_block = functools.partial(Block, config, self.method)
        if self.scanned:
            self.layers = layers.stacked(make_block, self.num_layers, rngs)
        else:
            self.blocks = nnx.List([make_block(rngs=rngs) for _ in range(self.num_layers)])
        self.final_norm = (
            NORMS[config.model.norm](width, dtype=jnp.float32, rngs=rngs) if config.model.final_norm else None
        )
        self.head = (
            None
            if config.model.tied_head
            else nnx.Linear(width, vocab_size, use_bias=False, kernel_init=nnx.initializers.lecun_normal(), rngs=rngs)
        )

    def __call__(
        self,
        tokens_BxT: jax.Array,
        *,
        positions: jax.typing.ArrayLike | None = None,
        segment_ids: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, T, V] in float32; see `hidden`. For long sequences, use `hidden` and take logits in chunks."""
        return self.logits(
            self.hidden(tokens_BxT, positions=positions, segment_ids=segment_ids, dropout_key=dropout_key)
        )

    def hidden(
        self,
        tokens_BxT: jax.Array,
        *,
        positions: jax.typing.ArrayLike | None = None,
        segment_ids: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        mesh: Mesh | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, E]: `embed`, `apply_blocks` and `finish`.

        Args:
          tokens_BxT: token ids, int32.
          positions: [T] or [B, T] int32, tokens; None: 0, 1, 2, ..
          segment_ids: [B, T] int32 for packed documents: attention stays inside a segment.
          dropout_key: a key for the dropout rates of the config; None turns dropout off.
          mesh: the devices over which activations are divided, with tokens and positions in the order of
            `sharding.token_order`; None: the compiler decides.
        """
        # NumPy positions are constants under jit, which lets methods check them and attention plan its tiles.
        positions = np.arange(tokens_BxT.shape[1]) if positions is None else positions
        layer_keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, 1 + self.num_layers)
            dropout_key, layer_keys = keys[0], keys[1:]
        x_BxTxE = self.embed(tokens_BxT, positions, dropout_key=dropout_key, mesh=mesh)
        x_BxTxE, _ = self.apply_blocks(
            x_BxTxE, positions, positions, segment_ids=segment_ids, dropout_keys=layer_keys, mesh=mesh
        )
        return self.finish(x_BxTxE)

    def embed(
        self,
        tokens_BxT: jax.Array,
        positions: Positions,
        *,
        dropout_key: jax.Array | None = None,
        mesh: Mesh | None = None,
    ) -> jax.Array:
        """The input [B, T, E] of the first block, with the positions of methods that add them to the embedding."""
        with jax.named_scope("embedding"):
            x_BxTxE = self.embedding(tokens_BxT).astype(self.dtype) * self.embedding_scale
            if embed := self.terms().embed:
                first = np.ndim(positions) == 0
                positions = positions + np.arange(tokens_BxT.shape[1]) if first else positions
                x_BxTxE += embed(positions).astype(self.dtype)
            x_BxTxE = dropout(self.dropout, x_BxTxE, dropout_key).astype(self.dtype)
            return constrain(x_BxTxE, mesh, "batch", "length", None)

    def apply_blocks(
        self,
        x_BxTxE: jax.Array,
        query_positions: Positions,
        key_positions: Positions,
        *,
        cache: KVCache | None = None,
        segment_ids: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """The output [B, T, E] of the last block, and the cache with the keys and values of these tokens.

        While a program is traced, the layers share one trace; see `layers.apply`.

        Args:
          cache: slots of all layers; `query_positions` is then the first of consecutive ones, and `key_positions` that
            of the first slot. Its `filled` is not changed.
          dropout_keys: one for each layer, [layers]; None turns dropout off.
        """

        def run(block: Block, x_BxTxE, slots, dropout_key, shared_position, turns, segment_ids):
            return block(
                x_BxTxE,
                shared_position,
                query_positions=query_positions,  # closed over, so that constants stay constants
                key_positions=key_positions,
                turns=turns,
                segment_ids=segment_ids,
                slots=slots,
                dropout_key=dropout_key,
                mesh=mesh,
            )

        return layers.apply(
            run,
            self.layers if self.scanned else list(self.blocks),
            x_BxTxE,
            cache,
            dropout_keys,
            (self.position, self._turns(query_positions, key_positions, x_BxTxE.shape[1], cache), segment_ids),
            first_slot=query_positions,
            remat=self.remat,
        )

    def _turns(
        self, query_positions: Positions, key_positions: Positions, queries: int, cache: KVCache | None
    ) -> tuple[Any, Any] | None:
        """`Terms.turns_of` the positions of queries and of keys, for all layers; None: they share none."""
        if self.method.per_layer or (terms := self.terms()).rotate is None:
            return None

        def turns(positions: Positions, count: int) -> Any:
            return terms.turns_of(
                positions + np.arange(count, dtype=np.int32) if np.ndim(positions) == 0 else positions
            )

        of_queries = turns(query_positions, queries)
        if cache is not None:
            return of_queries, turns(key_positions, cache.room)
        return of_queries, of_queries if key_positions is query_positions else turns(key_positions, queries)

    def block(self, layer: int) -> Block:
        """One layer, counted from 0; also where the parameters of all are stacked."""
        return layers.of_stack(self.layers, layer) if self.scanned else self.blocks[layer]

    def finish(self, x_BxTxE: jax.Array) -> jax.Array:
        """Hidden states [B, T, E] from the last block's output: normed, if the config says so."""
        if self.final_norm is None:
            return x_BxTxE
        with jax.named_scope("final_norm"):
            return normed(self.final_norm, x_BxTxE)

    def init_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache for `extend` with room for `length` tokens."""
        check_positions(length, self.terms().max_positions)
        shape = batch_size, length, *self.kv_shape
        if self.scanned:
            empty = jnp.zeros((self.num_layers, *shape), self.dtype)
        else:
            empty = (jnp.zeros(shape, self.dtype),) * self.num_layers
        return KVCache(keys=empty, values=empty, filled=jnp.int32(0))

    def extend(self, tokens_BxT: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Reads T more tokens after those in the cache. Returns their hidden states [B, T, E] and the longer cache.

        Raises:
          UserError: the cache has no room for them. Where `cache.filled` is traced, the hidden states are NaN instead.
        """
        wanted = cache.filled + tokens_BxT.shape[1]
        if not isinstance(wanted, Tracer) and wanted > cache.room:
            raise UserError(
                f"the cache has room for {cache.room} tokens, not for {wanted}: give init_cache a longer length"
            )
        x_BxTxE = self.embed(tokens_BxT, cache.filled)
        # Both positions by the first of consecutive ones; slots that are not filled yet come after every query.
        x_BxTxE, longer = self.apply_blocks(x_BxTxE, cache.filled, 0, cache=cache)
        assert longer is not None
        hidden_BxTxE = jnp.where(wanted <= cache.room, self.finish(x_BxTxE), jnp.nan)
        return hidden_BxTxE, longer.at(wanted)

    def terms(self, layer: int = 0) -> positions.Terms:
        """The position method's terms for a layer's attention, or to the embedding, with this model's parameters."""
        position = self.position
        if self.method.per_layer and self.scanned:  # and not the whole block, of which a copy would be made
            position = layers.of_stack(self.layers.position, layer)
        elif self.method.per_layer:
            position = self.blocks[layer].position
        return self.method.terms({name: param[...] for name, param in position.items()})

    def logits(self, hidden_BxTxE: jax.Array) -> jax.Array:
        """Scores of every word, float32, from hidden states [..., E]; log-probabilities with an adaptive vocabulary."""
        with jax.named_scope("head"):
            if isinstance(self.embedding, AdaptiveVocabulary):
                return self.embedding.log_probs(hidden_BxTxE)
            kernel_ExV = self.embedding.embedding[...].T if self.head is None else self.head.kernel[...]
            return product(hidden_BxTxE, kernel_ExV, self.precision, jnp.float32)

    def losses(
        self, hidden_BxTxE: jax.Array, targets_BxT: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """-log p(target) in nats, float32, from hidden states [..., E]; holds the logits of all of them at once."""
        if isinstance(self.embedding, AdaptiveVocabulary):
            with jax.named_scope("head"):
                return self.embedding.losses(hidden_BxTxE, targets_BxT, dropout_key)
        logits = self.logits(hidden_BxTxE)
        with jax.named_scope("loss"):
            return cross_entropy(logits, targets_BxT)


def check(config: ConfigDict) -> None:
    """Raises `UserError` for what no decoder can be made of, but for what the position method refuses."""
    numeric_keys.check(config, "model")
    for name, allowed in (
        ("norm", NORMS),
        ("activation", ACTIVATIONS),
        ("initializer", INITIALIZERS),
        ("vocabulary", VOCABULARIES),
        ("dtype", DTYPES),
        ("precision", PRECISIONS),
        ("remat", layers.REMATS),
        ("scan_layers", layers.SCANS),
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
