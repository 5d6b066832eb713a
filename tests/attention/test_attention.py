"""attention(): what each of its options does, alone; and what it refuses. Methods are test_conformance.py's matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.arrays import normal
from support.calls import EVERYWHERE
from support.compilation import quick_jit
from support.tolerances import OUTPUT

from wavelet_jax.attention import api, attention, choose
from wavelet_jax.errors import UserError
from wavelet_jax.positions import METHODS, make
from wavelet_jax.positions.terms import Terms

B, T, H, D = 2, 8, 4, 8

NOPE = Terms()
every_backend = pytest.mark.parametrize("backend", EVERYWHERE)
# What a backend refuses, by a UserError with these words, when named; it is tested for this and not for the rest.
REFUSES = {
    (backend, what): words
    for backend in ("tiled", "decode")
    for what, words in (("positions by row", "needs consecutive positions"), ("dropout", "no attention dropout"))
}


def refuses(backend: str, what: str, act) -> bool:
    if (backend, what) not in REFUSES:
        return False
    with pytest.raises(UserError, match=REFUSES[backend, what]):
        act()
    return True


def qkv(length: int = T, kv_heads: int = H, keys: int | None = None):
    keys = length if keys is None else keys
    return normal(0, B, length, H, D), normal(1, B, keys, kv_heads, D), normal(2, B, keys, kv_heads, D)


def wavelet_terms() -> Terms:
    return make("wavelet", num_heads=H, head_dim=D, num_scales=4).terms({})


def attend(q, k, v, terms: Terms = NOPE, **options) -> jax.Array:
    """attention(): the definition eagerly, others compiled quickly (their loops compile slowly if called eagerly)."""
    call = functools.partial(attention, terms=terms, **options)
    return call(q, k, v) if options["backend"] == "reference" else quick_jit(call)(q, k, v)


def against_the_loop(q, k, v, *, backend, slow: dict | None = None, **options):
    """attention() with wavelets against the oracle, whose names for the same options are in `slow`."""
    out = attend(q, k, v, wavelet_terms(), backend=backend, **options)
    assert out.shape == q.shape
    expected = oracle.attention(q, k, v, "wavelet", {"num_scales": 4}, **(options if slow is None else slow))
    np.testing.assert_allclose(out, expected, rtol=0, atol=OUTPUT)
    return np.asarray(out)


# --- Each option alone -----------------------------------------------------------------------------------------


def test_by_hand():
    """Two tokens, one head of two dimensions: the second attends by 1 / (1 + e^-x) with x the scores' difference."""
    q = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32).reshape(1, 2, 1, 2)
    k = np.array([[1.0, 1.0], [0.0, -1.0]], np.float32).reshape(1, 2, 1, 2)
    v = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32).reshape(1, 2, 1, 2)
    first = 1 / (1 + np.exp(-(2 - -2) / np.sqrt(2)))
    np.testing.assert_allclose(attention(q, k, v, NOPE).reshape(2, 2), [[1, 0], [first, 1 - first]], atol=1e-6)
    # Eq. (10) with p[0] = (1, 1), p[1] = (0, -3) at scale 1 and 1/2: scores q . (k + p), again over sqrt(2).
    terms = make("wavelet", num_heads=1, head_dim=2, scales=[1, 0.5], shifts=[0, 0]).terms({})
    p = np.array([[1, 1], [0, -3 * np.exp(-2)]])
    difference = 2 * (1 + p[1, 1]) - 2 * (-1 + p[0, 1])
    first = 1 / (1 + np.exp(-difference / np.sqrt(2)))
    np.testing.assert_allclose(attention(q, k, v, terms).reshape(2, 2), [[1, 0], [first, 1 - first]], atol=1e-6)


@every_backend
def test_causal_and_not(backend):
    q, k, v = qkv()
    causal = against_the_loop(q, k, v, backend=backend)
    both = against_the_loop(q, k, v, causal=False, backend=backend)
    np.testing.assert_allclose(both[:, -1], causal[:, -1], rtol=0, atol=OUTPUT)  # the last sees all either way
    assert np.abs(both[:, 0] - causal[:, 0]).max() > 0.1
    np.testing.assert_allclose(causal[:, 0], v[:, 0], rtol=0, atol=1e-6)  # one key: its value


@every_backend
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_query_heads(kv_heads, backend):
    """Head h reads key head h // (H / K), also against keys and values written out for every head."""
    q, k, v = qkv(kv_heads=kv_heads)
    out = against_the_loop(q, k, v, backend=backend)
    written_out = [x[:, :, [h // (H // kv_heads) for h in range(H)]] for x in (k, v)]
    np.testing.assert_allclose(out, attend(q, *written_out, wavelet_terms(), backend=backend), rtol=0, atol=OUTPUT)


@every_backend
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, np.uint8(3), T, 100])
def test_window(window, causal, backend):
    q, k, v = qkv()
    out = against_the_loop(q, k, v, window=window, causal=causal, backend=backend)
    if window == 1:  # itself only
        np.testing.assert_allclose(out, v, rtol=0, atol=1e-6)
    if window >= T:
        np.testing.assert_array_equal(out, attend(q, k, v, wavelet_terms(), causal=causal, backend=backend))


@every_backend
def test_segments(backend):
    """One array for both sides, or a pair; order and names of the segments do not matter."""
    q, k, v = qkv()
    segments = np.array([[5, 5, 5, 2, 2, 2, 2, 2], [0, 1, 1, 1, 0, 0, 1, 0]])
    slow = {"query_segments": segments, "key_segments": segments}
    out = against_the_loop(q, k, v, segment_ids=segments, slow=slow, backend=backend)
    pair = attend(q, k, v, wavelet_terms(), segment_ids=(segments, jnp.asarray(segments)), backend=backend)
    np.testing.assert_array_equal(pair, out)
    np.testing.assert_allclose(out[0, 3], v[0, 3], rtol=0, atol=1e-6)  # the first of its document


MASKS = {  # of padding, with the shapes that it may come in
    "row by row": np.array([[1, 1, 1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 1, 1, 1, 1]], bool).reshape(B, 1, 1, T),
    "one row": np.array([1, 1, 0, 1, 1, 0, 1, 0], bool),
    "nothing": np.zeros((1, 1, 1, 1), bool),
}
SCATTERED = np.random.default_rng(7).random((B, H, T, T)) < 0.6


@every_backend
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_padding_masks(name, causal, backend):
    q, k, v = qkv()
    slow = {"causal": causal, "mask": np.broadcast_to(MASKS[name], (B, H, T, T))}
    out = against_the_loop(q, k, v, mask=MASKS[name], causal=causal, slow=slow, backend=backend)
    assert not np.allclose(out, attend(q, k, v, wavelet_terms(), causal=causal, backend=backend), atol=0.1)


@every_backend
@pytest.mark.parametrize("ids", [[0, 1], [255, 254], [-1, 0]])
def test_padding_masks_with_segments(ids, backend):
    """Whatever the ids of the segments are, of a short type too, padded keys are in none of them."""
    q, k, v = qkv()
    segments = np.array(ids, np.uint8 if min(ids) >= 0 else np.int8)[
        [[0, 0, 0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 1, 1, 1, 1]]
    ]
    mask = MASKS["row by row"]
    slow = {"query_segments": segments, "key_segments": segments, "mask": np.broadcast_to(mask, (B, H, T, T))}
    against_the_loop(q, k, v, mask=mask, segment_ids=segments, slow=slow, backend=backend)


@every_backend
@pytest.mark.parametrize("part", ["all", "one head", "one row of queries", "no batch"])
def test_any_mask(part, backend):
    """By "reference" alone, and by that only where it is named."""
    q, k, v = qkv(kv_heads=2)
    cut = {"all": (), "one head": np.s_[:, :1], "one row of queries": np.s_[:, :, :1], "no batch": np.s_[0, 0]}[part]
    mask = SCATTERED[cut]
    for name in {"auto", backend} - {"reference"}:
        with pytest.raises(UserError, match=r"a mask that differs by head or query .* name backend='reference'"):
            attention(q, k, v, NOPE, mask=mask, backend=name)
    if backend == "reference":
        slow = {"mask": np.broadcast_to(mask, (B, H, T, T)), "window": 6}
        against_the_loop(q, k, v, mask=mask, window=6, slow=slow, backend=backend)


@every_backend
def test_positions_left_out_are_0_1_2(backend):
    q, k, v = qkv()
    out = attend(q, k, v, wavelet_terms(), backend=backend)
    for places in (np.arange(T), np.tile(np.arange(T), (B, 1)), jnp.arange(T)):
        given = attend(q, k, v, wavelet_terms(), query_positions=places, key_positions=places, backend=backend)
        np.testing.assert_allclose(given, out, rtol=0, atol=OUTPUT)
    np.testing.assert_allclose(
        attend(q, k, v, wavelet_terms(), key_positions=np.arange(T), backend=backend), out, rtol=0, atol=OUTPUT
    )


@every_backend
def test_one_position_is_the_first_of_consecutive_ones(backend):
    """A number, an array of no dimensions, or a traced one."""
    q, k, v = qkv(length=3, keys=T)
    places = {"query_positions": np.tile(4 + np.arange(3), (B, 1)), "key_positions": np.tile(np.arange(T), (B, 1))}
    out = against_the_loop(q, k, v, backend=backend, **places)
    for convert in (int, np.int16, jnp.uint8):
        given = {"query_positions": convert(4), "key_positions": convert(0)}
        same = attend(q, k, v, wavelet_terms(), backend=backend, **given)
        np.testing.assert_allclose(same, out, rtol=0, atol=OUTPUT)
    traced = quick_jit(
        lambda start: attention(q, k, v, wavelet_terms(), query_positions=start, key_positions=0, backend=backend)
    )
    np.testing.assert_allclose(traced(4), out, rtol=0, atol=OUTPUT)


@every_backend
@pytest.mark.parametrize("name", ["wavelet", "rope", "alibi", "t5", "shaw", "transformer_xl"])
def test_positions_of_each_row_equal_separate_calls(name, backend):
    """[B, T] positions, against each row alone with [T] ones; mixed shapes too."""
    method = make(name, num_heads=H, head_dim=D)
    terms = method.terms(method.init(jax.random.key(0)))
    q, k, v = qkv(length=5, keys=T, kv_heads=2)
    query_positions = np.array([[9, 3, 4, 12, 0], [100, 101, 50, 7, 8]])
    key_positions = np.array([[0, 1, 2, 5, 7, 11, 3, 9], [7, 8, 50, 51, 99, 100, 101, 3]])

    @quick_jit
    def attend(q, k, v, query_positions, key_positions):
        options = {"query_positions": query_positions, "key_positions": key_positions, "backend": backend}
        return attention(q, k, v, terms, **options)

    if refuses(backend, "positions by row", lambda: attend(q, k, v, query_positions, key_positions)):
        given = {"query_positions": query_positions, "key_positions": key_positions}  # known while tracing
        assert refuses(backend, "positions by row", lambda: attention(q, k, v, terms, backend=backend, **given))
        return
    both = attend(q, k, v, query_positions, key_positions)
    for b in range(B):
        alone = attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], query_positions[b], key_positions[b])
        np.testing.assert_allclose(both[b], alone[0], rtol=0, atol=OUTPUT)
    shared = attend(q, k, v, query_positions[0], key_positions)
    np.testing.assert_allclose(shared[0], both[0], rtol=0, atol=OUTPUT)


@every_backend
@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int16])
def test_positions_of_any_integer_type(dtype, backend):
    """An unsigned distance has no negative, and would let a query see what follows it."""
    q, k, v = qkv()
    places = np.arange(T, dtype=dtype)
    out = attend(q, k, v, wavelet_terms(), query_positions=places, key_positions=places, backend=backend)
    np.testing.assert_allclose(out, oracle.attention(q, k, v, "wavelet", {"num_scales": 4}), rtol=0, atol=OUTPUT)


@every_backend
@pytest.mark.parametrize("method_options", [{}, {"values": True}])
def test_a_query_that_sees_no_key(method_options, backend):
    """Zeros, and gradients that are zeros: by segment, by window, and where all keys come later."""
    method = make("shaw", num_heads=H, head_dim=D, **method_options)
    params = method.init(jax.random.key(0))
    q, k, v = qkv()
    late = {"query_positions": np.arange(T), "key_positions": np.arange(T) + T}
    apart = {"segment_ids": (np.zeros((B, T), int), np.ones((B, T), int))}
    distant = {"query_positions": np.arange(T) + 100, "key_positions": np.arange(T), "window": 50}
    for options in (late, apart, distant):

        def out(q, k, v, params, options=options):
            return attention(q, k, v, method.terms(params), backend=backend, **options)

        np.testing.assert_array_equal(quick_jit(out)(q, k, v, params), 0)
        total = jax.grad(lambda *arguments: jnp.sum(out(*arguments)), argnums=(0, 1, 2, 3))
        for gradient in jax.tree.leaves(quick_jit(total)(q, k, v, params)):
            np.testing.assert_array_equal(gradient, 0)


@every_backend
def test_large_scores_stay_finite(backend):
    """Scores of thousands: softmax by its maximum, and one-hot weights."""
    q, k, v = qkv()
    out = attention(100 * q, 100 * k, v, NOPE, backend=backend)
    slow = oracle.attention(100.0 * q, 100.0 * k, v)
    # Scores up to 1e5 step by 0.008 in float32: weights may be wrong by as much where two keys are that close.
    np.testing.assert_allclose(out, slow, rtol=0, atol=2 * 0.008 * np.abs(v).max())


@every_backend
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes(dtype, backend):
    """The value's dtype comes out; sums are float32: one rounding away from float64 on the same numbers.

    "tiled" and "decode" also round the weights, for a product of two operands of one dtype with the values; their
    total is taken before that, so each w is wrong by half a step of itself, and the output by half a step of the mean
    of |v|.
    """
    q, k, v = (jnp.asarray(x, dtype) for x in qkv())
    # Factors of the position vectors as good as float32: the coarser ones of short dtypes are test_tiled.py's matter.
    out = attend(q, k, v, wavelet_terms(), backend=backend, far_tolerance=1e-6)
    assert out.dtype == dtype
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    slow = oracle.attention(q, k, v, "wavelet", {"num_scales": 4})
    half_a_step = float(jnp.finfo(dtype).eps) / 2
    before = OUTPUT  # the error before the output is rounded
    if backend in ("tiled", "decode"):
        before = before + half_a_step * oracle.attention(q, k, np.abs(v), "wavelet", {"num_scales": 4})
    assert (np.abs(np.asarray(out, np.float64) - slow) <= before + half_a_step * (np.abs(slow) + before)).all()


@pytest.mark.parametrize(
    ("queries", "keys", "takes"), [(8, 8, "reference"), (1, 300, "decode"), (300, 300, "tiled"), (40, 300, "reference")]
)
def test_auto_takes_a_backend_for_the_lengths(monkeypatch, queries, keys, takes):
    """... and its output is that of the reference, which "auto" does not take for long sequences."""
    taken = []

    def choosing(*arguments, **options):
        taken.append(choose.choose(*arguments, **options))
        return taken[-1]

    monkeypatch.setattr(api, "choose", choosing)
    positions = {"query_positions": keys - queries, "key_positions": 0}
    auto, reference = (
        attention(*qkv(queries, keys=keys), wavelet_terms(), backend=backend, **positions)
        for backend in ("auto", "reference")
    )
    assert taken == [takes, "reference"]
    np.testing.assert_allclose(auto, reference, rtol=0, atol=OUTPUT)


# --- Dropout ---------------------------------------------------------------------------------------------------


@every_backend
def test_dropout_is_a_function_of_its_key(backend):
    q, k, v = qkv()

    def dropped(seed: int, rate: float = 0.5):
        key = jax.random.key(seed)
        return np.asarray(attention(q, k, v, NOPE, dropout_rate=rate, dropout_key=key, backend=backend))

    np.testing.assert_array_equal(dropped(0, rate=0.0), attention(q, k, v, NOPE, backend=backend))
    if refuses(backend, "dropout", lambda: dropped(0)):
        return
    np.testing.assert_array_equal(dropped(0), dropped(0))
    assert not np.array_equal(dropped(0), dropped(1))


@every_backend
def test_dropout_keeps_the_mean_and_drops_its_share(backend):
    """With one-hot values a query's output is its row of weights: each is 0 or w / (1 - rate)."""
    rate, runs, length = 0.3, 2000, 6
    q, k = normal(0, 1, length, 1, length), normal(1, 1, length, 1, length)
    v = np.eye(length, dtype=np.float32).reshape(1, length, 1, length)
    weights = np.asarray(attention(q, k, v, NOPE, causal=False, backend=backend))

    def dropped(key):
        return attention(q, k, v, NOPE, causal=False, dropout_rate=rate, dropout_key=key, backend=backend)

    if refuses(backend, "dropout", lambda: dropped(jax.random.key(0))):
        return
    out = np.asarray(jax.jit(jax.vmap(dropped))(jax.random.split(jax.random.key(0), runs)))
    kept = out != 0
    np.testing.assert_allclose(out, np.where(kept, weights / (1 - rate), 0), rtol=1e-5)
    # A share of `runs` throws has a standard deviation of sqrt(rate (1 - rate) / runs) = 0.0102; 36 shares, 5 of them.
    np.testing.assert_allclose(kept.mean(axis=0), 1 - rate, rtol=0, atol=5 * np.sqrt(rate * (1 - rate) / runs))
    deviation = np.sqrt(rate / (1 - rate) / runs) * weights
    assert (np.abs(out.mean(axis=0) - weights) <= 5 * deviation).all()


# --- What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((B, T, D), (B, T, H, D), (B, T, H, D)), r"takes \[batch, length, heads, head_dim\]: query \(2, 8, 8\)"),
        (((B, T, H, D), (B, T, H, D), (B, T, H, 4)), r"key and value be of one shape: .*value \(2, 8, 4, 4\)"),
        (((B, T, H, D), (B, T, H, 4), (B, T, H, 4)), r"batch and head_dim must agree"),
        (((B, T, H, D), (3, T, H, D), (3, T, H, D)), r"batch and head_dim must agree"),
        (((B, T, H, D), (B, T, 3, D), (B, T, 3, D)), r"key heads must divide query heads: .*key \(2, 8, 3, 8\)"),
        (((B, T, 2, D), (B, T, H, D), (B, T, H, D)), r"key heads must divide query heads"),
        (((0, T, H, D), (0, T, H, D), (0, T, H, D)), r"takes at least one of batch, .*: query \(0, 8, 4, 8\)"),
        (((B, 0, H, D), (B, T, H, D), (B, T, H, D)), r"takes at least one of .* queries.*: query \(2, 0, 4, 8\)"),
        (((B, T, H, D), (B, 0, H, D), (B, 0, H, D)), r"takes at least one of .* keys.*key \(2, 0, 4, 8\)"),
        (((B, T, H, D), (B, T, 0, D), (B, T, 0, D)), r"takes at least one of .* heads.*key \(2, 8, 0, 8\)"),
        (((B, 1, H, D), (B, T, H, D), (B, T, H, D)), r"1 queries and 8 keys .*give query_positions and key_positions"),
    ],
)
def test_shapes_refused(shapes, message):
    with pytest.raises(UserError, match=message):
        attention(*(jnp.ones(shape) for shape in shapes), NOPE)


def untrained_terms(method) -> Terms:
    """With parameters of 0, which compile nothing."""
    return method.terms(
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(method.init, jax.random.key(0)))
    )


GRIDS = {heads: {"scales": np.ones((heads, D)), "shifts": np.zeros((heads, D))} for heads in (2, 8)}


@every_backend
@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("name", ["alibi", "wavelet", "transformer_xl"])
def test_a_method_made_for_other_heads_is_refused(name, heads, backend):
    """By a bias, relative keys and fixed biases. With 2 key heads some would broadcast, to wrong results."""
    method = make(name, num_heads=heads, head_dim=D, **(GRIDS[heads] if name == "wavelet" else {}))
    with pytest.raises(
        UserError, match=f"^the position method was made for num_heads={heads}, the queries have {H}(: .*)?$"
    ):
        attention(*qkv(kv_heads=2), untrained_terms(method), backend=backend)


@every_backend
@pytest.mark.parametrize("name", ["wavelet", "shaw", "transformer_xl"])
def test_a_method_made_for_another_head_size_is_refused(name, backend):
    method = make(name, num_heads=H, head_dim=2 * D)
    with pytest.raises(UserError, match=f"^the position method was made for head_dim={2 * D}, the queries have {D}$"):
        attention(*qkv(), untrained_terms(method), backend=backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backend": "referense"},
            r"unknown attention backend 'referense': did you mean 'reference'\? allowed are auto,",
        ),
        ({"backend": "flash"}, r"unknown attention backend 'flash': allowed are auto, reference"),
        ({"dropout_rate": 0.1}, r"attention dropout needs a dropout_key"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be at least 0 and below 1, not 1.0"),
        ({"dropout_rate": -0.1}, r"dropout_rate must be at least 0"),
        ({"window": 0}, r"window must be an integer of at least 1 .*, not 0"),
        ({"window": 2.5}, r"window must be an integer .*, not 2.5"),
        ({"window": "3"}, r"window must be an integer .*, not '3'"),
        ({"window": True}, r"window must be an integer .*, not True"),
        ({"query_positions": np.arange(3)}, r"query_positions must be integers of shape \(8,\) or \(2, 8\), .*\(3,\)"),
        (
            {"query_positions": np.zeros((1, 1), int)},
            r"query_positions must be integers .* not int64 of shape \(1, 1\)",
        ),
        ({"query_positions": 0.5}, r"query_positions must be integers .* or one integer, the first of .*, not 0.5"),
        ({"key_positions": np.zeros((3, T), int)}, r"key_positions must be .* not int.* of shape \(3, 8\)"),
        ({"key_positions": np.arange(8.0)}, r"key_positions must be integers .*not float64 of shape \(8,\)"),
        ({"query_positions": [0, 1]}, r"query_positions must be integers .*, not \[0, 1\]"),
        ({"query_positions": True}, r"query_positions must be integers .*, not True"),
        ({"query_positions": 2**32}, r"query_positions must be integers from -2\^31 to .* not 4294967296"),
        ({"query_positions": 2**70}, r"query_positions must be integers from -2\^31 to .* not 11805"),
        ({"query_positions": np.arange(T) + 2**31}, r"query_positions must be integers .* \(int32\), not 2147483648"),
        (
            {"key_positions": np.arange(2**32 - T, 2**32, dtype=np.uint32)},
            r"key_positions must be .* \(int32\), not 42949",
        ),
        (
            {"query_positions": 2**31 - T + 1},
            r"query_positions of 8 tokens from 2147483641 on must be .*, not 2147483648",
        ),
        ({"query_positions": 2**31 - T, "key_positions": -8}, r"distances \(query_positions - .*, not 2147483655"),
        ({"query_positions": -(2**31), "key_positions": np.arange(T) * 2}, r"distances .*, not -2147483662"),
        ({"segment_ids": np.full((B, T), 2**32)}, r"segment_ids must be integers from -2\^31 to .*, not 4294967296"),
        (
            {"segment_ids": [[0] * T] * B},
            r"segment_ids must be an array of integers, one array or a pair .*, not a list",
        ),
        ({"segment_ids": np.zeros((B, T))}, r"segment_ids must be integers, not float64"),
        ({"segment_ids": np.zeros((B, T), bool)}, r"segment_ids must be integers, not bool"),
        ({"segment_ids": (np.zeros((B, T), int),) * 3}, r"segment_ids must be .*, not \(2, 8\) and \(2, 8\) and"),
        ({"mask": [True] * T}, r"mask must be an array, not a list|mask must be an array, not \[True"),
        ({"dropout_rate": "0.1"}, r"dropout_rate must be a number from 0 to below 1, not '0.1'"),
        ({"dropout_rate": float("nan")}, r"dropout_rate must be at least 0 and below 1, not nan"),
        ({"dropout_rate": 0.1, "dropout_key": 0}, r"dropout_key must be one key, such as jax.random.key\(0\), not 0"),
        ({"far_tolerance": float("nan")}, r"far_tolerance must be a number above 0, not nan"),
        ({"far_tolerance": True}, r"far_tolerance must be a number above 0, not True"),
        ({"window": jnp.ones(3, int)}, r"window must be an integer .*, not int32 of shape \(3,\)"),
        ({"mask": np.ones((T, T))}, r"mask must be bool .* = \(2, 4, 8, 8\), not float64 of shape \(8, 8\)"),
        ({"mask": np.ones((B, T), bool)}, r"mask must be bool .*, not bool of shape \(2, 8\)"),
        ({"mask": np.ones((1, B, H, T, T), bool)}, r"mask must be bool .*, not bool of shape \(1, 2, 4, 8, 8\)"),
        ({"segment_ids": np.zeros(T, int)}, r"segment_ids must be \[B, T\] = \(2, 8\) .*not \(8,\) and \(8,\)"),
        ({"segment_ids": (np.zeros((B, T), int), np.zeros((B, 3), int))}, r"segment_ids must be .*\(2, 3\)"),
    ],
)
def test_options_refused(options, message):
    with pytest.raises(UserError, match=message):
        attention(*qkv(), NOPE, **options)


def test_segments_of_other_queries_than_keys_need_a_pair():
    places = {"query_positions": np.arange(3), "key_positions": np.arange(T)}
    with pytest.raises(UserError, match=r"segment_ids must be \[B, T\] = \(2, 3\) with T = S, or a pair"):
        attention(*qkv(length=3, keys=T), NOPE, segment_ids=np.zeros((B, 3), int), **places)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (make("rope", num_heads=H, head_dim=D), r"not the method itself: give RoPE's .terms\(params\)"),
        (None, r"attention takes Terms, which method.terms\(params\) makes, not None"),
        ("wavelet", r"attention takes Terms, .*, not 'wavelet'"),
    ],
)
def test_what_is_not_terms_is_refused(terms, message):
    with pytest.raises(UserError, match=message):
        attention(*qkv(), terms)


@pytest.mark.parametrize("name", METHODS)
def test_heads_first_arrays_are_refused(name):
    """[B, H, T, D]: attention over heads would be a plausible array."""
    terms = untrained_terms(make(name, num_heads=H, head_dim=D)).without_embedding()
    assert (terms.num_heads, terms.head_dim) == (H, D)
    heads_first = [np.swapaxes(x, 1, 2) for x in qkv()]
    said = f"^the position method was made for num_heads={H}, the queries have {T}: .* not heads first$"
    with pytest.raises(UserError, match=said):
        attention(*heads_first, terms)
    attention(*heads_first, Terms())  # which say nothing of heads


@pytest.mark.parametrize("name", ["sinusoidal", "learned"])
def test_terms_that_add_to_the_embedding_are_refused(name):
    terms = untrained_terms(make(name, num_heads=H, head_dim=D))
    with pytest.raises(UserError, match=r"add terms.embed\(positions\) there, .* terms.without_embedding\(\)$"):
        attention(*qkv(), terms)
    out = attention(*qkv(), terms.without_embedding())
    np.testing.assert_array_equal(out, attention(*qkv(), NOPE))


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("dtype", [np.int8, np.int32, bool, np.complex64, jnp.float8_e4m3fn, object])
def test_dtypes_refused(dtype, which):
    arrays = dict(zip(("query", "key", "value"), qkv(), strict=True))
    arrays[which] = arrays[which].astype(dtype)
    said = f"attention takes float32, bfloat16 or float16, and {which} is {np.dtype(dtype)}: cast it"
    with pytest.raises(UserError, match=said):
        attention(*arrays.values(), NOPE)


def test_float64_is_refused_where_there_is_any():
    arrays = [np.float64(x) for x in qkv()]
    assert attention(*arrays, NOPE).dtype == np.float32  # as in any function of JAX
    with jax.enable_x64(True), pytest.raises(UserError, match="and query is float64: cast it"):
        attention(*arrays, NOPE)


@every_backend
@pytest.mark.parametrize("query_dtype", ["float32", "bfloat16"])
def test_mixed_dtypes(query_dtype, backend):
    """A cache in another dtype than the queries: the value's dtype comes out, rounded as that is."""
    q, k, v = qkv()
    key_dtype = {"float32": "bfloat16", "bfloat16": "float32"}[query_dtype]
    q, k, v = (x.astype(jnp.dtype(dtype)) for x, dtype in ((q, query_dtype), (k, key_dtype), (v, "float16")))
    out = attend(q, k, v, wavelet_terms(), backend=backend, far_tolerance=1e-6)
    assert out.dtype == np.float16
    exact = oracle.attention(*(np.float64(x) for x in (q, k, v)), "wavelet", {"num_scales": 4})
    # Far coordinates and weights are rounded like the bfloat16 operands beside them.
    np.testing.assert_allclose(np.float64(out), exact, rtol=0, atol=2 * 2.0**-8)


@pytest.mark.parametrize("arrays", [[1.0], None, "q"])
def test_what_is_not_an_array_is_refused(arrays):
    with pytest.raises(UserError, match=r"^attention's query must be an array, not "):
        attention(arrays, *qkv()[1:], NOPE)
    with pytest.raises(UserError, match=r"^attention's value must be an array, not "):
        attention(*qkv()[:2], arrays, NOPE)


def test_a_traced_dropout_rate_is_refused():
    def dropped(rate):
        return attention(*qkv(), NOPE, dropout_rate=rate, dropout_key=jax.random.key(0))

    with pytest.raises(UserError, match=r"dropout_rate must be a number .*, known while tracing, not a traced"):
        jax.jit(dropped)(0.1)
    np.testing.assert_array_equal(dropped(np.float32(0.5)), dropped(jnp.float32(0.5)))


@every_backend
def test_an_exported_program_of_any_batch(backend):
    """The batch may be symbolic; lengths are refused but by the definition."""
    terms = make("rope", num_heads=H, head_dim=D).terms({})

    def exported(shape: str):
        spec = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
        return jax.export.export(jax.jit(lambda x: attention(x, x, x, terms, backend=backend)))(spec)

    x = qkv()[0]
    out = exported(f"b, {T}, {H}, {D}").call(x)
    np.testing.assert_allclose(out, attend(x, x, x, terms, backend=backend), rtol=0, atol=OUTPUT)
    if backend == "reference":
        exported(f"{B}, t, {H}, {D}")
    else:
        with pytest.raises(UserError, match=r"lengths t and t are symbolic, .* name backend='reference'"):
            exported(f"{B}, t, {H}, {D}")


def test_derivatives_that_tiles_do_not_have_are_refused():
    q, k, v = qkv()

    def total(q):
        return jnp.sum(jnp.sin(attention(q, k, v, wavelet_terms(), backend="tiled")))

    said = "the backends of tiles have first derivatives in reverse mode, .* name backend='reference' or 'decode'"
    with pytest.raises(UserError, match=said):
        jax.jvp(total, (q,), (q,))
    with pytest.raises(UserError, match=said):
        jax.grad(lambda q: jax.jvp(total, (q,), (q,))[1])(q)
    with pytest.raises(UserError, match=said):
        jax.grad(lambda q: jnp.sum(jax.grad(total)(q)))(q)
