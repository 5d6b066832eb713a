"""The reach of a model: the attention of each head by distance, its window by positions alone, and gradients.

The cumulative normalized gradient is that of Chi, Fan, Rudnicky and Ramadge, "Dissecting Transformer Length
Extrapolation via the Lens of Receptive Field Analysis" (ACL 2023, arXiv 2212.10356): how much of the prediction of a
text's last target comes from the tokens within a distance, through all layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wavelet_jax.analysis import windows
from wavelet_jax.analysis.attention_maps import Maps
from wavelet_jax.positions import PositionMethod
from wavelet_jax.positions.alibi import ALiBi, slopes
from wavelet_jax.positions.wavelet import Wavelet
from wavelet_jax.training.steps import token_losses

# kind: measured, alibi_window (of a head's slope) or wavelet_scale (of all heads). A distance that is past
# `windows.LONGEST` is left empty, and so is what a kind does not have.
DISTANCES = tuple(f"distance_{share:.0%}".removesuffix("%") for share in windows.SHARES)
COLUMNS = ("method", "kind", "layer", "head", "scale", "slope", *DISTANCES, "support")


def rows(label: str, method: PositionMethod, maps: Maps) -> list[dict[str, Any]]:
    """The lines of receptive_field.csv of one model: what was measured, then its windows by positions alone.

    ALiBi's windows are those of the keys that the last query sees.
    """
    found = []

    def add(kind: str, distances, **values) -> None:
        by_share = dict(zip(DISTANCES, distances, strict=True))
        found.append(dict.fromkeys(COLUMNS, "") | {"method": label, "kind": kind} | by_share | values)

    measured = np.stack([maps.distances(share) for share in windows.SHARES], axis=-1)
    for i, layer in enumerate(maps.layers):
        for j, head in enumerate(maps.heads):
            add("measured", measured[i, j].tolist(), layer=layer, head=head)
    if isinstance(method, ALiBi):
        for head, slope in enumerate(slopes(method.num_heads).tolist()):
            if head in maps.heads:
                reached = [windows.alibi_window(slope, share, maps.length) for share in windows.SHARES]
                add("alibi_window", reached, head=head, slope=slope)
    if isinstance(method, Wavelet):
        for window in windows.wavelet_windows(method):
            reached = ["" if distance is None else distance for distance in window.distances]
            add("wavelet_scale", reached, scale=window.scale, support="" if window.support is None else window.support)
    return found


def make_gradient(graphdef: nnx.GraphDef, d_model: int) -> Callable[[dict, jax.Array], jax.Array]:
    """(params, tokens [B, L+1]) -> the normalized gradient s by distance from the last input, [B, L] float32.

    s at distance t is |g_(L-1-t)| / (|g_0| + .. + |g_(L-1)|), where g_m is the gradient of the loss of the last target
    with respect to the embedding of input m (the same with respect to all that is added to it), of d_model numbers.
    """

    def gradient(params: dict, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        inputs, last_target = tokens[:, :-1], tokens[:, -1:]
        positions = np.arange(inputs.shape[1])

        def loss(nudge_BxTxE: jax.Array) -> jax.Array:
            x_BxTxE = (model.embed(inputs, positions) + nudge_BxTxE).astype(model.dtype)
            x_BxTxE, _ = model.apply_blocks(x_BxTxE, positions, positions)
            hidden = model.finish(x_BxTxE)
            return jnp.sum(token_losses(model, hidden[:, -1:], last_target, 0))

        norms_BxT = jnp.linalg.norm(jax.grad(loss)(jnp.zeros((*inputs.shape, d_model))), axis=-1)
        return jnp.flip(norms_BxT, axis=1) / jnp.sum(norms_BxT, axis=1, keepdims=True)

    return gradient


def texts(num_tokens: int, length: int, count: int) -> list[int]:
    """Starts of `count` texts of `length` tokens and a target: evenly over a stream, fewer if they would coincide."""
    last = num_tokens - 1 - length
    return sorted(set(np.linspace(0, last, min(count, last + 1)).astype(int).tolist()))


def cumulative_gradient(
    gradient: Callable[[np.ndarray], jax.Array],
    tokens: np.ndarray,
    length: int,
    starts: list[int],
    done: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """c[t], [L] float64: the share of the gradient at distances 0 .. t from the last input, mean over texts.

    Args:
      gradient: tokens [1, L+1] -> [1, L], of `make_gradient`.
      tokens: the stream.
      starts: of the texts.
    """
    total = np.zeros(length)
    for start in starts:
        text = np.asarray(tokens[start : start + length + 1], np.int32)[None]
        total += np.asarray(gradient(text), np.float64)[0]
        done()
    return np.cumsum(total / len(starts))
