"""What every position method and every attention backend must do, run over all of them by themselves.

A method gets all of this by standing in `positions.METHODS` and in tests/oracle.py, a backend by standing in
`conftest.EVERYWHERE`. A "layer" here is what surrounds attention in a model: token vectors plus what the method adds
to them, projected to queries, keys and values; so methods that add to the embedding are exercised like the others.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.arrays import normal
from support.calls import EVERYWHERE
from support.compilation import quick_jit
from support.tolerances import GRADIENT, OUTPUT, SHARED_BY_KEYS

from wavelet_jax.attention import attention, tiled
from wavelet_jax.attention.tiled.geometry import TileSizes
from wavelet_jax.errors import UserError
from wavelet_jax.positions import METHODS, make

B, H, K, D = 2, 4, 2, 16  # batch, query heads, key heads, head size
E = H * D  # width of the token vectors
LENGTH = 10  # of a full pass; documents and prefixes take half of it
FURTHEST = 2**31 - 1

# Every method with its defaults, and the options that change what it computes.
_rng = np.random.default_rng(0)
_HEAD_GRID = {"scales": np.exp2(_rng.uniform(0, 4, (H, D))), "shifts": _rng.uniform(0, 6, (H, D))}
CASES = {name: (name, {}) for name in METHODS} | {
    "wavelet-gaussian-n-m": ("wavelet", {"mother": "gaussian", "t_sign": "n-m", "num_scales": 4}),
    "wavelet-morlet": ("wavelet", {"mother": "morlet", "num_scales": 4}),
    "wavelet-haar-n-m": ("wavelet", {"mother": "haar", "t_sign": "n-m", "num_scales": 4}),
    "wavelet-haar_standard": ("wavelet", {"mother": "haar_standard", "num_scales": 4}),
    "wavelet-far": ("wavelet", {"first_exponent": 11}),  # scales 2^11 .. 2^18: they reach across 100,000 tokens
    "wavelet-heads": ("wavelet", _HEAD_GRID),
    "wavelet-heads-trainable": ("wavelet", {**_HEAD_GRID, "trainable": True}),
    "wavelet-trainable-n-m": ("wavelet", {"trainable": True, "t_sign": "n-m", "num_scales": 4}),
    "rope-interleaved": ("rope", {"layout": "interleaved", "theta": 5e5}),
    "transformer_xl-theta": ("transformer_xl", {"theta": 100.0, "d_model": 24}),
    "shaw-values": ("shaw", {"clip_distance": 3, "values": True}),
    "t5-small": ("t5", {"num_buckets": 8, "max_distance": 9}),
    "t5-bidirectional": ("t5", {"num_buckets": 8, "max_distance": 6, "bidirectional": True}),
}

# Backends that take consecutive positions only (traced: by the first of them), and refuse others by a UserError.
CONSECUTIVE_ONLY = frozenset({"tiled", "decode"})
# Backends that bound the error of constant position vectors by a tolerance, and round weights to the values' dtype.
BY_FACTORS = frozenset({"tiled", "decode"})

every_method = pytest.mark.parametrize("case", METHODS)
# What goes through attention as another case does: step functions are near everywhere, as samples of discrete wavelets.
LIKE_OTHERS = {"wavelet-haar_standard", "wavelet-haar-n-m"}
every_case = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in LIKE_OTHERS else case for case in CASES]
)
every_backend = pytest.mark.parametrize("backend", EVERYWHERE)


# Of the tiled backend's factors of constant position vectors, in bfloat16 too (whose default test_tiled.py measures).
FAR_TOLERANCE = 1e-6


@pytest.fixture(autouse=True, scope="module")
def _small_tiles():
    """So that ten tokens have tiles of all kinds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "TILES", dict.fromkeys(tiled.TILES, TileSizes(rows=4, block=2, band=2, keys=3)))
        yield


@pytest.fixture(autouse=True)
def nothing_is_promoted():
    """The strictest settings that programs run under: no rank and no dtype is promoted behind their backs."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


# --- The layer, and its inputs ---------------------------------------------------------------------------------


@functools.cache
def method_of(case: str):
    name, options = CASES[case]
    return make(name, num_heads=H, head_dim=D, **options)


@functools.cache
def params_of(case: str) -> dict[str, np.ndarray]:
    """Parameters far from their small starting values, so that a mistake in any of them shows."""
    params = method_of(case).init(jax.random.key(0))
    return {name: np.asarray(param) + normal(i, *param.shape) / 2 for i, (name, param) in enumerate(params.items())}


def terms_of(case: str, params: dict):
    return method_of(case).terms(params)


WEIGHTS = {
    name: normal(20 + i, E, heads, D) / np.float32(np.sqrt(E))
    for i, (name, heads) in enumerate({"query": H, "key": K, "value": K}.items())
}
X = normal(30, B, LENGTH, E)


def qkv(case: str, positions, x_BxTxE=X):
    terms = terms_of(case, params_of(case))
    x_BxTxE = x_BxTxE if terms.embed is None else x_BxTxE + terms.embed(positions)
    return tuple(jnp.einsum("bte,ehd->bthd", x_BxTxE, WEIGHTS[name]) for name in ("query", "key", "value"))


def layer(case, backend, inputs, places, *, causal=True, window=None):
    """[B, T, H, D] from inputs {"params", "query", "key", "value", "x_query" [B, T, E], "x_key" [B, S, E]} and
    places {"query_positions" [B, T], "key_positions" [B, S], "query_segments", "key_segments"} (or None for each;
    positions may be the first of consecutive ones).
    """
    terms = terms_of(case, inputs["params"])
    x_query, x_key = inputs["x_query"], inputs["x_key"]
    if terms.embed is not None:

        def every(positions, x):
            start = 0 if positions is None else positions
            return start + np.arange(x.shape[1]) if np.ndim(start) == 0 else positions

        x_query += jnp.broadcast_to(terms.embed(every(places["query_positions"], x_query)), x_query.shape)
        x_key += jnp.broadcast_to(terms.embed(every(places["key_positions"], x_key)), x_key.shape)
    return attention(
        jnp.einsum("bte,ehd->bthd", x_query, inputs["query"]),
        jnp.einsum("bse,ekd->bskd", x_key, inputs["key"]),
        jnp.einsum("bse,ekd->bskd", x_key, inputs["value"]),
        terms.without_embedding(),
        causal=causal,
        window=window,
        backend=backend,
        query_positions=places["query_positions"],
        key_positions=places["key_positions"],
        segment_ids=None if places["query_segments"] is None else (places["query_segments"], places["key_segments"]),
    )


def slow_layer(case, inputs, places, *, causal=True, window=None) -> np.ndarray:
    """The same by the oracle's loops, in float64."""
    name, options = CASES[case]
    hidden = []
    for x, positions in ((inputs["x_query"], "query_positions"), (inputs["x_key"], "key_positions")):
        x = np.array(x, np.float64)
        for b, t in np.ndindex(x.shape[:2]):
            position = t if places[positions] is None else int(places[positions][b][t])
            added = oracle.embedding(name, options, inputs["params"], position, E)
            x[b, t] += 0 if added is None else added
        hidden.append(x)
    return oracle.attention(
        np.einsum("bte,ehd->bthd", hidden[0], inputs["query"]),
        np.einsum("bse,ekd->bskd", hidden[1], inputs["key"]),
        np.einsum("bse,ekd->bskd", hidden[1], inputs["value"]),
        name,
        options,
        inputs["params"],
        causal=causal,
        window=window,
        **places,
    )


@functools.cache
def jitted(case: str, backend: str):
    """The causal layer; recompiled for each shape only."""
    return quick_jit(functools.partial(layer, case, backend))


def run(case, backend, x_query, positions, *, x_key=None, key_positions=None, segments=None) -> np.ndarray:
    """A causal pass: positions [T] (spread over the batch), keys of the queries unless others are given."""
    x_key = x_query if x_key is None else x_key
    positions = np.broadcast_to(np.asarray(positions, np.int32), x_query.shape[:2])
    key_positions = positions if key_positions is None else np.broadcast_to(np.int32(key_positions), x_key.shape[:2])
    segments = np.zeros(LENGTH, np.int32) if segments is None else segments
    places = {
        "query_positions": positions,
        "key_positions": key_positions,
        "query_segments": np.broadcast_to(segments[: x_query.shape[1]], x_query.shape[:2]),
        "key_segments": np.broadcast_to(np.resize(segments, x_key.shape[1]), x_key.shape[:2]),
    }
    inputs = {"params": params_of(case), **WEIGHTS, "x_query": x_query, "x_key": x_key}
    return np.asarray(jitted(case, backend)(inputs, traceable(backend, places)))


def traceable(backend: str, places: dict) -> dict:
    """Places that may be arguments of a jitted layer: the first of consecutive positions where the backend needs it."""
    if backend not in CONSECUTIVE_ONLY:
        return places
    firsts = {name: places[name][0, 0] for name in ("query_positions", "key_positions")}
    for name, first in firsts.items():
        assert (places[name] == first + np.arange(places[name].shape[1])).all(), f"{backend} refuses these {name}"
    return places | firsts


def refuses(case: str, backend: str, positions) -> bool:
    """Whether the backend takes consecutive positions only; if so, these must be refused."""
    if backend not in CONSECUTIVE_ONLY:
        return False
    positions = np.broadcast_to(positions, (B, LENGTH))
    with pytest.raises(UserError, match=f"the {backend} backend needs consecutive positions"):
        attention(
            *qkv(case, positions),
            terms_of(case, params_of(case)).without_embedding(),
            query_positions=positions,
            key_positions=positions,
            backend=backend,
        )
    return True


# --- Agreement with the definition -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """One use of attention; [B, T] arrays or None."""

    x_query: np.ndarray
    x_key: np.ndarray
    causal: bool
    window: int | None
    query_positions: np.ndarray | None = None
    key_positions: np.ndarray | None = None
    query_segments: np.ndarray | None = None
    key_segments: np.ndarray | None = None

    def places(self) -> dict:
        names = ("query_positions", "key_positions", "query_segments", "key_segments")
        return {name: getattr(self, name) for name in names}


SETTINGS = {
    # Positions left out; a window, and packed documents; row 1 has a query (the last) that sees no key.
    "causal": Setting(
        x_query=X[:, :7],
        x_key=X[:, :7],
        causal=True,
        window=4,
        query_segments=np.array([[0, 0, 0, 0, 0, 0, 0], [1, 1, 2, 2, 2, 2, 9]]),
        key_segments=np.array([[0, 0, 0, 0, 0, 0, 0], [1, 1, 2, 2, 2, 2, 2]]),
    ),
    # Both directions, other queries than keys, positions with gaps and by row, in no order; a wider window.
    "two-sided": Setting(
        x_query=normal(31, B, 4, E),
        x_key=X[:, :6],
        causal=False,
        window=14,
        query_positions=np.array([[3, 20, 9, 0], [5, 6, 7, 12]]),
        key_positions=np.array([[0, 3, 7, 8, 15, 30], [11, 9, 4, 2, 1, 0]]),
    ),
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)
_two_sided = SETTINGS["two-sided"]
CONSECUTIVE = {  # what CONSECUTIVE_ONLY backends get instead; test_attention.py sees them refuse positions by row
    "two-sided": dataclasses.replace(
        _two_sided,
        window=5,  # distances -3 .. 5: it hides some
        query_positions=np.tile(3 + np.arange(4), (B, 1)),
        key_positions=np.tile(1 + np.arange(6), (B, 1)),
    )
}


def setting_of(name: str, backend: str) -> Setting:
    return CONSECUTIVE.get(name, SETTINGS[name]) if backend in CONSECUTIVE_ONLY else SETTINGS[name]


@functools.cache
def output_and_gradients(case: str, backend: str, setting: str):
    """The layer's output, and the gradients of its sum with fixed weights by every input."""
    use = setting_of(setting, backend)
    inputs = {"params": params_of(case), **WEIGHTS, "x_query": use.x_query, "x_key": use.x_key}
    weights = normal(40, *use.x_query.shape[:2], H, D)

    def loss(inputs):
        out = layer(case, backend, inputs, use.places(), causal=use.causal, window=use.window)
        return jnp.sum(out * weights), out

    gradients, out = quick_jit(jax.grad(loss, has_aux=True))(inputs)
    return inputs, weights, np.asarray(out), jax.tree.map(np.asarray, gradients)


@every_backend
@every_setting
@every_case
def test_agrees_with_the_slow_loop(case, setting, backend):
    """Forward number by number; gradients along random directions, by central differences of the float64 loops.

    For a direction u of standard normal numbers, <wrong part of the gradient, u> is a normal number with the norm of
    the wrong part: so one direction tells an error of more than about GRADIENT of the gradient's norm. Differences
    with this step are right to about 1e-7: halving it changes them by less.
    """
    assert CASES[case][0] in oracle.KNOWN, f"write {CASES[case][0]}'s slow loop in tests/oracle.py"
    use = setting_of(setting, backend)
    inputs, weights, out, gradients = output_and_gradients(case, backend, setting)
    np.testing.assert_allclose(
        out, slow_layer(case, inputs, use.places(), causal=use.causal, window=use.window), rtol=0, atol=OUTPUT
    )

    def slow_loss(inputs) -> float:
        out = slow_layer(case, inputs, use.places(), causal=use.causal, window=use.window)
        return float(np.sum(out * np.float64(weights)))

    inputs = jax.tree.map(np.float64, inputs)
    rng = np.random.default_rng(50)
    groups = [[name for name in inputs if name != "params"], *([name] for name in inputs["params"])]
    for group in groups:
        at, by = (inputs, gradients) if group[0] in inputs else (inputs["params"], gradients["params"])
        direction = {name: rng.normal(size=at[name].shape) for name in group}
        ours = sum(np.sum(by[name] * direction[name]) for name in group)
        step = 2e-6
        moved = []
        for sign in (1, -1):
            ahead = at | {name: at[name] + sign * step * direction[name] for name in group}
            moved.append(slow_loss(ahead if at is inputs else inputs | {"params": ahead}))
        slow = (moved[0] - moved[1]) / (2 * step)
        norm = np.sqrt(sum(np.sum(np.square(by[name], dtype=np.float64)) for name in group))
        assert norm > 0.1, f"nothing reaches {group}"
        bound = SHARED_BY_KEYS if (backend, CASES[case][0]) == ("tiled", "transformer_xl") else GRADIENT
        assert abs(ours - slow) <= bound * norm + 1e-7, group


@every_backend
@every_setting
@every_case
def test_gradients_are_finite_and_a_blind_query_gives_zeros(case, setting, backend):
    """The causal setting's last query of row 1 sees no key."""
    _, _, out, gradients = output_and_gradients(case, backend, setting)
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))
    if setting == "causal":
        np.testing.assert_array_equal(out[1, -1], 0)
        np.testing.assert_array_equal(gradients["x_query"][1, -1], 0)
        assert (out[0, -1] != 0).all()


@every_backend
@every_method
def test_jit_equals_eager(case, backend):
    use = setting_of("two-sided", backend)
    inputs, _, quick, _ = output_and_gradients(case, backend, "two-sided")
    once = functools.partial(layer, case, backend, causal=use.causal, window=use.window)
    eager = once(inputs, use.places())
    traced = jax.jit(once)(inputs, traceable(backend, use.places()))
    np.testing.assert_allclose(traced, eager, rtol=0, atol=OUTPUT)
    np.testing.assert_allclose(quick, eager, rtol=0, atol=OUTPUT)


# --- Causality -------------------------------------------------------------------------------------------------


@every_backend
@every_case
def test_causality_by_gradient(case, backend):
    """d out[t] / d (k, v)[s] is 0 exactly for s > t, and d out[t] / d q[s] for s != t; every other one is there."""
    length = 6
    q, k, v = (normal(60 + i, B, length, heads, D) for i, heads in enumerate((H, K, K)))
    weights = normal(63, H, D)

    def by_query(q, k, v):
        out = attention(q, k, v, terms_of(case, params_of(case)).without_embedding(), backend=backend)
        return jnp.einsum("bthd,hd->t", out, weights)

    by_q, by_k, by_v = (
        np.abs(jacobian).max(axis=(1, 3, 4)) for jacobian in quick_jit(jax.jacrev(by_query, argnums=(0, 1, 2)))(q, k, v)
    )  # [T, S] each: the largest derivative
    sees = np.tri(length, dtype=bool)
    np.testing.assert_array_equal(by_k[~sees], 0)
    np.testing.assert_array_equal(by_v[~sees], 0)
    np.testing.assert_array_equal(by_q[~np.eye(length, dtype=bool)], 0)
    assert (by_v[sees] > 1e-6).all()
    # The first query has one key to see, and so no choice for its query and key to change.
    assert (by_k[sees & (np.arange(length) > 0)[:, None]] > 1e-6).all()
    assert (np.diag(by_q)[1:] > 1e-6).all()


@every_backend
@every_case
def test_a_prefix_does_not_know_what_follows(case, backend):
    half, places = LENGTH // 2, np.arange(LENGTH)
    full = run(case, backend, X, places)
    other_end = np.concatenate([X[:, :half], 50 * normal(70, B, LENGTH - half, E)], axis=1)
    np.testing.assert_array_equal(run(case, backend, other_end, places)[:, :half], full[:, :half])
    np.testing.assert_allclose(run(case, backend, X[:, :half], places[:half]), full[:, :half], rtol=0, atol=OUTPUT)
    assert np.abs(run(case, backend, other_end, places)[:, half:] - full[:, half:]).max() > 0.1


@every_backend
@every_case
def test_one_query_at_a_time_with_a_cache_equals_the_full_pass(case, backend):
    """A cache of fixed size: slots not filled yet hold large garbage at positions after the query."""
    full = run(case, backend, X, np.arange(LENGTH))
    slots = LENGTH + 3
    cache = 100 * normal(71, B, slots, E)
    for t in range(LENGTH):
        cache[:, t] = X[:, t]
        out = run(case, backend, X[:, t : t + 1], [t], x_key=cache, key_positions=np.arange(slots))
        np.testing.assert_allclose(out[:, 0], full[:, t], rtol=0, atol=OUTPUT)


@every_backend
@every_case
def test_packed_documents_equal_separate_ones(case, backend):
    half = LENGTH // 2
    segments = np.repeat([4, 1], half).astype(np.int32)
    alone = np.concatenate([run(case, backend, x, np.arange(half)) for x in (X[:, :half], X[:, half:])], axis=1)
    restarted = np.tile(np.arange(half), 2)
    if not refuses(case, backend, restarted):
        packed = run(case, backend, X, restarted, segments=segments)
        np.testing.assert_allclose(packed, alone, rtol=0, atol=OUTPUT)
    if terms_of(case, params_of(case)).embed is None:  # relative: positions may run on
        running = run(case, backend, X, np.arange(LENGTH), segments=segments)
        np.testing.assert_allclose(running, alone, rtol=0, atol=OUTPUT)


# --- Positions -------------------------------------------------------------------------------------------------


@every_backend
@every_case
def test_positions_count_only_by_their_differences(case, backend):
    """Adding 1,000 or 2^30 to every position changes nothing, bit for bit where nothing is rotated.

    Methods that add to the embedding are absolute: theirs must change.
    """
    terms = terms_of(case, params_of(case))
    here = run(case, backend, X, np.arange(LENGTH))
    for offset in (1000, 2**30 + 1):
        if terms.max_positions is not None and offset > terms.max_positions:
            continue
        there = run(case, backend, X, np.arange(LENGTH) + offset)
        if terms.embed is not None:
            assert np.abs(there - here).max() > 0.01
        elif terms.rotate is None:
            np.testing.assert_array_equal(there, here)
        else:  # the angle's 6e-7 radians on |q| |k| / sqrt(D), as in OUTPUT
            np.testing.assert_allclose(there, here, rtol=0, atol=OUTPUT)


@every_backend
@every_case
def test_positions_count(case, backend):
    """Stretching them changes the output of every method but NoPE."""
    stretch = 1000 if case == "wavelet-far" else 3  # 30 tokens are nothing to scales from 2^11
    if refuses(case, backend, stretch * np.arange(LENGTH)):
        return  # agreement with the slow loop shows the same for consecutive ones
    here, stretched = (run(case, backend, X, by * np.arange(LENGTH)) for by in (1, stretch))
    changed = np.abs(stretched - here).max() > 0.01
    assert changed == (case != "nope")


@every_backend
@every_case
def test_the_furthest_distances_are_finite(case, backend):
    if terms_of(case, params_of(case)).max_positions is not None:
        pytest.skip("refuses positions past its table, see test_positions.py")
    near, far = np.arange(LENGTH // 2), FURTHEST - np.arange(LENGTH // 2)[::-1]
    if not refuses(case, backend, np.concatenate([near, far])):
        assert np.isfinite(run(case, backend, X, np.concatenate([near, far]))).all()
    first, last = X[:, : len(near)], X[:, len(near) :]
    assert np.isfinite(run(case, backend, last, far, x_key=first, key_positions=near)).all()


@every_backend
@every_case
def test_bfloat16_around_position_100_000(case, backend):
    """bfloat16 queries, keys and values against float64 on the same numbers, within a derived bound.

    Row 0 lies around 100,000; row 1's first keys lie at 0 .. 2, so that distances too are of that size; backends of
    consecutive positions get two calls instead. With u = 2^-8, half a step of bfloat16 relative to a number:
    - a method that rotates rounds each number of q and k once more: scores wrong by 2 u |q| |k| / sqrt(D) at most;
    - everything else is float32: scores wrong by (D + 8) 2^-24 (|q| |k| + |q| |p|) / sqrt(D), by 2^-22 of a bias (some
      roundings, in a score as large as it), and by 1.2e-6 |q| |1| / sqrt(D) from the position vectors;
    - scores wrong by e make softmax weights wrong by a factor of exp(2 e) at most, so outputs by (exp(2 e) - 1) max|v|;
    - "tiled" and "decode" add FAR_TOLERANCE |q| |1| / sqrt(D) where they have factors of the position vectors, and
      round the weights once, for the product with the values: u max|v|;
    - and the output is rounded once: u |out|.
    bfloat16 position arithmetic, in steps of 512 up here, fails it for every method whose positions count.
    """
    terms, params = terms_of(case, params_of(case)), params_of(case)
    places = np.array([100_000 + np.arange(6), [0, 1, 2, 100_000, 100_001, 100_002]], np.int32)
    if terms.max_positions is not None:
        with pytest.raises(UserError, match="past the learned table"):
            terms.embed(places)
        return
    name, options = CASES[case]
    if terms.embed is not None:  # float32, to be added before any rounding
        added = jax.jit(terms.embed)(places)
        assert added.dtype == jnp.float32
        slow = [[oracle.embedding(name, options, params, int(p), E) for p in row] for row in places]
        np.testing.assert_allclose(added, slow, rtol=0, atol=1.2e-6)

    q, k, v = (jnp.asarray(normal(80 + i, B, 6, heads, D), jnp.bfloat16) for i, heads in enumerate((H, K, K)))
    first = np.tile(places[0], (B, 1))
    uses = [(first, first), (first, first - 100_000)] if backend in CONSECUTIVE_ONLY else [(places, places)]
    for query_positions, key_positions in uses:
        given = {"query_positions": query_positions, "key_positions": key_positions}
        inside = terms.without_embedding()
        attend = functools.partial(attention, terms=inside, backend=backend, far_tolerance=FAR_TOLERANCE, **given)
        out = quick_jit(attend)(q, k, v)
        assert out.dtype == jnp.bfloat16
        _within_the_bound(case, backend, *(np.asarray(x, np.float64) for x in (out, q, k, v)), **given)


def _within_the_bound(case, backend, out, q, k, v, *, query_positions, key_positions) -> None:
    """That of `test_bfloat16_around_position_100_000`."""
    terms, params = terms_of(case, params_of(case)), params_of(case)
    places = {"query_positions": query_positions, "key_positions": key_positions}
    slow = oracle.attention(q, k, v, *CASES[case], params, **places)
    u = 2.0**-8
    distance = query_positions[:, :, None] - key_positions[:, None, :]

    def norm(x) -> float:
        return float(np.linalg.norm(x, axis=-1).max())

    products = norm(q) * norm(k)
    if terms.relative_keys is not None:
        extra = norm(terms.relative_keys(distance))
        products += norm(q) * extra
        for bias, other in ((terms.content_bias, norm(k)), (terms.position_bias, extra)):
            products += 0 if bias is None else norm(bias) * other
    error = (D + 8) * 2.0**-24 * products / np.sqrt(D) + 1.2e-6 * norm(q)
    if backend in BY_FACTORS:
        error += FAR_TOLERANCE * norm(q)
    if terms.rotate is not None:
        error += (2 * u + u * u) * products / np.sqrt(D)
    if terms.bias is not None:
        error += 2.0**-22 * float(np.abs(terms.bias(distance)).max())
    values = np.abs(v).max()
    if terms.relative_values is not None:
        values += float(np.abs(terms.relative_values(distance)).max())
    assert error < 0.07  # or the bound would let anything through
    rounded_weights = u * np.abs(v).max() if backend in BY_FACTORS else 0
    bound = np.expm1(2 * error) * values + rounded_weights + u * np.abs(slow)
    assert (np.abs(out - slow) <= bound).all()
