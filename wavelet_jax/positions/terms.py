"""The seam between position methods and attention: what a method may change."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Terms:
    """Everything a position method may do to attention; a field left None does nothing (all None is NoPE).

    Attention computes, for query m and key n at distance t = m - n (positions in tokens, integers),

        score[m, n] = ((q_m + content_bias) . k_n + (q_m + position_bias) . relative_keys(t)) / sqrt(D) + bias(t)
        output[m]   = sum over n of softmax(score)[m, n] (v_n + relative_values(t))

    with q and k rotated first, and position arithmetic in float32 whatever the model computes in. Functions take
    positions or distances, never a length, so caches, packed documents and unseen lengths use the same code.

    Attributes:
      embed: positions [...] -> [..., d_model], added to the token embedding (sinusoidal, learned).
      rotate: (x [B, T, H, D], `turns_of` its positions) -> x, applied to queries and keys (RoPE).
      turns: positions [T] or [B, T], NumPy's if they are known while tracing, -> a tree of arrays, such as cosines and
        sines, that `rotate` takes and all layers of a model may share. None: `rotate` takes the positions themselves.
      relative_keys: distances [...] -> [..., D] or [H, ..., D] (wavelet, Shaw, Transformer-XL).
      relative_values: distances [...] -> [..., D] or [H, ..., D] (Shaw's value side).
      content_bias, position_bias: [H, D] each: u and v of Transformer-XL.
      bias: distances [...] -> [H, ...] (ALiBi, T5).
      support: distance in tokens past which `relative_keys` is below the method's stated tolerance; None: not bounded.
      max_positions: positions from here on are refused (learned positions past their table); None: any position.
      num_heads, head_dim: H and D, the query heads and the head size that the method was made for; attention refuses
        queries of others. None (terms of your own, say): checked only against the shapes of the other fields.
    """

    embed: Callable[[jax.Array], jax.Array] | None = None
    rotate: Callable[[jax.Array, Any], jax.Array] | None = None
    turns: Callable[[jax.Array | np.ndarray], Any] | None = None
    relative_keys: Callable[[jax.Array], jax.Array] | None = None
    relative_values: Callable[[jax.Array], jax.Array] | None = None
    content_bias: jax.Array | None = None
    position_bias: jax.Array | None = None
    bias: Callable[[jax.Array], jax.Array] | None = None
    support: int | None = None
    max_positions: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None

    def without_embedding(self) -> "Terms":
        """The terms for attention, once `embed(positions)` has been added to the token embedding."""
        return dataclasses.replace(self, embed=None)

    def without_rotation(self) -> "Terms":
        """The terms for attention of queries and keys that are rotated already."""
        return dataclasses.replace(self, rotate=None, turns=None)

    def turns_of(self, positions: jax.Array | np.ndarray) -> Any:
        """The second argument of `rotate` for these positions, [T] or [B, T]."""
        return positions if self.turns is None else self.turns(positions)

    def rotated(self, x_BxTxHxD: jax.Array, turns: Any) -> jax.Array:
        """Queries or keys, rotated by `turns_of` their positions where the method rotates."""
        if self.rotate is None:
            return x_BxTxHxD
        with jax.named_scope("rotate"):
            return self.rotate(x_BxTxHxD, turns)


class PositionMethod(Protocol):
    """An entry of `METHODS`: a frozen dataclass of hyper-parameters with two pure functions."""

    num_heads: int  # query heads
    head_dim: int
    per_layer: bool  # True: each layer has parameters of its own; False: one set serves them all

    def init(self, key: jax.Array) -> Params:
        """Learned parameters in float32; an empty dict for most methods."""
        ...

    def terms(self, params: Params) -> Terms:
        """The terms for attention. Called inside the traced function: `Terms` is not a pytree."""
        ...
