"""Flash kernels: the arrays they read, and the kernels themselves, against the definition and float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

from wavelet_jax import positions
from wavelet_jax.attention import prepared
from wavelet_jax.attention.call import Call
from wavelet_jax.attention.tiles import Tiles

slow = pytest.mark.slow
SMALL = Tiles(rows=32, band=16, keys=16)  # so that short sequences have tiles of all kinds


# -- the arrays that kernels read ---------------------------------------------------------------------------------

ARRAYS = {
    "causal": {"T": 70, "S": 70},
    "bidirectional": {"T": 70, "S": 85, "offset": -13, "causal": False},
    "chunk of a cache": {"T": 45, "S": 101, "offset": 37},
    "before all keys": {"T": 40, "S": 40, "offset": -50},
    "after all keys": {"T": 40, "S": 40, "offset": 2**31 - 60},
    "does not separate": {"T": 90, "S": 70, "offset": 20, "causal": False, "mother": "haar_standard"},
    "heads": {
        "T": 70,
        "S": 70,
        "scales": tuple(2.0 ** np.linspace(0, 5, 64).reshape(4, 16)),
        "shifts": np.ones((4, 16)),
    },
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_hold_every_position_score_once(case):
    """Put together as `prepared` writes it, they are q . p[m - n] / sqrt(D), with p in float64 (Eq. 10)."""
    options = {"offset": 0, "causal": True} | ARRAYS[case]
    T, S, offset, causal = (options.pop(name) for name in ("T", "S", "offset", "causal"))
    terms = positions.make("wavelet", num_heads=4, head_dim=16, **options).terms({})
    call = Call(terms, T, S, 4, 2, 16, jnp.float32, offset, causal=causal)
    assert prepared.obstacles(call, SMALL) == []
    made = prepared.prepare(call, SMALL)
    layout, U, V = made.layout, SMALL.rows, SMALL.keys
    query, key = (jax.random.normal(jax.random.key(0), (1, length, heads, 16)) for length, heads in ((T, 4), (S, 2)))
    arrays = jax.tree.map(np.asarray, quick_jit(functools.partial(prepared.arrays_of, made))(query, None, key, key))
    np.testing.assert_array_equal(arrays.key_BxKxSxD[:, :, layout.first_key : layout.end_key], key.swapaxes(1, 2))

    scores = np.zeros((4, layout.row_tiles * U, layout.key_tiles * V))
    reached = np.zeros(scores.shape[1:], bool)
    for i in range(layout.row_tiles):
        rows = slice(i * U, (i + 1) * U)
        for j in range(layout.end(i)):
            keys = slice(j * V, (j + 1) * V)
            reached[rows, keys] = True
            assert not (layout.is_near(i, j) and layout.is_far(i, j))
            if layout.is_near(i, j):
                start = (j - layout.band_start(i)) * V
                scores[:, rows, keys] = arrays.near_BxHxTxW[0, :, rows, start : start + V]
            elif layout.is_far(i, j):
                far = np.float64(arrays.far_BxHxTxR[0, :, rows])
                scores[:, rows, keys] = far @ made.basis[layout.basis_tile(i, j)].T * layout.scale
    scores, reached = (x[..., :T, layout.first_key : layout.end_key] for x in (scores, reached))

    distance = offset + np.arange(T)[:, None] - np.arange(S)
    visible = (distance >= 0) | (not causal)
    table = np.float64(terms.relative_keys(jnp.asarray(distance, jnp.int32)))
    heads = "h" if table.ndim == 4 else ""
    exact = np.einsum(f"thd,{heads}tsd->hts", np.float64(query[0]), table) / 4
    assert reached[visible].all()
    assert (scores[:, reached & ~visible] < -1e29).all()
    # |q|_1 / sqrt(D) times the tolerance of an entry, and float32's roundings of the entries and of their product.
    np.testing.assert_allclose(scores[:, visible], exact[:, visible], rtol=0, atol=8e-6)
    if case in ("causal", "bidirectional", "chunk of a cache"):
        assert np.abs(exact[:, visible]).max() > 0.5


def test_arrays_know_what_they_cannot_carry():
    def needs(name: str, options=None, **changes) -> str:
        method = positions.make(name, num_heads=4, head_dim=16, **(options or {}))
        found = []

        def traced(params):  # what is learned is traced
            call = Call(method.terms(params), 90, 90, 4, 2, 16, jnp.float32, 0)
            found.extend(prepared.obstacles(dataclasses.replace(call, **changes), SMALL))

        jax.eval_shape(traced, method.init(jax.random.key(0)))
        return " and ".join(found)

    assert needs("wavelet") == needs("rope") == needs("nope") == ""
    assert "consecutive positions" in needs("rope", offset=None)
    assert "no attention dropout and no segment_ids and no window" in needs(
        "rope", dropout=True, segments=True, window=3
    )
    assert "without a bias" in needs("alibi")
    assert "constant" in needs("wavelet", {"trainable": True})
    assert "constant" in needs("transformer_xl")
    assert "without relative values" in needs("shaw", {"values": True})
    wide = {"mother": "haar_standard", "first_exponent": 8}
    assert "smooth past 2048 tokens" in needs("wavelet", wide, queries=9000, keys=9000)
