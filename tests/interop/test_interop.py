"""Both `PositionAttention`s inside Flax's own attention modules, held to the oracle and to Flax's own attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.extend.core import jaxprs_in_params
from support import oracle, tolerances
from support.arrays import normal
from support.calls import EVERYWHERE
from support.compilation import quick_jit

import wavelet_jax.interop.linen
import wavelet_jax.interop.nnx
from wavelet_jax.errors import UserError
from wavelet_jax.positions import make

B, T, H, D = 2, 7, 2, 8
E = 12  # features of the module's input
# As much again as attention's for the module's own projections of sums of 12 and 16 products.
OUTPUT = 2 * tolerances.OUTPUT

CASES = {
    "nope": ("nope", {}),
    "wavelet": ("wavelet", {}),
    "wavelet-trainable": ("wavelet", {"trainable": True, "num_scales": 4}),
    "rope": ("rope", {"theta": 100.0}),
    "alibi": ("alibi", {}),
    "t5": ("t5", {"num_buckets": 8, "max_distance": 6}),
    "shaw-values": ("shaw", {"clip_distance": 3, "values": True}),
    "transformer_xl": ("transformer_xl", {}),
}
LEARNS = ("wavelet-trainable", "t5", "shaw-values", "transformer_xl")
FLAXES = ("nnx", "linen")
every_case = pytest.mark.parametrize("case", CASES)
every_flax = pytest.mark.parametrize("flax", FLAXES)
every_backend = pytest.mark.parametrize("backend", EVERYWHERE)


X = normal(0, B, T, E)
# Row 0 has two tokens of padding before its text, row 1 one after.
PADDING = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]], bool).reshape(B, 1, 1, T)
CAUSAL = np.tril(np.ones((1, 1, T, T), bool))
# Of every row of the output, those whose query sees a key: Flax's own attention gives the others a mean of all values.
SEES = np.any(CAUSAL & PADDING, axis=-1)[:, 0, :, None]
WEIGHTS = {name: normal(i, E, H, D) / E**0.5 for i, name in enumerate(("query", "key", "value"), start=1)}
WEIGHTS["out"] = normal(4, H, D, E) / (H * D) ** 0.5


def method_of(case: str):
    name, options = CASES[case]
    return make(name, num_heads=H, head_dim=D, **options)


@functools.cache
def position_params(case: str) -> dict[str, np.ndarray]:
    """Parameters far from their small starting values, so that a mistake in any of them shows."""
    params = method_of(case).init(jax.random.key(0))
    return {name: np.asarray(param) + normal(i, *param.shape) / 2 for i, (name, param) in enumerate(params.items())}


def nnx_module(position=None, *, causal=False, backend="auto", **options) -> nnx.MultiHeadAttention:
    """Flax's module with our weights; with Flax's own attention where no case of a position is given."""
    kind, attention_fn = wavelet_jax.interop.nnx.PositionAttention, {}
    if position is not None:
        fn = kind(method_of(position), causal=causal, backend=backend, rngs=nnx.Rngs(0))
        attention_fn = {"attention_fn": fn}
    module = nnx.MultiHeadAttention(
        H, E, **{"qkv_features": H * D, "decode": False, "rngs": nnx.Rngs(0)} | attention_fn | options
    )
    for name, weight in WEIGHTS.items():
        getattr(module, name).kernel[...] = weight
    for name, param in (position_params(position) if position else {}).items():
        fn.position[name][...] = param
    return module


def linen_module(position=None, *, causal=False, backend="auto", **options):
    """The same in Linen: the module, and its parameters."""
    kind, attention_fn = wavelet_jax.interop.linen.PositionAttention, {}
    if position is not None:
        attention_fn = {"attention_fn": kind(method_of(position), causal=causal, backend=backend)}
    module = linen.MultiHeadDotProductAttention(num_heads=H, qkv_features=H * D, **attention_fn, **options)
    biases = {"query": (H, D), "key": (H, D), "value": (H, D), "out": (E,)}
    params = {name: {"kernel": weight, "bias": np.zeros(biases[name])} for name, weight in WEIGHTS.items()}
    if position in LEARNS:
        params["attention_fn"] = {"position": position_params(position)}
    return module, params


def layer(flax: str, position=None, **options):
    """A function (parameters, x, **call options) of the module, and the parameters."""
    if flax == "linen":
        module, params = linen_module(position, **options)
        return lambda params, x, **call: module.apply({"params": params}, x, **call), params
    graph, params = nnx.split(nnx_module(position, **options))
    return lambda params, x, **call: nnx.merge(graph, params)(x, **call), params


def run(flax: str, position=None, x=X, *, causal=False, backend="auto", module=None, **call) -> np.ndarray:
    function, params = layer(flax, position, causal=causal, backend=backend, **(module or {}))
    arrays = {name: value for name, value in call.items() if hasattr(value, "shape")}
    fixed = {name: value for name, value in call.items() if name not in arrays}
    return np.asarray(quick_jit(lambda params, x, arrays: function(params, x, **arrays, **fixed))(params, x, arrays))


def slow(case: str, x=X, **options) -> np.ndarray:
    """The same module by the oracle's loops, in float64."""
    query, key, value = (np.einsum("bte,ehd->bthd", x, np.float64(WEIGHTS[n])) for n in ("query", "key", "value"))
    name, method_options = CASES[case]
    h = oracle.attention(query, key, value, name, method_options, position_params(case), **options)
    return np.einsum("bthd,hde->bte", h, np.float64(WEIGHTS["out"]))


def close(actual, expected, tolerance=OUTPUT):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


# --- A whole sequence ------------------------------------------------------------------------------------------


@every_flax
@every_case
def test_equals_the_oracle(case, flax):
    mask = np.broadcast_to(PADDING, (B, H, T, T))
    close(run(flax, case, causal=True, mask=PADDING), slow(case, mask=mask))
    close(run(flax, case), slow(case, causal=False))


@every_flax
@every_backend
def test_every_backend_through_the_module(backend, flax):
    mask = np.broadcast_to(PADDING, (B, H, T, T))
    close(run(flax, "wavelet", causal=True, mask=PADDING, backend=backend), slow("wavelet", mask=mask))


@every_flax
def test_any_mask_by_reference(flax):
    mask = np.random.default_rng(5).random((B, H, T, T)) < 0.7
    # Flax makes masks of float32; so is this one.
    close(run(flax, "wavelet", backend="reference", mask=np.float32(mask)), slow("wavelet", causal=False, mask=mask))


@every_flax
def test_no_positions_is_flax_own(flax):
    close(run(flax, "nope"), run(flax))
    close(run(flax, "nope", causal=True), run(flax, mask=CAUSAL))
    close(run(flax, "nope", mask=PADDING), run(flax, mask=PADDING))
    both = linen.combine_masks(CAUSAL, PADDING)
    close(run(flax, "nope", causal=True, mask=PADDING) * SEES, run(flax, mask=both) * SEES)
    close(run(flax, "nope", backend="reference", mask=both) * SEES, run(flax, mask=both) * SEES)


def test_nnx_is_causal():
    close(run("nnx", "nope", is_causal=True), run("nnx", is_causal=True))
    np.testing.assert_array_equal(run("nnx", "t5", is_causal=True), run("nnx", "t5", causal=True))


@every_flax
@pytest.mark.parametrize("batch", [(), (1,), (2, 1), (2, 3)])
def test_batch_axes(batch, flax):
    """As many as there are, and masks that share some of them."""
    x, mask = normal(6, *batch, T, E), PADDING[0]
    out = run(flax, "nope", x, causal=True, mask=mask)
    assert out.shape == x.shape
    own = run(flax, x=x, mask=np.broadcast_to(CAUSAL[0] & mask, (*batch, 1, T, T)))
    close(out * SEES[0], own * SEES[0])
    rows = np.reshape(x, (-1, T, E))
    mask = np.random.default_rng(0).random((len(rows), 1, 1, T)) < 0.8
    close(
        run(flax, "alibi", x, mask=mask.reshape(*batch, 1, 1, T)).reshape(rows.shape),
        run(flax, "alibi", rows, mask=mask),
    )


@every_flax
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_the_module_dtype(dtype, flax):
    """The module's dtype comes out, and float32 where it has none; numbers as near to float64 as Flax's own are."""
    out, own = (run(flax, case, module={"dtype": dtype}) for case in ("nope", None))
    assert out.dtype == own.dtype == (dtype or np.float32)
    exact = slow("nope", causal=False)
    error, own_error = (np.abs(np.float64(each) - exact).max() for each in (out, own))
    # Both round queries, keys, values and output; ours no scores. Rounding of the output alone is half a step.
    assert error <= own_error + float(jnp.finfo(out.dtype).eps) / 2 * np.abs(exact).max()


def test_nnx_grouped_query_heads():
    """K key heads for H query heads, in both."""
    options = {"num_kv_heads": 1, "rngs": nnx.Rngs(1), "decode": False, "qkv_features": H * D}
    own = nnx.MultiHeadAttention(H, E, **options)
    fn = wavelet_jax.interop.nnx.PositionAttention(method_of("nope"))
    module = nnx.MultiHeadAttention(H, E, attention_fn=fn, **options)
    nnx.update(module, nnx.state(own, nnx.Param))
    close(quick_jit(lambda module: module(X))(module), quick_jit(lambda module: module(X))(own))


@every_flax
def test_flax_dropout_is_ours(flax):
    """The same key drops the same weights, each by itself."""
    options = {"dropout_rate": 0.4, "broadcast_dropout": False, "deterministic": False}

    def dropped(case, seed):
        key = {"rngs": nnx.Rngs(dropout=seed)} if flax == "nnx" else {"rngs": {"dropout": jax.random.key(seed)}}
        function, params = layer(flax, case, backend="reference", **options)
        return quick_jit(function)(params, X, **key)

    ours, own, other = dropped("nope", 0), dropped(None, 0), dropped("nope", 1)
    close(ours, own)
    assert np.abs(ours - other).max() > 0.1
    # Without a rate, or where it does not act, every backend will do.
    close(run(flax, "nope", module={"dropout_rate": 0.4, "deterministic": True}), run(flax))


# --- A mask that is lost ---------------------------------------------------------------------------------------


@every_flax
@every_backend
def test_masks_are_not_lost(backend, flax):
    """The gradient by a token says who saw it: none by padding or by what follows, some by all the rest."""
    function, params = layer(flax, "rope", causal=True, backend=backend)
    # One number a query, of random weights: a plain sum may cancel.
    numbers = quick_jit(jax.jacrev(lambda x: jnp.einsum("bte,e->bt", function(params, x, mask=PADDING), normal(9, E))))
    sensitivity = np.abs(np.asarray(numbers(X))).max(axis=-1)  # [B, T, B, S]: of query t to token s
    seen = np.einsum("btbs->bts", sensitivity) > 0
    np.testing.assert_array_equal(seen, (CAUSAL & PADDING)[:, 0] | (np.eye(T, dtype=bool) & SEES))
    assert (sensitivity[0, :, 1] == 0).all()
    assert (sensitivity[1, :, 0] == 0).all()


# --- Decoding --------------------------------------------------------------------------------------------------


def decoded(flax: str, case: str | None, mask=None, room: int = T, backend="auto") -> np.ndarray:
    """[B, T, E]: token by token through the module's cache of `room` slots; mask [B, 1, 1, room]."""
    call, options = {} if mask is None else {"mask": mask}, {"causal": True, "backend": backend, "decode": True}
    if flax == "nnx":
        state = nnx_module(case, **options)
        state.init_cache((B, room, E))

        def step(module, x):
            return module(x, **call), module
    else:
        module, params = linen_module(case, **options)
        state = quick_jit(module.init)(jax.random.key(0), jnp.zeros((B, room, E)))["cache"]

        def step(cache, x):
            out, changed = module.apply({"params": params, "cache": cache}, x, mutable=["cache"], **call)
            return out, changed["cache"]

    step, outs = quick_jit(step), []
    for t in range(T):
        out, state = step(state, X[:, t : t + 1])
        outs.append(out)
    return np.concatenate(outs, axis=1)


@every_flax
@every_case
def test_decoding_equals_the_whole_sequence(case, flax):
    """In a cache with room to spare: the query's position is the cache's index."""
    close(decoded(flax, case, room=T + 3), slow(case))


@every_flax
@every_backend
def test_decoding_with_padding(backend, flax):
    """Row 1 decodes a token that it does not see itself: its position is that of the other row all the same."""
    mask = np.broadcast_to(PADDING, (B, H, T, T))
    close(decoded(flax, "wavelet", mask=PADDING, backend=backend), slow("wavelet", mask=mask))


@every_flax
def test_decoding_without_positions_is_flax_own(flax):
    close(decoded(flax, "nope"), decoded(flax, None))


def test_input_positions():
    """Newer modules pass them on: gaps and rows of their own by "reference", a cache's index by any backend."""
    q, k, v = (normal(i, B, T, H, D) for i in range(3))
    positions = np.array([[0, 1, 2, 5, 6, 7, 9], [3, 4, 5, 6, 7, 8, 20]])
    kind = functools.partial(wavelet_jax.interop.nnx.PositionAttention, method_of("wavelet"), causal=True)
    out = quick_jit(kind(backend="reference"))(q, k, v, input_positions=positions)
    expected = oracle.attention(q, k, v, "wavelet", query_positions=positions, key_positions=positions)
    close(out, expected)
    with pytest.raises(UserError, match="input_positions that are traced may have gaps"):
        jax.jit(lambda p: kind()(q, k, v, input_positions=p))(positions)
    # Known while tracing to be consecutive: linear memory; "tiled" would refuse them otherwise.
    for positions in (np.tile(3 + np.arange(T), (B, 1)), jnp.arange(T) + 3):
        fn = kind(backend="tiled")
        out = quick_jit(lambda q, k, v, fn=fn, p=positions: fn(q, k, v, input_positions=p))(q, k, v)
        close(out, oracle.attention(q, k, v, "wavelet"))
    for shared in (np.array([4]), np.array([[4]])):  # traced; "decode" takes consecutive ones only
        one = quick_jit(kind(backend="decode"))(q[:, 4:5], k, v, input_positions=shared)
        close(one, oracle.attention(q, k, v, "wavelet")[:, 4:5])
    last = quick_jit(kind())(q[:, 4:5], k, v, input_positions=np.array([[4], [4]]))
    close(last, oracle.attention(q, k, v, "wavelet")[:, 4:5])


# --- What is learned -------------------------------------------------------------------------------------------


@every_flax
@pytest.mark.parametrize("case", LEARNS)
def test_gradients_reach_what_is_learned(case, flax):
    """By central differences of the oracle, along one random direction a parameter."""
    function, params = layer(flax, case, causal=True)
    weights = normal(8, B, T, E)
    gradient = quick_jit(jax.grad(lambda params: jnp.sum(weights * function(params, X))))(params)
    found = gradient["attention_fn"]["position"]
    start = position_params(case)
    assert set(found) == set(start)
    for i, (name, param) in enumerate(start.items()):
        direction, step = np.float64(normal(i, *param.shape)), 1e-4

        def loss(by, name=name, direction=direction):
            moved = start | {name: np.float64(start[name]) + by * direction}
            query, key, value = (np.einsum("bte,ehd->bthd", X, WEIGHTS[n]) for n in ("query", "key", "value"))
            h = oracle.attention(query, key, value, *CASES[case], moved)
            return np.sum(weights * np.einsum("bthd,hde->bte", h, np.float64(WEIGHTS["out"])))

        slope = (loss(step) - loss(-step)) / (2 * step)
        assert abs(slope) > 1e-3, f"{name} does nothing here"
        leaf = found[name].get_value() if isinstance(found[name], nnx.Variable) else found[name]
        # float32 sums of B T E numbers, beside central differences wrong by step^2 of the third derivative.
        np.testing.assert_allclose(np.vdot(np.float64(leaf), direction), slope, rtol=1e-3, atol=1e-4)


def test_one_instance_is_one_set_of_parameters():
    """Shared by two layers, as T5's bias is; each with its own, two sets."""
    method = method_of("t5")

    class Nnx(nnx.Module):
        def __init__(self, shared: bool):
            rngs = nnx.Rngs(0)
            fns = [wavelet_jax.interop.nnx.PositionAttention(method, rngs=rngs) for _ in range(2)]
            fns = fns[:1] * 2 if shared else fns
            self.layers = nnx.List(
                [nnx.MultiHeadAttention(H, E, qkv_features=H * D, attention_fn=fn, rngs=rngs) for fn in fns]
            )

    class Linen(linen.Module):
        shared: bool

        @linen.compact
        def __call__(self, x):
            fns = [wavelet_jax.interop.linen.PositionAttention(method) for _ in range(1 if self.shared else 2)]
            for fn in fns * (2 if self.shared else 1):
                x = linen.MultiHeadDotProductAttention(num_heads=H, qkv_features=H * D, attention_fn=fn)(x)
            return x

    for shared, sets in ((True, 1), (False, 2)):
        shape = method.init(jax.random.key(0))["bias"].shape
        found = jax.tree.leaves(nnx.state(Nnx(shared), nnx.Param))
        assert sum(leaf.shape == shape for leaf in found) == sets
        found = jax.tree.leaves(jax.eval_shape(Linen(shared).init, jax.random.key(0), X))
        assert sum(leaf.shape == shape for leaf in found) == sets


def test_linen_draws_the_method_own_start():
    """Finite and of the method's scale; the module's seed decides."""
    kind = wavelet_jax.interop.linen.PositionAttention
    module = linen.MultiHeadDotProductAttention(num_heads=H, qkv_features=H * D, attention_fn=kind(method_of("t5")))
    drawn = [module.init(jax.random.key(i), X)["params"]["attention_fn"]["position"]["bias"] for i in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert 0.01 < np.std(drawn[0]) < 0.04  # 16 draws of N(0, 0.02)


# --- Memory ----------------------------------------------------------------------------------------------------


@every_flax
def test_causality_and_padding_make_nothing_quadratic(flax):
    """No array of the program has the length twice."""
    length = 1024
    x, mask = jnp.zeros((1, length, E)), np.ones((1, 1, 1, length), bool)

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.shape for variable in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from shapes(inner)

    def quadratic(backend):
        function, params = layer(flax, "wavelet", causal=True, backend=backend)
        jaxpr = jax.make_jaxpr(lambda x, mask: function(params, x, mask=mask))(x, mask).jaxpr
        return [shape for shape in shapes(jaxpr) if sum(size >= length for size in shape) > 1]

    assert not quadratic("auto")
    assert quadratic("reference")


# --- What is refused -------------------------------------------------------------------------------------------


@every_flax
@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {"mask": CAUSAL}, r"a mask that differs by head or query .* give PositionAttention backend='reference'"),
        ({"backend": "tiled"}, {"mask": CAUSAL}, r"a mask that differs by head or query"),
        ({}, {"mask": np.ones((3, 1, 1, T))}, r"of shape \(3, 1, 1, 7\) do not go with queries of batch \(2,\)"),
        ({}, {"mask": np.ones((B, 1, 1, 3))}, r"mask must be bool .*, not bool of shape \(2, 1, 1, 3\)"),
        (
            {},
            {"inputs_k": X[:, :3]},
            r"positions of 7 queries and 3 keys cannot be inferred.* cross-attention needs Flax's own",
        ),
        (
            {"causal": True},
            {"inputs_k": X[:, :3], "mask": PADDING[..., :3]},
            "positions of 7 queries and 3 keys cannot be inferred",
        ),
        ({}, {"sow_weights": True}, r"sow_weights: attention with positions does not keep"),
        ({"backend": "tilde"}, {}, r"unknown attention backend 'tilde': did you mean 'tiled'\?"),
    ],
)
def test_calls_refused(options, call, message, flax):
    function, params = layer(flax, "wavelet", **options)
    with pytest.raises(UserError, match=message):
        function(params, X, **call)


@every_flax
def test_one_query_of_many_keys_is_no_decoding_unless_causal(flax):
    function, params = layer(flax, "wavelet")
    with pytest.raises(UserError, match=r"1 queries and 7 keys .* needs PositionAttention\(.., causal=True\)"):
        function(params, X[:, :1], inputs_k=X, mask=PADDING)


@every_flax
@pytest.mark.parametrize(
    ("backend", "broadcast", "message"),
    [
        ("tiled", False, "the tiled backend needs no attention dropout: use backend='auto'"),
        ("reference", True, "attention dropout is not broadcast .* broadcast_dropout=False"),
    ],
)
def test_dropout_refused(backend, broadcast, message, flax):
    options = {"dropout_rate": 0.1, "broadcast_dropout": broadcast, "deterministic": False}
    function, params = layer(flax, "nope", backend=backend, **options)
    rngs = nnx.Rngs(0) if flax == "nnx" else {"dropout": jax.random.key(0)}
    with pytest.raises(UserError, match=message):
        function(params, X, rngs=rngs)


@every_flax
def test_dropout_goes_where_attention_takes_it(flax):
    """With the default backend too, as in attention()."""
    options = {"dropout_rate": 0.5, "broadcast_dropout": False, "deterministic": False}
    rngs = nnx.Rngs(0) if flax == "nnx" else {"dropout": jax.random.key(0)}
    function, params = layer(flax, "nope", **options)
    dropped = function(params, X, rngs=rngs)
    assert np.isfinite(dropped).all()
    assert not np.allclose(dropped, run(flax, "nope"), atol=0.1)


@every_flax
@pytest.mark.parametrize("name", ["sinusoidal", "learned"])
def test_methods_that_add_to_the_embedding_refused(name, flax):
    method = make(name, num_heads=H, head_dim=D)
    said = rf"{type(method).__name__} adds its positions to the token embedding.*embed\(positions\)"
    with pytest.raises(UserError, match=said):
        initial(flax, method)


@every_flax
def test_other_heads_refused(flax):
    said = "the position method was made for head_dim=16, the queries have 8"
    with pytest.raises(UserError, match=said):
        initial(flax, make("wavelet", num_heads=H, head_dim=2 * D))


def initial(flax: str, method):
    """The first output of a module as its users make it."""
    if flax == "nnx":
        fn = wavelet_jax.interop.nnx.PositionAttention(method, rngs=nnx.Rngs(0))
        return nnx.MultiHeadAttention(H, E, H * D, attention_fn=fn, decode=False, rngs=nnx.Rngs(0))(X)
    fn = wavelet_jax.interop.linen.PositionAttention(method)
    module = linen.MultiHeadDotProductAttention(num_heads=H, qkv_features=H * D, attention_fn=fn)
    return module.init_with_output(jax.random.key(0), X)[0]


def test_parameters_without_rngs_refused():
    with pytest.raises(UserError, match=r"T5 has parameters to draw: give PositionAttention rngs=nnx.Rngs"):
        wavelet_jax.interop.nnx.PositionAttention(method_of("t5"))


def test_linen_einsum_classes_refused():
    fn = wavelet_jax.interop.linen.PositionAttention(method_of("nope"))
    einsums = {"qk_attn_weights_einsum_cls": lambda: jnp.einsum, "attn_weights_value_einsum_cls": lambda: jnp.einsum}
    module = linen.MultiHeadDotProductAttention(num_heads=H, qkv_features=H * D, attention_fn=fn, **einsums)
    with pytest.raises(UserError, match="leave the module's einsum classes out"):
        module.init(jax.random.key(0), X)
