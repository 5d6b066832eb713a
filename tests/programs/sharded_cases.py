"""Attention over eight virtual devices against one device's; `test_sharded.py` runs this in a process of its own.

    python tests/programs/sharded_cases.py CASE ...

prints one JSON object a case: largest errors of the output and of every gradient, and what would be wrong by local
offsets.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from support.arrays import normal
from support.compilation import quick_jit

from wavelet_jax.attention import attention, sharded, tiled
from wavelet_jax.attention.tiled.geometry import TileSizes
from wavelet_jax.positions import METHODS, make

B, H, K, D, T = 2, 4, 2, 16, 48  # grouped queries, and two heads on a device of `tensor` 2
MESH = {"data": 2, "context": 2, "tensor": 2}
AXES = {"batch_axes": ("data",), "head_axis": "tensor", "length_axis": "context"}
MIDDLE = T // 2

_rng = np.random.default_rng(0)
_HEAD_GRID = {"scales": np.exp2(_rng.uniform(0, 4, (H, D))), "shifts": _rng.uniform(0, 6, (H, D))}

# Case -> (method, its options, attention's options).
CASES = {name: (name, {}, {}) for name in METHODS} | {
    "wavelet-trainable": ("wavelet", {"trainable": True}, {}),
    "wavelet-heads": ("wavelet", _HEAD_GRID, {}),
    "wavelet-window-segments": ("wavelet", {}, {"window": 30, "segments": True}),
    "wavelet-both-directions": ("wavelet", {"t_sign": "n-m"}, {"causal": False}),
    "shaw-values-segments": ("shaw", {"clip_distance": 40, "values": True}, {"segments": True}),
    "t5-window": ("t5", {"num_buckets": 8, "max_distance": 30}, {"window": 29}),
    "alibi-documents": ("alibi", {}, {"segments": True, "documents": True}),
    "rope-length-alone": ("rope", {}, {"mesh": {"context": 8}}),
    "wavelet-reference": ("wavelet", {}, {"backend": "reference"}),
}


def compare(method: str, options: dict, how: dict) -> dict:
    how = {"backend": "tiled", "causal": True, **how}
    method = make(method, num_heads=H, head_dim=D, **options)
    params = {
        name: param + normal(i, *param.shape) / 2
        for i, (name, param) in enumerate(method.init(jax.random.key(0)).items())
    }
    sizes = {"data": 1, "context": 1, "tensor": 1} | how.pop("mesh", MESH)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    order = sharded.zigzag(T, sizes["context"])
    restored = np.argsort(order)
    segments = np.repeat([[1, 2], [3, 3]], MIDDLE, axis=1) if how.pop("segments", False) else None
    positions = np.arange(T)
    if how.pop("documents", False):  # each document from 0: no consecutive runs, and traced
        how["backend"] = "auto"
        positions = jnp.asarray(np.tile(np.arange(MIDDLE), 2))

    def on_one(params, query, key, value, shift=0):
        return attention(
            query,
            key,
            value,
            method.terms(params).without_embedding(),
            query_positions=positions + shift,
            key_positions=positions,
            segment_ids=segments,
            **how | {"backend": "reference"},
        )

    def on_mesh(params, query, key, value):
        arrays = (x[:, order] for x in (query, key, value))
        out = sharded.attention(
            *arrays,
            lambda params: method.terms(params).without_embedding(),
            params,
            positions[order],
            mesh=mesh,
            **AXES,
            segment_ids=None if segments is None else segments[:, order],
            **how,
        )
        return out[:, restored]

    inputs = params, *(normal(10 + i, B, T, heads, D) for i, heads in enumerate((H, K, K)))
    d_out = normal(20, B, T, H, D)

    def with_gradients(function):
        def run(d_out, *inputs):
            out, pull = jax.vjp(function, *inputs)
            return out, *pull(d_out)

        return jax.tree.map(np.asarray, quick_jit(run)(d_out, *inputs))

    (out, *gradients), (wanted, *wanted_gradients) = with_gradients(on_mesh), with_gradients(on_one)

    def relative(got, wanted):
        size = np.linalg.norm(wanted)  # 0 for parameters that attention does not read
        return float(np.linalg.norm(got - wanted) / (size if size else 1))

    errors = jax.tree.leaves(jax.tree.map(relative, gradients, wanted_gradients))
    assert len(errors) == 3 + len(params)

    def late_queries(first: int) -> jax.Array:
        terms = method.terms(params).without_embedding()
        options = {"causal": False, "key_positions": 0, "backend": "reference"}
        return attention(inputs[1][:, MIDDLE:], inputs[2], inputs[3], terms, query_positions=first, **options)

    return {
        "out": float(np.abs(out - wanted).max()),
        "gradients": max(errors),
        # What a device would make of the later half of the queries if it counted its own tokens from 0.
        "by_local_offsets": float(np.abs(late_queries(MIDDLE) - late_queries(0)).max()),
    }


if __name__ == "__main__":
    # So that a few tokens have tiles of all kinds.
    tiled.TILES = dict.fromkeys(tiled.TILES, TileSizes(rows=4, block=2, band=2, keys=3))
    for case in sys.argv[1:]:
        print(json.dumps({"case": case, **compare(*CASES[case])}), flush=True)
