"""Position methods in Flax NNX models that use `flax.nnx.MultiHeadAttention`."""

import jax
from flax import nnx

from wavelet_jax.errors import UserError
from wavelet_jax.interop.attention_fn import attend, terms_of
from wavelet_jax.positions.terms import PositionMethod


class PositionAttention(nnx.Module):
    """An `attention_fn` for `flax.nnx.MultiHeadAttention`: attention with a position method.

        method = positions.make("wavelet", num_heads=8, head_dim=64)
        nnx.MultiHeadAttention(8, 512, attention_fn=PositionAttention(method), decode=False, rngs=rngs)

    It is a part of the module that it is given to, and what the method learns is in `attention_fn.position` there.
    One instance given to several layers is one set of parameters for them all (as in T5), under `nnx.jit` and
    `nnx.split` as any shared NNX module is; `jax.jit` takes a module for a tree, where nothing is shared, and fails.

    - Causality: `causal=True` here, or `is_causal=True` in the module's call.
    - Padding: a mask [batch.., 1, 1, S] in the module's call, True for keys that are no padding. Nothing quadratic is
      made of it.
    - Any other mask: with `backend="reference"`, in memory quadratic in length, or not at all.
    - Attention dropout: with `broadcast_dropout=False` in the module; in memory quadratic in length, as
      `wavelet_jax.attention.attention` has it.
    - Decoding with the module's cache: `causal=True`. The query's position is the cache index, read off the mask that
      the module makes; or give the module `input_positions` (Flax 0.12.12 or newer). Traced ones for each row,
      [B, 1] with B > 1, go by the reference, which costs more: where all rows are at one position, give [1, 1], or
      leave it to the mask.

    A query that sees no key gets zeros (Flax's own: the mean of all values). Scores and softmax are float32 whatever
    `precision` the module has.

    Args:
      method: from `positions.make(..)`, with the module's num_heads (of queries) and head_dim.
      causal: a query sees keys at its own position and before.
      window: a query sees keys at distance less than this only; None: at any.
      backend: "auto", or one of `wavelet_jax.attention.BACKENDS`.
      rngs: needs a "params" stream (or a default) for methods that learn something; others take none.

    Raises:
      UserError: a method that adds to the token embedding; no rngs for one that learns.
    """

    def __init__(
        self,
        method: PositionMethod,
        *,
        causal: bool = False,
        window: int | None = None,
        backend: str = "auto",
        rngs: nnx.Rngs | None = None,
    ):
        if rngs is None and jax.eval_shape(method.init, jax.random.key(0)):
            raise UserError(f"{type(method).__name__} has parameters to draw: give PositionAttention rngs=nnx.Rngs(..)")
        self.method = method
        self.causal = causal
        self.window = window
        self.backend = backend
        params = method.init(jax.random.key(0) if rngs is None else rngs.params())
        terms_of(method, params)  # refuses now what it would refuse in every call
        self.position = nnx.Dict({name: nnx.Param(param) for name, param in params.items()})

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
        module: nnx.Module | None = None,
        is_causal: bool = False,
        input_positions: jax.Array | None = None,
    ) -> jax.Array:
        """[batch.., T, H, D] from [batch.., T, H, D] and twice [batch.., S, K, D], as the module calls it."""
        return attend(
            self.method,
            {name: param[...] for name, param in self.position.items()},
            query,
            key,
            value,
            causal=self.causal or is_causal,
            window=self.window,
            backend=self.backend,
            mask=mask,
            input_positions=input_positions,
            dropout_rate=0.0 if deterministic else dropout_rate,
            dropout_key=dropout_rng,
            broadcast_dropout=broadcast_dropout,
            dtype=dtype,
            sow_weights=module is not None,
        )
