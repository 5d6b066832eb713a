"""The two orders of relative scores: by distance, as a product with a table makes them, and by key, as scores are."""

import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.attention.tiled.geometry import Plan, Tile, num_distances


def skew(G: jax.Array, width: int, after: float = 0.0, available: int | None = None) -> jax.Array:
    """[.., U, n] by distance -> [.., U, V] by key: out[u, v] = G[u, U - 1 - u + v].

    Entries whose index of distance is `available` (None: n) or more are set to `after`.

    Read row by row with one column less, the same numbers are shifted by one from row to row: no gather. What is read
    past the end of a row belongs to the next one, and is hidden. With n = V + 1 nothing is copied first.
    """
    *lead, rows, count = G.shape
    available, columns = available or count, max(count, width + 1)
    G = jnp.pad(G, [(0, 0)] * (G.ndim - 1) + [(0, columns - count)])
    flat = G.reshape(*lead, rows * columns)[..., rows - 1 : columns * rows - 1]
    by_key = flat.reshape(*lead, rows, columns - 1)[..., :width]
    column = np.arange(rows - 1, -1, -1)[:, None] + np.arange(width)
    return by_key if column.max() < available else jnp.where(column < available, by_key, after)


def unskew(x: jax.Array) -> jax.Array:
    """The transpose of `skew`: [.., U, V] by key -> [.., U, U + V] by distance, zeros where no key has it."""
    *lead, rows, width = x.shape
    none = [(0, 0)] * len(lead)
    x = jnp.pad(x, [*none, (0, 0), (rows - 1, 0)]).reshape(*lead, rows * (rows + width - 1))
    return jnp.pad(x, [*none, (0, rows)]).reshape(*lead, rows, rows + width)


def by_key(G: jax.Array, tile: Tile, after: float) -> jax.Array:
    """[.., G, U or 1, n] by distance -> [.., V, G, U] by key; causal local tiles have `after` past the query."""
    G = jnp.broadcast_to(G, (*G.shape[:-2], tile.rows, G.shape[-1]))
    return jnp.moveaxis(skew(G, tile.width, after), -1, -3)


def by_distance(plan: Plan, x: jax.Array, tile: Tile) -> jax.Array:
    """[.., V, G, U] by key -> [.., G, U, n] by distance: the transpose of `by_key`."""
    return unskew(jnp.moveaxis(x, -3, -1))[..., : num_distances(plan, tile)]
