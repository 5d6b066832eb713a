"""Calls of attention that several test files make: their inputs, gradients and a float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np

from support.arrays import normal
from support.compilation import quick_jit
from wavelet_jax.attention import BACKENDS, attention, tiled
from wavelet_jax.attention.tiled.geometry import TileSizes
from wavelet_jax.wavelets import continuous

# Backends that support every call on every device, and so every test of attention; test_kernels.py and
# test_gpu_kernels.py have the others.
EVERYWHERE = tuple(name for name in BACKENDS if name not in ("pallas_tpu", "triton_gpu", "cudnn"))


def use_small_tiles(monkeypatch, sizes: TileSizes | None = None) -> None:
    """Makes the tiled backend's tiles so small that short sequences have tiles of all kinds."""
    sizes = TileSizes(rows=8, block=4, band=4, keys=8) if sizes is None else sizes
    monkeypatch.setattr(tiled, "TILES", dict.fromkeys(tiled.TILES, sizes))


def inputs(T: int, S: int, H: int = 4, K: int = 2, D: int = 32, B: int = 2, dtype=jnp.float32) -> tuple:
    """Queries, keys, values, and a cotangent of the output."""
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, D)
    return tuple(normal(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes))


def value_and_gradients(backend: str, method, params, query, key, value, cotangent, **options):
    """{name: array} of the output and of its gradients by parameters, queries, keys and values."""

    @quick_jit
    def run(params, query, key, value):
        def output(params, query, key, value):
            return attention(query, key, value, method.terms(params), backend=backend, **options)

        out, pull = jax.vjp(output, params, query, key, value)
        return out, pull(cotangent)

    out, (d_params, d_query, d_key, d_value) = run(params, query, key, value)
    return {"out": out, "query": d_query, "key": d_key, "value": d_value, **d_params}


def assert_same(actual: dict, expected: dict, tolerance: float) -> None:
    """Every array within `tolerance` of the size of the expected one."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        wanted, got = np.asarray(wanted, np.float64), np.asarray(actual[name], np.float64)
        # A gradient may cancel to nothing (a row that sees one key has none), but for the rounding of terms of about 1.
        error = np.max(np.abs(got - wanted)) / max(np.max(np.abs(wanted)), 0.5)
        assert error <= tolerance, f"{name} is off by {error:.1e} of its size"


def per_head_grids() -> dict:
    generator = np.random.default_rng(5)
    return {"scales": 2 ** generator.uniform(0, 6, (4, 32)), "shifts": generator.uniform(-20, 40, (4, 32))}


def ricker_table(L: int, first_exponent: int) -> np.ndarray:
    """p[t, j] of Eq. (14), t = 0 .. L - 1, in float64."""
    scales, shifts = (x.astype(np.float64) for x in continuous.scale_shift_grid(128, 8, first_exponent))
    x = (np.arange(L)[:, None] - shifts) / scales
    return (1 - x**2) * np.exp(-(x**2) / 2)


def float64_wavelet(query, key, value, cotangent, table: np.ndarray) -> dict:
    """Eq. (10) and its gradients in float64, one sequence and one head [L, D] each, head by head."""
    arrays = [np.asarray(x, np.float64)[0] for x in (query, key, value, cotangent)]
    L, D = len(table), table.shape[1]
    t = np.arange(L)[:, None] - np.arange(L)
    results = []
    for head in range(query.shape[2]):
        q, k, v, g = (x[:, head] for x in arrays)
        relative = np.take_along_axis(q @ table.T, np.maximum(t, 0), axis=1)  # q_m . p[m - n]
        scores = np.where(t >= 0, (q @ k.T + relative) / np.sqrt(D), -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        d_weights = g @ v.T
        d_scores = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True)) / np.sqrt(D)
        by_distance = np.zeros((L, L))
        np.put_along_axis(by_distance, np.maximum(t, 0), np.where(t >= 0, d_scores, 0), axis=1)
        by_distance[:, 0] = np.diagonal(d_scores)  # keys after the query were put there too
        results.append((weights @ v, d_scores @ k + by_distance @ table, d_scores.T @ q, weights.T @ g))
    names = "out", "query", "key", "value"
    return {name: np.stack(parts, 1)[None] for name, parts in zip(names, zip(*results, strict=True), strict=True)}
