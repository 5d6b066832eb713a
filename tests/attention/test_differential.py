"""Random calls of attention(), by every backend that runs on a CPU, against the float64 oracle.

A case is a whole call: sizes, tiles, a method, positions of one of several kinds, what is hidden, and dtypes. The
cases are drawn by hypothesis, which makes a failing one smaller and prints it. They are the same in every run.
"""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import oracle
from support.calls import EVERYWHERE
from support.compilation import quick_jit

from configs import smoke
from wavelet_jax.attention import attention, choose, tiled
from wavelet_jax.attention.tiled.geometry import TileSizes
from wavelet_jax.errors import UserError
from wavelet_jax.model.decoder import Decoder
from wavelet_jax.positions import make

TILES = tiled.TILES
LAST = 2**31 - 1  # the last int32

# {name: (method, options)}; every head size that is drawn is a multiple of 4.
METHODS = {
    "nope": ("nope", {}),
    "rope": ("rope", {"theta": 100.0}),
    "rope interleaved": ("rope", {"layout": "interleaved"}),
    "alibi": ("alibi", {}),
    "t5": ("t5", {"num_buckets": 8, "max_distance": 20}),
    "t5 of both sides": ("t5", {"num_buckets": 8, "max_distance": 20, "bidirectional": True}),
    "shaw": ("shaw", {"clip_distance": 5}),
    "shaw with values": ("shaw", {"clip_distance": 9, "values": True}),
    "transformer_xl": ("transformer_xl", {}),
    "sinusoidal": ("sinusoidal", {}),
    "learned": ("learned", {"max_positions": 8}),
    "wavelet": ("wavelet", {"num_scales": 4}),
    "wavelet long": ("wavelet", {"num_scales": 4, "first_exponent": 4, "t_sign": "n-m"}),
    "wavelet haar": ("wavelet", {"num_scales": 4, "mother": "haar_standard"}),
    "wavelet morlet": ("wavelet", {"num_scales": 4, "mother": "morlet"}),
    "wavelet by head": ("wavelet", {"mother": "gaussian"}),
    "wavelet trained": ("wavelet", {"num_scales": 4, "trainable": True}),
    "wavelet trained by head": ("wavelet", {"trainable": True}),
    "discrete_wavelet": ("discrete_wavelet", {"num_levels": 4}),
}
# Biases grow with the distance, and leave no digits to scores next to them in float32.
GROWS = ("alibi",)

POSITIONS = ("left out", "numbers", "numbers", "arrays", "arrays by row", "traced", "traced queries", "gaps")
BACKENDS = ("tiled", "tiled", "tiled", "decode", "auto", "reference")
assert set(BACKENDS) == {*EVERYWHERE, "auto"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `places`: (first query position, first key position); `tiles`: None for those that are shipped."""

    seed: int
    backend: str
    method: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    tiles: TileSizes | None
    dtype: str
    positions: str
    places: tuple[int, int]
    causal: bool
    window: int | None
    segments: str | None
    mask: str | None
    gradients: bool


@st.composite
def cases(draw) -> Case:
    positions, method = draw(st.sampled_from(POSITIONS)), draw(st.sampled_from(list(METHODS)))
    queries, keys = draw(st.integers(1, 4) | st.integers(1, 40)), draw(st.integers(1, 40))
    keys = queries if positions == "left out" else keys
    # The beginning of a cache, its end, and others.
    offsets = [st.just(0), st.just(keys - queries), st.integers(-45, 60)]
    if method not in GROWS:
        offsets.append(st.sampled_from([sign * 10**exponent for sign in (1, -1) for exponent in (4, 9)]))
    first = draw(st.sampled_from([0, 0, 0, 7, -30, LAST - 100, -LAST]))
    kv_heads, block = draw(st.integers(1, 3)), draw(st.integers(1, 16))
    tiles = st.builds(
        TileSizes,
        st.sampled_from([block, 2 * block, 3 * block]),
        st.just(block),
        st.integers(0, 16),
        st.integers(1, 48),
    )
    return Case(
        seed=draw(st.integers(0, 99)),
        backend=draw(st.sampled_from(BACKENDS)),
        method=method,
        batch=draw(st.sampled_from([1, 1, 2])),
        queries=queries,
        keys=keys,
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8, 12])),
        tiles=draw(st.none() | tiles),
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"])),
        positions=positions,
        places=(0, 0) if positions == "left out" else _within(first, draw(st.one_of(offsets)), queries, keys),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.none() | st.integers(1, 50)),
        segments=draw(st.sampled_from([None, None, None, "int32", "uint8", "int8", "int64"])),
        mask=draw(st.sampled_from([None, None, None, "by row", "shared"])),
        gradients=draw(st.integers(0, 3)) == 0,
    )


def _within(first: int, offset: int, queries: int, keys: int) -> tuple[int, int]:
    """Both first positions, moved so that all positions are int32."""
    query = min(max(first + offset, -LAST), LAST - 2 * queries)
    return query, min(max(query - offset, -LAST), LAST - 2 * keys)


def options_of(case: Case) -> tuple[str, dict]:
    name, options = METHODS[case.method]
    if "by head" in case.method:
        generator = np.random.default_rng(case.seed)
        shape = case.heads, case.head_dim
        scales, shifts = 2 ** generator.uniform(0, 4, shape), generator.uniform(-9, 20, shape)
        options = {**options, "scales": scales.tolist(), "shifts": shifts.tolist()}
    return name, options


def positions_of(case: Case) -> tuple[dict, np.ndarray, np.ndarray]:
    """The arguments of attention(), and all positions [B, T] and [B, S]."""
    generator = np.random.default_rng(case.seed)
    every = []
    for first, length in zip(case.places, (case.queries, case.keys), strict=True):
        steps = np.arange(length)
        if case.positions == "gaps":
            steps = np.cumsum(generator.integers(0, 3, (case.batch, length)), axis=1)
        every.append(np.broadcast_to(first + steps, (case.batch, length)))
    match case.positions:
        case "left out":
            given = (None, None)
        case "numbers" | "traced" | "traced queries":
            given = case.places
        case "arrays":
            given = tuple(places[0] for places in every)
        case "arrays by row" | "gaps":
            given = tuple(every)
    return dict(zip(("query_positions", "key_positions"), given, strict=True)), *every


def hidden_of(case: Case, query_positions: np.ndarray, key_positions: np.ndarray) -> tuple[dict, np.ndarray]:
    """The arguments of attention() that hide keys, and what is left visible, [B, H, T, S]."""
    generator = np.random.default_rng(case.seed + 100)
    options = {"causal": case.causal, "window": case.window}
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = distance >= 0 if case.causal else np.ones_like(distance, bool)
    if case.window is not None:
        visible &= np.abs(distance) < case.window
    if case.segments is not None:
        low = -1 if case.segments.startswith("int") else 0
        query, key = (generator.integers(low, 2, (case.batch, n)) for n in (case.queries, case.keys))
        if case.seed % 2:
            query, key = np.sort(query), np.sort(key)
        options["segment_ids"] = query.astype(case.segments), key.astype(case.segments)
        visible = visible & (query[:, :, None] == key[:, None, :])
    if case.mask is not None:
        shape = (case.batch, 1, 1, case.keys) if case.mask == "by row" else (case.keys,)
        options["mask"] = generator.random(shape) < 0.7
        visible = visible & np.broadcast_to(options["mask"], (case.batch, 1, 1, case.keys))[:, 0]
    return options, np.broadcast_to(visible[:, None], (case.batch, case.heads, case.queries, case.keys))


def check(case: Case, monkeypatch) -> None:
    """Output, and gradients where the case has them, within the rounding of the case's dtype of the oracle's."""
    monkeypatch.setattr(tiled, "TILES", TILES if case.tiles is None else dict.fromkeys(TILES, case.tiles))
    monkeypatch.setattr(choose, "MIN_TILED_SCORES", 200)
    name, options = options_of(case)
    method = make(name, num_heads=case.heads, head_dim=case.head_dim, **options)
    generator = np.random.default_rng(case.seed + 200)
    shapes = jax.eval_shape(method.init, jax.random.key(0))
    params = {key: generator.normal(size=shape.shape).astype(shape.dtype) for key, shape in shapes.items()}
    shapes = [(case.queries, case.heads), *[(case.keys, case.kv_heads)] * 2, (case.queries, case.heads)]
    shapes = [(case.batch, length, heads, case.head_dim) for length, heads in shapes]
    arrays = [generator.normal(size=shape).astype(jnp.dtype(case.dtype)) for shape in shapes]
    places, query_positions, key_positions = positions_of(case)
    hidden, visible = hidden_of(case, query_positions, key_positions)
    traced = {"traced": ["query_positions", "key_positions"], "traced queries": ["query_positions"]}
    traced = {name: places.pop(name) for name in traced.get(case.positions, ())}

    def run(params, query, key, value, cotangent, traced):
        def output(params, query, key, value):
            terms = method.terms(params).without_embedding()
            return attention(query, key, value, terms, backend=case.backend, **places, **traced, **hidden)

        if not case.gradients:
            return {"out": output(params, query, key, value)}
        out, pull = jax.vjp(output, params, query, key, value)
        d_params, *others = pull(cotangent)
        return {"out": out, **d_params, **dict(zip(("query", "key", "value"), others, strict=True))}

    if case.positions == "gaps" and case.backend in ("tiled", "decode") and _has_gaps(query_positions, key_positions):
        with pytest.raises(UserError, match="consecutive positions"):
            jax.eval_shape(run, params, *arrays, traced)
        return
    found = quick_jit(run)(params, *arrays, traced)
    exact, highest = oracle.attention_and_gradients(
        *arrays, name, options, params, query_positions, key_positions, visible
    )
    # Rounded once each, in the inputs' dtype: the rotated queries and keys (which moves scores by as much of
    # themselves), weights, their derivatives, and the result. Sums are float32.
    roundings = 4 + highest
    tolerance = 6e-6 + 2.0**-23 * highest
    if case.dtype != "float32":
        tolerance += roundings * float(jnp.finfo(case.dtype).eps)
    for each, array in found.items():
        error = np.max(np.abs(np.asarray(array, np.float64) - exact[each])) / max(np.max(np.abs(exact[each])), 1.0)
        assert error <= tolerance, f"{each} is off by {error:.1e} of its size, and {tolerance:.1e} is rounding"


def _has_gaps(*positions: np.ndarray) -> bool:
    return any((places != places[0, 0] + np.arange(places.shape[1])).any() for places in positions)


def check_random_calls(seed: int, count: int, monkeypatch) -> None:
    """Fixed seeds, and many of them: in one run hypothesis soon varies the cases that it has had."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(case=cases())
    def run(case):
        check(case, monkeypatch)

    run()


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 10))])
def test_random_calls(seed, monkeypatch):
    check_random_calls(seed, 20, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_more_random_calls(seed, monkeypatch):
    """3,000 in all."""
    check_random_calls(seed, 60, monkeypatch)


# --- A cache of few tokens more than are read into it ----------------------------------------------------------

PREFILL = Case(
    seed=0,
    backend="tiled",
    method="rope",
    batch=1,
    queries=1,
    keys=9,
    heads=1,
    kv_heads=1,
    head_dim=8,
    tiles=None,
    dtype="float32",
    positions="numbers",
    places=(0, 0),
    causal=True,
    window=None,
    segments=None,
    mask=None,
    gradients=True,
)


@pytest.mark.parametrize("backend", ["tiled", "auto"])
@pytest.mark.parametrize("method", ["rope", "wavelet", "shaw", "t5"])
@pytest.mark.parametrize("lengths", [(1, 9), (30, 33)])
def test_an_early_prefill_into_a_short_cache(lengths, method, backend, monkeypatch):
    case = dataclasses.replace(PREFILL, backend=backend, method=method, queries=lengths[0], keys=lengths[1])
    check(case, monkeypatch)


@pytest.mark.parametrize("chunks", [[256], [1, 255], [250, 3, 4]])
def test_a_decoder_reads_into_a_short_cache(chunks):
    """256 tokens and a little more room: the same hidden states as without a cache."""
    config = smoke.get_config("rope")
    config.model.update(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16)
    model = Decoder(config, 50, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 50, (1, sum(chunks)))
    graph, params = nnx.split(model)
    expected = quick_jit(lambda params: nnx.merge(graph, params).hidden(tokens))(params)
    read = quick_jit(
        lambda params, tokens, cache, filled: nnx.merge(graph, params).extend(tokens, cache.at(filled)),
        static_argnums=3,
    )
    cache, filled, parts = model.init_cache(1, 260), 0, []
    for count in chunks:
        part, cache = read(params, tokens[:, filled : filled + count], cache, filled)
        parts.append(part)
        filled += count
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=0, atol=1e-5)
