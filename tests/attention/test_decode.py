"""Few queries over a cache: what test_conformance.py and test_attention.py do not see of the `decode` backend."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.compilation import quick_jit
from support.tolerances import FLOAT32

from wavelet_jax import positions
from wavelet_jax.attention import attention, decode, reference
from wavelet_jax.attention.call import Call
from wavelet_jax.attention.choose import MAX_DECODE_QUERIES
from wavelet_jax.errors import UserError
from wavelet_jax.positions.terms import Terms

B, H, K, D = 2, 4, 2, 16


def arrays(T: int, S: int) -> tuple:
    return normal(0, B, T, H, D), normal(1, B, S, K, D), normal(2, B, S, K, D)


GRIDS = {
    # Supports at float32's tolerance of about 11, 45 and 3,000 tokens: inside a cache of 60, part of it, and past it.
    "short": {"num_scales": 1},
    "per head": {"scales": np.exp2(np.linspace(0, 2, H * D)).reshape(H, D), "shifts": np.tile(np.arange(D), (H, 1))},
    "long": {"num_scales": 8, "first_exponent": 2},
    "haar": {"mother": "haar_standard", "num_scales": 4},  # its last value is no smaller than the others
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_band_at_every_place(grid, causal):
    """Queries before, inside and past the keys, at a traced offset: the band sticks out, or lies beyond."""
    T, S = 3, 60
    terms = positions.make("wavelet", num_heads=H, head_dim=D, **GRIDS[grid]).terms({})

    @quick_jit
    def both(query, key, value, start):
        given = {"query_positions": start, "key_positions": 0, "causal": causal}
        return tuple(attention(query, key, value, terms, backend=name, **given) for name in ("decode", "reference"))

    for start in (-100, -2, 0, 1, 30, S - T, S - 1, S + 8, 2**31 - T):
        out, expected = both(*arrays(T, S), np.int32(start))
        np.testing.assert_allclose(out, expected, rtol=0, atol=FLOAT32, err_msg=f"at {start}")


def step(method, T: int, S: int, backend: str = "auto"):
    """One compiled step of decoding over a cache of S."""
    terms = method.terms({})

    def run(query, key, value, start):
        return attention(query, key, value, terms, query_positions=start, key_positions=0, backend=backend)

    shapes = [jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32) for length, heads in ((T, 4), (S, 2), (S, 2))]
    return jax.jit(run).lower(*shapes, jax.ShapeDtypeStruct((), jnp.int32)).compile()


def costs(program) -> dict[str, float]:
    analysis = program.cost_analysis()
    return {"flops": analysis["flops"], "transcendentals": analysis.get("transcendentals", 0.0)}


@pytest.mark.parametrize("T", [1, 4])
def test_the_term_costs_the_same_at_any_context(T):
    """Arithmetic of a step with wavelets less that of one without, in a cache of 4,096 and of 65,536."""
    wavelet, nope = (positions.make(name, num_heads=4, head_dim=32) for name in ("wavelet", "nope"))
    extra = []
    for S in (4096, 65536):
        ours, without = costs(step(wavelet, T, S)), costs(step(nope, T, S))
        extra.append(ours["flops"] - without["flops"])
        # The softmax's exponentials and no others: the wavelets are numbers in the program.
        assert ours["transcendentals"] == without["transcendentals"] > 0
    # Counts are float32 numbers: those at 65,536 are rounded to a few operations.
    rounding = 2 * np.spacing(np.float32(ours["flops"]))
    assert 0 < extra[1] <= extra[0] + rounding < 1.001 * extra[0]
    assert extra[0] < 0.6 * costs(step(nope, T, 4096))["flops"]


def test_wavelets_of_any_family_are_evaluated_while_tracing():
    """A Morlet has cosines besides exponentials; and trained scales, by contrast, are evaluated in the program."""
    morlet = positions.make("wavelet", num_heads=4, head_dim=32, mother="morlet", num_scales=4)
    text = step(morlet, 1, 4096).as_text()
    assert not re.search(r"\b(cosine|sine|gather)\(", text)
    assert costs(step(morlet, 1, 4096))["transcendentals"] < 2 * 4 * 4096
    trained = positions.make("wavelet", num_heads=4, head_dim=32, trainable=True)
    params = trained.init(jax.random.key(0))

    def run(params, query, key, value, start):
        return attention(query, key, value, trained.terms(params), query_positions=start, key_positions=0)

    shapes = [
        jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32) for length, heads in ((1, 4), (512, 2), (512, 2))
    ]
    program = jax.jit(run).lower(params, *shapes, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    assert costs(program)["transcendentals"] >= 512 * 32


def test_the_cache_is_not_written_out_for_all_heads():
    """No array of S x H x D: 4 query heads share 2 key heads."""
    S = 4096
    text = step(positions.make("wavelet", num_heads=4, head_dim=32), 1, S).as_text()
    shapes = re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]+)\]", text)
    assert max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes) <= S * 2 * 32


def test_auto(monkeypatch):
    """Few queries over more keys go to `decode`; what it cannot carry, and whole short sequences, do not."""
    calls = []
    monkeypatch.setattr(decode, "attend", lambda query, *_, **__: calls.append(query.shape[1]) or query)
    terms = positions.make("nope", num_heads=H, head_dim=D).terms({})

    def attend(T: int, S: int, **options) -> None:
        given = {"query_positions": S - T, "key_positions": 0, **options}
        jax.eval_shape(lambda q, k, v: attention(q, k, v, terms, **given), *arrays(T, S))

    attend(5, 5)
    attend(MAX_DECODE_QUERIES + 1, 60)
    attend(2, 60, dropout_rate=0.5, dropout_key=jax.random.key(0))
    attend(2, 60, query_positions=np.array([40, 50]))
    attend(2, 60, backend="tiled")
    assert not calls
    attend(1, 60)
    attend(MAX_DECODE_QUERIES, 60)
    assert calls == [1, MAX_DECODE_QUERIES]


# -- no silent quadratic form ------------------------------------------------------------------------------------


def abstract(length: int, run):
    shape = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32)
    return jax.eval_shape(run, shape, shape, shape)


@pytest.mark.parametrize(
    ("options", "obstacle"),
    [
        ({"dropout_rate": 0.1, "dropout_key": np.array([0, 1], np.uint32)}, "no attention dropout"),
        ({"query_positions": np.arange(2**17) * 2, "key_positions": 0}, "consecutive positions"),
    ],
)
def test_a_long_sequence_that_only_the_definition_carries_is_refused(options, obstacle):
    """2^17 tokens: two arrays of 8 x 2^34 numbers of 4 bytes are 1,024 GiB."""
    terms = positions.make("nope", num_heads=8, head_dim=64).terms({})
    message = (
        rf"\[1, 8, 131072, 131072\].* in float32: 1,024.0 GiB, more than 25% of .* {obstacle}.*backend='reference'"
    )
    with pytest.raises(UserError, match=message):
        abstract(2**17, functools.partial(attention, terms=terms, **options))
    # The caller's own choice is honoured, and short sequences pass.
    assert abstract(2**17, functools.partial(attention, terms=terms, backend="reference", **options)).shape[1] == 2**17
    short = {name: value[:64] if name == "query_positions" else value for name, value in options.items()}
    assert abstract(64, functools.partial(attention, terms=terms, **short)).shape[1] == 64


def test_the_estimate_counts_what_the_definition_makes():
    """Against the arrays of queries x keys in the traced definition, method by method."""
    T, S = 24, 40
    for name, rows in (("nope", False), ("wavelet", False), ("shaw", True), ("t5", True), ("transformer_xl", False)):
        options = {"values": True} if name == "shaw" else {}
        method = positions.make(name, num_heads=H, head_dim=D, **options)
        terms = method.terms(method.init(jax.random.key(0)))
        positions_of = {"query_positions": jnp.zeros((B, T) if rows else (T,), jnp.int32)}
        positions_of["key_positions"] = jnp.zeros((B, S) if rows else (S,), jnp.int32)
        call = Call(terms, T, S, H, H, D, jnp.dtype("float32"), None, **positions_of)
        shapes = reference.array_shapes(call, B)
        queries, keys = normal(0, B, T, H, D), normal(1, B, S, H, D)

        def run(q, k, call=call):
            return reference.attend(q, k, k, call)

        traced = jax.make_jaxpr(run)(queries, keys)
        made = {variable.aval.shape for equation in traced.eqns for variable in equation.outvars}
        assert set(shapes) <= made, name
        assert len(shapes) == 2 + sum(
            each is not None for each in (terms.relative_keys, terms.relative_values, terms.bias)
        )


def test_terms_without_a_support_are_evaluated_in_the_program():
    """A constant table of unknown reach: right, and linear in the context."""
    vectors = jnp.asarray(normal(5, 7, D))
    terms = Terms(relative_keys=lambda distance: vectors[distance % 7])
    query, key, value = arrays(2, 50)
    given = {"query_positions": 40, "key_positions": 0}
    np.testing.assert_allclose(
        quick_jit(functools.partial(attention, terms=terms, backend="decode", **given))(query, key, value),
        attention(query, key, value, terms, backend="reference", **given),
        rtol=0,
        atol=FLOAT32,
    )
