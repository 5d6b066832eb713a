"""Position methods in Flax Linen models that use `flax.linen.MultiHeadDotProductAttention`."""

from collections.abc import Callable

import jax
from flax import linen as nn

from wavelet_jax.errors import UserError
from wavelet_jax.interop.attention_fn import attend
from wavelet_jax.positions.terms import PositionMethod


class PositionAttention(nn.Module):
    """An `attention_fn` for `flax.linen.MultiHeadDotProductAttention`: attention with a position method.

        method = positions.make("wavelet", num_heads=8, head_dim=64)
        nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=PositionAttention(method, causal=True))

    It is a Linen module, and what the method learns is its parameter "position". Made inside another module's method it
    belongs to that module (`PositionAttention_0`), as Linen has it; with `parent=None`, or made outside of any module,
    to the attention module (`attention_fn`). One instance given to several layers is one set of parameters for them all
    (as in T5).

    - Causality: `causal=True` here.
    - Padding: a mask [batch.., 1, 1, S] in the module's call, True for keys that are no padding. Nothing quadratic is
      made of it.
    - Any other mask: with `backend="reference"`, in memory quadratic in length, or not at all.
    - Attention dropout: with `broadcast_dropout=False` in the module; in memory quadratic in length, as
      `wavelet_jax.attention.attention` has it.
    - Decoding with the module's cache: `causal=True`. The query's position is the cache index, read off the mask that
      the module makes.

    A query that sees no key gets zeros (Flax's own: the mean of all values). Scores and softmax are float32 whatever
    `precision` the module has.

    Attributes:
      method: from `positions.make(..)`, with the module's num_heads and head_dim.
      causal: a query sees keys at its own position and before.
      window: a query sees keys at distance less than this only; None: at any.
      backend: "auto", or one of `wavelet_jax.attention.BACKENDS`.
    """

    method: PositionMethod
    causal: bool = False
    window: int | None = None
    backend: str = "auto"

    # The module passes only what the signature names: an argument that is missing here is dropped without a word.
    @nn.compact
    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        mask: jax.Array | None = None,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        precision: jax.lax.PrecisionLike = None,
        module: nn.Module | None = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Callable | None = None,
        attn_weights_value_einsum: Callable | None = None,
    ) -> jax.Array:
        """[batch.., T, H, D] from [batch.., T, H, D] and twice [batch.., S, K, D], as the module calls it."""
        if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
            raise UserError("attention with positions does its own products: leave the module's einsum classes out")
        learns = jax.eval_shape(self.method.init, jax.random.key(0))
        return attend(
            self.method,
            self.param("position", self.method.init) if learns else {},
            query,
            key,
            value,
            causal=self.causal,
            window=self.window,
            backend=self.backend,
            mask=mask,
            input_positions=None,
            dropout_rate=0.0 if deterministic else dropout_rate,
            dropout_key=dropout_rng,
            broadcast_dropout=broadcast_dropout,
            dtype=dtype,
            sow_weights=module is not None,
        )
