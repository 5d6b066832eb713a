"""attention(): one function in front of all backends."""

import jax

from wavelet_jax.attention.arguments import canonical
from wavelet_jax.attention.choose import BACKENDS, choose
from wavelet_jax.attention.common import Array
from wavelet_jax.positions.terms import Terms


def attention(
    query_BxTxHxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    terms: Terms,
    *,
    causal: bool = True,
    query_positions: Array | int | None = None,
    key_positions: Array | int | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    window: int | None = None,
    mask: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    backend: str = "auto",
    far_tolerance: float | None = None,
) -> jax.Array:
    """Attention with a position method's terms in the scores.

    Args:
      query_BxTxHxD: [B, T, H, D], float32, bfloat16 or float16 (NumPy's float64 too if JAX takes it as float32).
      key_BxSxKxD, value_BxSxKxD: [B, S, K, D], likewise; K divides H, and head h reads key head h // (H / K) (grouped
        queries). The three dtypes may differ (a cache in bfloat16, say): a product of two is computed in the wider one.
      terms: from `positions.make(...).terms(params)`, made for H heads of size D. Terms of methods that add to the
        token embedding (sinusoidal, learned) are passed as `terms.without_embedding()`, once the embedding has them.
      causal: a query sees keys at its own position and before.
      query_positions, key_positions: integers in tokens, [T] and [S], or [B, T] and [B, S]; or a scalar, the first of
        consecutive positions (which may be traced, as in a loop over chunks). None: 0, 1, 2, .., which requires T = S.
        Positions and their distances must fit into int32; traced ones that do not fit wrap around, unnoticed. With a
        cache, give global positions: unfilled slots whose positions come after every query's are then hidden by the
        causal mask. "tiled" and "decode" take consecutive positions only: scalars, or arrays that are not traced.
      segment_ids: integers [B, T] (requires T = S), or a pair (a tuple) of [B, T] and [B, S]: a query sees keys of its
        own segment only.
      window: a query sees keys at a distance less than this only (on both sides if not causal).
      mask: bool, broadcastable to [B, H, T, S]: False hides a key, in addition to what the arguments above hide. One of
        shape [B, 1, 1, S], the same for all heads and queries, is padding, and is handled like segments: "reference",
        "tiled" and "decode" support it. Any other mask is supported by "reference" alone, and only if that is named:
        "auto" promises linear memory, and refuses.
      dropout_rate, dropout_key: dropout on the attention probabilities; the rate is a number that is not traced.
      backend: "auto" or one of `BACKENDS`. "reference" needs memory quadratic in length; "tiled" computes the same in
        linear memory; "decode" is for few queries; "pallas_tpu" and "triton_gpu" are kernels; "cudnn" is NVIDIA's, for
        methods that add nothing to the scores. "auto" takes "decode" for a few queries over more keys, and one of the
        others for long sequences, if they support the call (`choose` has the rules). The batch may be symbolic
        (`jax.export`); lengths may be symbolic for "reference" only.
      far_tolerance: for all but "reference", the largest error of an entry of a constant `relative_keys`; None for
        `call.FAR_TOLERANCE` of the query's dtype.

    Returns:
      [B, T, H, D] in the value's dtype; zeros for a query that sees no key. Sums are float32; all but "reference" round
      the softmax weights to the value's dtype for their product with it. "reference" and "decode" have all derivatives.
      The others have first derivatives of their own, in reverse mode; "tiled" also has second ones, as forward mode
      over reverse (`jax.hessian`, or `jax.jvp` of `jax.grad`). `jax.jvp` alone and `jax.grad` of `jax.grad` are refused
      (`jax.jvp` with `jax.jit` by JAX itself: it "can't apply forward-mode autodiff").

    Raises:
      UserError: arguments of a wrong kind, dtype or shape; a method made for other heads; terms that add to the token
        embedding; positions past int32; an unknown backend; a call that a named backend does not support; or one that
        "auto" could compute only in quadratic memory, and more of it than `choose.REFERENCE_SHARE`.
    """
    query, key, value, call = canonical(
        query_BxTxHxD,
        key_BxSxKxD,
        value_BxSxKxD,
        terms,
        causal=causal,
        query_positions=query_positions,
        key_positions=key_positions,
        segment_ids=segment_ids,
        window=window,
        mask=mask,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        far_tolerance=far_tolerance,
    )
    chosen = BACKENDS[choose(backend, call, batch=query.shape[0])]
    if terms.rotate is not None:
        assert call.query_positions is not None
        assert call.key_positions is not None
        query = terms.rotated(query, terms.turns_of(call.query_positions))
        key = terms.rotated(key, terms.turns_of(call.key_positions))
    return chosen.attend(query, key, value, call)
