"""Each position method against its paper's slow loop and against Hugging Face transformers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.arrays import normal

from wavelet_jax.attention import attention
from wavelet_jax.errors import UserError
from wavelet_jax.positions import METHODS, alibi, make, options, rope, t5
from wavelet_jax.positions.absolute import check_positions
from wavelet_jax.positions.terms import Terms
from wavelet_jax.wavelets import scale_shift_grid, wavelet_position

try:
    import torch
    from transformers import LlamaConfig
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotate
    from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotate
    from transformers.models.t5.modeling_t5 import T5Attention
except ImportError:  # where torch has no CPU build for this Python, and is left out
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch and transformers are not installed")

FURTHEST = 2**31 - 1
# sin and cos of an angle within 6e-7 radians (test_wavelets.py: test_angle_is_exact), with a few roundings of 2^-24.
WAVE = 8e-7


# --- make, options, and what every method promises -------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_frozen_dataclass_of_hyper_parameters(name):
    method = make(name, num_heads=2, head_dim=16)
    assert type(method) is METHODS[name]
    assert (method.num_heads, method.head_dim) == (2, 16)
    assert isinstance(method.per_layer, bool)
    assert method == make(name, num_heads=2, head_dim=16)  # and so a constant of jit
    assert hash(method) == hash(make(name, num_heads=2, head_dim=16))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.head_dim = 8


@pytest.mark.parametrize("name", METHODS)
def test_every_method_inits_float32_from_its_key(name):
    method = make(name, num_heads=2, head_dim=16)
    params = method.init(jax.random.key(0))
    again, other = method.init(jax.random.key(0)), method.init(jax.random.key(1))
    for key, param in params.items():
        assert param.dtype == jnp.float32
        np.testing.assert_array_equal(param, again[key])
        assert np.isfinite(param).all()
        assert not np.array_equal(param, other[key])
    assert bool(params) == (name in {"transformer_xl", "shaw", "t5", "learned"}) or name not in oracle.KNOWN


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_options_and_their_defaults(name):
    allowed = options(name)
    assert not {"num_heads", "head_dim", "per_layer"} & set(allowed)
    method = make(name, num_heads=2, head_dim=16, **allowed)
    assert method == make(name, num_heads=2, head_dim=16)
    with pytest.raises(UserError, match=f"unknown option of {name} 'thetta': .*allowed are "):
        make(name, num_heads=2, head_dim=16, thetta=1.0)


def test_the_methods_of_the_contract():
    assert set(METHODS) >= {
        *("wavelet", "rope", "alibi", "transformer_xl", "shaw", "t5", "sinusoidal", "learned", "nope"),
    }


def test_nope_fills_no_field():
    assert make("nope", num_heads=2, head_dim=16).terms({}) == Terms(num_heads=2, head_dim=16)


@pytest.mark.parametrize(
    ("name", "method_options", "message"),
    [
        ("wavelets", {}, r"unknown position method 'wavelets': did you mean 'wavelet'\? allowed are wavelet, rope"),
        ("rope", {"theta": "10"}, r"rope's theta must be a number, not '10'"),
        ("rope", {"theta": float("nan")}, r"rope's theta must be at least 1, not nan"),
        ("sinusoidal", {"theta": True}, r"sinusoidal's theta must be a number, not True"),
        ("wavelet", {"num_scales": 8.0}, r"wavelet's num_scales must be a whole number, not 8.0"),
        ("wavelet", {"trainable": 1}, r"wavelet's trainable must be True or False, not 1"),
        (
            "wavelet",
            {"support_tolerance": np.inf},
            r"wavelet's support_tolerance must be at least 0 and below 1, not inf",
        ),
        ("shaw", {"clip_distance": True}, r"shaw's clip_distance must be a whole number, not True"),
        ("t5", {"num_buckets": None}, r"t5's num_buckets must be a whole number, not None"),
        ("rope", {"teta": 1e4}, r"unknown option of rope 'teta': did you mean 'theta'\? allowed are theta, layout"),
        (
            "nope",
            {"theta": 1e4},
            r"theta is an option of rope, .*, not of nope, which has no options",
        ),
        ("rope", {"layout": "half"}, r"unknown RoPE layout 'half': did you mean 'half_split'\?"),
        ("rope", {"theta": 0.5}, r"theta must be at least 1, not 0.5"),
        ("wavelet", {"mother": "haar2"}, r"unknown mother wavelet 'haar2': did you mean 'haar'\?"),
        ("wavelet", {"t_sign": "n+m"}, r"unknown t_sign 'n\+m': did you mean 'n-m'\?"),
        ("wavelet", {"num_scales": 7}, r"7 scales cannot fill a head of 16 .*nearest 8"),
        ("wavelet", {"first_exponent": 125}, r"first_exponent 125 .*allowed are -60 to 120"),
        ("wavelet", {"scales": np.ones(16)}, r"scales \(16,\) and shifts \(0,\) must both be \[head_dim\] = \(16,\)"),
        ("wavelet", {"scales": np.ones(8), "shifts": np.ones(8)}, r"or \[num_heads, head_dim\] = \(2, 16\)"),
        ("wavelet", {"scales": np.ones((3, 16)), "shifts": np.ones((3, 16))}, r"scales \(3, 16\)"),
        ("wavelet", {"scales": np.zeros(16), "shifts": np.ones(16)}, r"scales must be positive and finite"),
        ("wavelet", {"scales": [1e39] * 16, "shifts": [0] * 16}, r"scales must be positive and finite.*float32"),
        ("wavelet", {"scales": np.ones(16), "shifts": np.full(16, np.nan)}, r"shifts finite"),
        ("wavelet", {"scales": [[1], [1, 2]], "shifts": [0]}, r"scales must be numbers of shape"),
        ("discrete_wavelet", {"wavelet": "db0"}, r"unknown discrete wavelet 'db0': did you mean"),
        (
            "discrete_wavelet",
            {"sampling": "fines"},
            r"unknown sampling 'fines': did you mean 'fine'\?",
        ),
        ("discrete_wavelet", {"origin": "middle"}, r"unknown origin 'middle': allowed are start, centre"),
        ("discrete_wavelet", {"t_sign": "n+m"}, r"unknown t_sign 'n\+m'"),
        ("discrete_wavelet", {"num_levels": 7}, r"7 levels cannot fill a head of 16 .*set num_levels to .*nearest 8"),
        ("discrete_wavelet", {"first_level": 0}, r"sampling 'level' has levels 1 to 12, not 0"),
        ("discrete_wavelet", {"first_level": 6}, r"sampling 'level' has levels 1 to 12, not 13"),
        ("shaw", {"clip_distance": 0}, r"clip_distance must be at least 1, not 0"),
        ("t5", {"num_buckets": 7}, r"num_buckets must be a multiple of 2, not 7"),
        ("t5", {"num_buckets": 6, "bidirectional": True}, r"num_buckets must be a multiple of 4, not 6"),
        ("t5", {"max_distance": 16}, r"max_distance 16 must be past the 16 distances"),
        ("t5", {"max_distance": 8, "bidirectional": True}, r"max_distance 8 must be past the 8 distances"),
        ("learned", {"max_positions": 0}, r"max_positions must be at least 1, not 0"),
        ("sinusoidal", {"d_model": 7}, r"d_model 7 must be even"),
        ("transformer_xl", {"d_model": 7}, r"d_model 7 must be even"),
    ],
)
def test_methods_refused(name, method_options, message):
    with pytest.raises(UserError, match=message):
        make(name, num_heads=2, head_dim=16, **method_options)


def test_rope_refuses_odd_heads():
    with pytest.raises(UserError, match="head_dim 5 must be even"):
        make("rope", num_heads=2, head_dim=5)


# --- Wavelet ---------------------------------------------------------------------------------------------------


def test_wavelet_defaults():
    """Ricker, 8 scales from 2^0, head_dim / 8 shifts, t = m - n; nothing to learn; 652 tokens of support."""
    terms = make("wavelet", num_heads=2, head_dim=128).terms({})
    distance = np.arange(-30, 60)
    slow = [oracle.wavelet_vector(int(t), *oracle.grid(128, 8)) for t in distance]
    np.testing.assert_allclose(jax.jit(terms.relative_keys)(distance), slow, rtol=0, atol=5e-7)
    assert terms.support == 652
    filled = {field.name for field in dataclasses.fields(terms) if getattr(terms, field.name) is not None}
    assert filled == {"relative_keys", "support", "num_heads", "head_dim"}


@pytest.mark.parametrize("as_type", [np.asarray, jnp.asarray, np.ndarray.tolist], ids=["numpy", "jax", "lists"])
@pytest.mark.parametrize("shape", [(8,), (3, 8)], ids=["shared", "per-head"])
def test_wavelet_takes_any_grid(shape, as_type):
    rng = np.random.default_rng(0)
    scales, shifts = rng.uniform(1, 9, shape), rng.uniform(0, 5, shape)
    method = make("wavelet", num_heads=3, head_dim=8, scales=as_type(scales), shifts=as_type(shifts), mother="gaussian")
    hash(method)
    ours = method.terms(method.init(jax.random.key(0))).relative_keys(np.arange(12))
    assert ours.shape == (*shape[:-1], 12, 8)
    for h in range(3 if len(shape) == 2 else 1):
        grid = [np.float32(each).reshape(-1, 8)[h].astype(np.float64) for each in (scales, shifts)]
        slow = [oracle.wavelet_vector(t, *grid, "gaussian") for t in range(12)]
        np.testing.assert_allclose(ours.reshape(-1, 12, 8)[h], slow, rtol=0, atol=5e-7)


def test_wavelet_trainable_starts_where_it_would_stand_fixed():
    fixed = make("wavelet", num_heads=2, head_dim=16, first_exponent=2)
    trained = make("wavelet", num_heads=2, head_dim=16, first_exponent=2, trainable=True)
    params = trained.init(jax.random.key(0))
    assert {name: param.shape for name, param in params.items()} == {"log2_scales": (16,), "shifts": (16,)}
    terms = trained.terms(params)
    assert terms.support is None  # the scales may grow
    distance = np.arange(-5, 40)
    # exp2(log2(a)) is a to a few roundings, and |x psi'(x)| <= 1.22.
    np.testing.assert_allclose(
        terms.relative_keys(distance), fixed.terms({}).relative_keys(distance), rtol=0, atol=1e-6
    )


def test_wavelet_options_reach_the_mathematics():
    """Each option alone, against the oracle."""
    scales, shifts = oracle.grid(16, 4, 3)
    cases = [
        ({"mother": "haar_standard"}, lambda t: oracle.wavelet_vector(t, *oracle.grid(16, 8), "haar_standard")),
        ({"t_sign": "n-m"}, lambda t: oracle.wavelet_vector(-t, *oracle.grid(16, 8))),
        ({"num_scales": 4, "first_exponent": 3}, lambda t: oracle.wavelet_vector(t, scales, shifts)),
    ]
    for method_options, slow in cases:
        terms = make("wavelet", num_heads=2, head_dim=16, **method_options).terms({})
        ours = terms.relative_keys(np.arange(-9, 30))
        np.testing.assert_allclose(ours, [slow(t) for t in range(-9, 30)], rtol=0, atol=5e-7)
    near = make("wavelet", num_heads=2, head_dim=16, support_tolerance=1e-2).terms({}).support
    assert near < make("wavelet", num_heads=2, head_dim=16).terms({}).support


def test_wavelet_takes_a_mother_of_ones_own():
    method = make("wavelet", num_heads=1, head_dim=8, mother=jnp.cos)
    np.testing.assert_allclose(method.terms({}).relative_keys(3), np.cos(3 / 2.0 ** np.arange(8)), rtol=0, atol=5e-7)
    assert method.terms({}).support is None


# --- Discrete wavelets -----------------------------------------------------------------------------------------


def test_discrete_wavelet_defaults():
    """db2, levels 1 .. 8, head_dim / 8 shifts, t = m - n from t = b on; nothing to learn; support 3 2^8 + 15 tokens."""
    terms = make("discrete_wavelet", num_heads=2, head_dim=128).terms({})
    distance = np.arange(-30, 60)
    slow = [oracle.discrete_vector(int(t), 128) for t in distance]
    np.testing.assert_allclose(jax.jit(terms.relative_keys)(distance), slow, rtol=0, atol=2.4e-7)
    assert terms.support == 783
    filled = {field.name for field in dataclasses.fields(terms) if getattr(terms, field.name) is not None}
    assert filled == {"relative_keys", "support", "num_heads", "head_dim"}


# --- RoPE ------------------------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rope_half_split_is_hugging_face_llama(theta):
    batch, length, heads, dim = 2, 48, 4, 32
    config = LlamaConfig(
        hidden_size=heads * dim,
        num_attention_heads=heads,
        head_dim=dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    queries, keys = normal(0, batch, length, heads, dim), normal(1, batch, length, heads, dim)
    places = np.stack([np.arange(length), np.arange(length) + 7])
    cos, sin = LlamaRotaryEmbedding(config)(torch.tensor(queries), torch.tensor(places))
    theirs = llama_rotate(torch.tensor(queries), torch.tensor(keys), cos, sin, unsqueeze_dim=2)
    terms = make("rope", num_heads=heads, head_dim=dim, theta=theta).terms({})
    # Theirs multiplies positions up to 54 with frequencies of three roundings: 54 * 4 * 2^-24 radians, on |x| < 5.
    for x, their in zip((queries, keys), theirs, strict=True):
        ours = terms.rotated(x, terms.turns_of(places))
        np.testing.assert_allclose(ours, their.numpy(), rtol=0, atol=54 * 4 * 2**-24 * 5)


@needs_torch
def test_rope_interleaved_is_hugging_face_gpt_j():
    batch, length, heads, dim = 2, 48, 4, 32
    x = normal(0, batch, length, heads, dim)
    sin, cos = torch.split(create_sinusoidal_positions(length, dim), dim // 2, dim=-1)
    theirs = gptj_rotate(torch.tensor(x), sin[None], cos[None])
    terms = make("rope", num_heads=heads, head_dim=dim, layout="interleaved").terms({})
    ours = terms.rotated(x, terms.turns_of(np.arange(length)))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=54 * 4 * 2**-24 * 5)


@needs_torch
@pytest.mark.parametrize("layout", rope.LAYOUTS)
def test_rope_at_any_position(layout):
    """Against transformers' functions with cosines in float64: as right at 2^31 - 1 as at 0."""
    places = np.array([0, 1, 2, 4097, 100_000, 2**24 + 1, FURTHEST, -5])
    heads, dim = 2, 16
    x = normal(2, 1, len(places), heads, dim)
    angles = np.outer(places, 10000.0 ** (-np.arange(0, dim, 2) / dim))
    if layout == "half_split":
        cos, sin = (torch.tensor(np.tile(f(angles), 2))[None] for f in (np.cos, np.sin))
        theirs, _ = llama_rotate(torch.tensor(x).double(), torch.tensor(x).double(), cos, sin, unsqueeze_dim=2)
    else:
        theirs = gptj_rotate(
            torch.tensor(x).double(), torch.tensor(np.sin(angles))[None], torch.tensor(np.cos(angles))[None]
        )
    computed = jax.jit(lambda x, places: rope.rotate(x, places, layout=layout))(x, places)
    constant = jax.jit(lambda x: rope.rotate(x, places, layout=layout))(x)
    # A pair turned by an angle that is wrong by 6e-7 moves by 6e-7 of its length, under 5 here.
    for ours in (computed, constant):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=WAVE * 5)


def test_rope_of_known_positions_is_one_constant(monkeypatch):
    """For queries, keys and layers together; past some size the program computes it, as for traced positions."""

    def text(layers: int) -> str:
        def program(x):
            for _ in range(layers):
                x = rope.rotate(x, np.arange(64)) + rope.rotate(x, np.arange(64))
            return jnp.sum(x)

        return jax.jit(jax.grad(program)).lower(jax.ShapeDtypeStruct((1, 64, 2, 32), jnp.float32)).as_text()

    assert text(4).count('dense<"') == text(1).count('dense<"') == 2
    assert "cosine" not in text(4)
    monkeypatch.setattr(rope, "_MOST_BYTES", 64)
    assert "cosine" in text(1)


def test_rope_layouts_by_hand():
    """Position 1 turns pair 0 by 1 radian and pair 1 by 0.01 (D = 4)."""
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    c0, s0, c1, s1 = math.cos(1), math.sin(1), math.cos(0.01), math.sin(0.01)
    half = [1 * c0 - 3 * s0, 2 * c1 - 4 * s1, 3 * c0 + 1 * s0, 4 * c1 + 2 * s1]
    interleaved = [1 * c0 - 2 * s0, 2 * c0 + 1 * s0, 3 * c1 - 4 * s1, 4 * c1 + 3 * s1]
    one = np.array([1])
    np.testing.assert_allclose(rope.rotate(x, one).ravel(), half, rtol=0, atol=WAVE * 5)
    np.testing.assert_allclose(rope.rotate(x, one, layout="interleaved").ravel(), interleaved, rtol=0, atol=WAVE * 5)


def test_rope_of_bfloat16_has_angles_of_float32():
    """bfloat16 queries at position 100,000: each number is the float64 one, rounded once."""
    x = jnp.asarray(normal(3, 1, 3, 2, 16), jnp.bfloat16)
    places = np.array([99_999, 100_000, 100_001])
    ours = rope.rotate(x, places)
    assert ours.dtype == jnp.bfloat16
    for t, h in np.ndindex(3, 2):
        slow = oracle.rope(np.asarray(x[0, t, h], np.float64), int(places[t]))
        # Half a step of bfloat16, which has 8 significant bits, is 2^-8 of a number at most.
        np.testing.assert_allclose(np.asarray(ours[0, t, h], np.float64), slow, rtol=2**-8, atol=WAVE * 5)


def test_rope_refuses_an_unknown_layout_in_the_bare_function_too():
    with pytest.raises(UserError, match=r"unknown RoPE layout 'neox': allowed are half_split, interleaved"):
        rope.rotate(jnp.ones((1, 1, 1, 4)), np.array([0]), layout="neox")


# --- ALiBi -----------------------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("num_heads", range(1, 21))
def test_alibi_slopes_are_hugging_face_bloom(num_heads):
    # Position 1 of a row of two: the slope itself.
    theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1].numpy()
    # Theirs is a float32 power of a float32 base: up to 16 times its rounding.
    np.testing.assert_allclose(alibi.slopes(num_heads), theirs, rtol=16 * 2**-23)
    np.testing.assert_allclose(alibi.slopes(num_heads), oracle.alibi_slopes(num_heads), rtol=2**-24)


def test_alibi_bias():
    """Section 4 of the paper: 1/2 .. 1/256 for 8 heads; the penalty grows on both sides."""
    bias = make("alibi", num_heads=8, head_dim=16).terms({}).bias
    distance = np.array([[0, 3, -3], [2**31 - 1, 5, 1]], np.int32)
    expected = [[[-abs(int(t)) / 2 ** (h + 1) for t in row] for row in distance] for h in range(8)]
    np.testing.assert_array_equal(bias(distance), np.float32(expected))


# --- T5 --------------------------------------------------------------------------------------------------------

T5_SHAPES = [(32, 128), (32, 512), (32, 2048), (8, 20), (8, 16), (4, 8), (16, 100), (12, 77), (64, 256), (128, 800)]
T5_SHAPES += [(320, 800), (64, 65)]


@needs_torch
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("num_buckets", "max_distance"), T5_SHAPES)
def test_t5_buckets_are_hugging_face_t5(num_buckets, max_distance, bidirectional):
    """(32, 128) both ways is T5. Theirs takes key minus query, and float32 logarithms; no edge here falls otherwise."""
    distance = np.arange(-1000, 5001)
    ours = np.asarray(t5.buckets(distance, num_buckets, max_distance, bidirectional))
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(-distance), bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (12, 77), (8, 16), (64, 4096), (16, 1000)])
def test_t5_buckets_in_whole_numbers(num_buckets, max_distance, bidirectional):
    """Against the rule in exact integers, where float32 logarithms could round an edge away."""
    distance = [*range(-200, 1100), *range(4080, 4100), FURTHEST, -FURTHEST]
    ours = t5.buckets(np.array(distance), num_buckets, max_distance, bidirectional)
    slow = [oracle.t5_bucket(t, num_buckets, max_distance, bidirectional) for t in distance]
    np.testing.assert_array_equal(ours, slow)


def test_t5_bias_is_a_heads_entry_of_its_bucket():
    method = make("t5", num_heads=3, head_dim=8, num_buckets=8, max_distance=20)
    params = method.init(jax.random.key(0))
    assert params["bias"].shape == (8, 3)
    distance = np.array([[0, 1, 4], [9, 300, -2]])
    bias = method.terms(params).bias(distance)
    assert bias.shape == (3, 2, 3)
    for h, i, j in np.ndindex(3, 2, 3):
        assert bias[h, i, j] == params["bias"][oracle.t5_bucket(int(distance[i, j]), 8, 20), h]


# --- Shaw ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [False, True])
def test_shaw_clips(values):
    method = make("shaw", num_heads=2, head_dim=4, clip_distance=3, values=values)
    params = method.init(jax.random.key(0))
    assert set(params) == ({"keys", "values"} if values else {"keys"})
    assert all(table.shape == (7, 4) for table in params.values())
    terms = method.terms(params)
    distance = np.array([-FURTHEST, -4, -3, -1, 0, 2, 3, 4, 1000, FURTHEST], np.int32)
    rows = [0, 0, 0, 2, 3, 5, 6, 6, 6, 6]
    np.testing.assert_array_equal(terms.relative_keys(distance), params["keys"][np.array(rows)])
    if values:
        np.testing.assert_array_equal(terms.relative_values(distance), params["values"][np.array(rows)])
        assert not np.array_equal(params["keys"], params["values"])
    else:
        assert terms.relative_values is None


# --- Transformer-XL --------------------------------------------------------------------------------------------


def shifted_scores(product_HxTxT: np.ndarray) -> np.ndarray:
    """The paper's appendix B: columns hold distances T-1 .. 0; pad one, reshape, drop a row, and row i starts at -i."""
    heads, length, _ = product_HxTxT.shape
    padded = np.concatenate([np.zeros((heads, length, 1)), product_HxTxT], axis=2)
    return padded.reshape(heads, length + 1, length)[:, 1:]


def test_transformer_xl_is_the_relative_shift():
    """attention() with the method's terms against the well-known trick, float64, causal."""
    length, heads, dim = 12, 3, 8
    method = make("transformer_xl", num_heads=heads, head_dim=dim)
    params = method.init(jax.random.key(0))
    params |= {name: jnp.asarray(normal(i, heads, dim)) for i, name in enumerate(("content_bias", "position_bias"))}
    q, k, v = (normal(10 + i, length, heads, dim) for i in range(3))
    jitted = jax.jit(lambda q, k, v, params: attention(q, k, v, method.terms(params)))
    ours = jitted(q[None], k[None], v[None], params)[0]

    q, k, v = (np.float64(x) for x in (q, k, v))
    names = ("projection", "content_bias", "position_bias")
    projection, content, position = (np.asarray(params[name], np.float64) for name in names)
    width = heads * dim
    turns = np.outer(np.arange(length - 1, -1, -1), 10000.0 ** (-np.arange(0, width, 2) / width))
    table = np.einsum("te,ehd->thd", np.concatenate([np.sin(turns), np.cos(turns)], axis=1), projection)
    by_content = np.einsum("thd,shd->hts", q + content, k)
    by_position = shifted_scores(np.einsum("thd,shd->hts", q + position, table))
    scores = np.where(np.tri(length, dtype=bool), (by_content + by_position) / math.sqrt(dim), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    # float32 sums of 8 products of size up to about 10, then a softmax: scores within 1e-5, outputs as much of |v| < 4.
    np.testing.assert_allclose(ours, np.einsum("hts,shd->thd", weights, v), rtol=0, atol=4e-5)


def test_transformer_xl_relative_keys_by_definition():
    """W_r R[t] with its options, negative and far distances included; of about unit size at the start."""
    method = make("transformer_xl", num_heads=2, head_dim=8, theta=500.0, d_model=32)
    params = method.init(jax.random.key(0))
    assert {name: param.shape for name, param in params.items()} == {
        "projection": (32, 2, 8),
        "content_bias": (2, 8),
        "position_bias": (2, 8),
    }
    distance = np.array([[0, 1, -1], [50, 100_000, -FURTHEST]], np.int32)
    ours = jax.jit(lambda params: method.terms(params).relative_keys(distance))(params)
    assert ours.shape == (2, 2, 3, 8)
    projection = np.asarray(params["projection"], np.float64)
    for i, j in np.ndindex(2, 3):
        turns = int(distance[i, j]) * 500.0 ** (-np.arange(0, 32, 2) / 32)
        slow = np.einsum("e,ehd->hd", np.concatenate([np.sin(turns), np.cos(turns)]), projection)
        # 32 products with weights of size 1/4: 6e-7 each from the angle, and float32 sums.
        np.testing.assert_allclose(ours[:, i, j], slow, rtol=0, atol=32 * WAVE / 4)
    assert 0.5 < float(jnp.std(ours)) < 2


# --- Absolute --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [10000.0, 100.0])
def test_sinusoidal_by_definition(theta):
    method = make("sinusoidal", num_heads=2, head_dim=8, theta=theta)
    embed = method.terms({}).embed
    places = np.array([[0, 1, 5], [2048, 100_000, FURTHEST]], np.int32)
    ours = jax.jit(embed)(places)
    assert ours.shape == (2, 3, 16)
    assert ours.dtype == jnp.float32
    for i, j in np.ndindex(2, 3):
        slow = oracle.embedding("sinusoidal", {"theta": theta}, {}, int(places[i, j]), 16)
        np.testing.assert_allclose(ours[i, j], slow, rtol=0, atol=WAVE)
    np.testing.assert_allclose(embed(np.array(1))[:2], [0.84147098, 0.54030231], rtol=0, atol=WAVE)
    assert make("sinusoidal", num_heads=2, head_dim=8, d_model=24).terms({}).embed(places).shape == (2, 3, 24)


def test_learned_is_its_table():
    method = make("learned", num_heads=2, head_dim=8, max_positions=10)
    params = method.init(jax.random.key(0))
    terms = method.terms(params)
    places = np.array([[0, 9, 3], [1, 1, 8]])
    assert terms.max_positions == 10
    assert params["table"].shape == (10, 16)
    for embed in (terms.embed, jax.jit(terms.embed)):
        for dtype in (np.int32, np.uint8):
            np.testing.assert_array_equal(embed(places.astype(dtype)), np.asarray(params["table"])[places])
    assert make("learned", num_heads=2, head_dim=8, d_model=24).init(jax.random.key(0))["table"].shape == (2048, 24)


def test_learned_refuses_what_its_table_has_not():
    method = make("learned", num_heads=2, head_dim=8, max_positions=10)
    embed = method.terms(method.init(jax.random.key(0))).embed
    for array in (np.array, jnp.array):
        with pytest.raises(UserError, match=r"positions up to 10 are past the learned table of 10: .*at least 11"):
            embed(array([3, 10]))
        with pytest.raises(UserError, match=r"no row for position -1"):
            embed(array([3, -1]))
    # Traced positions cannot be refused: NaN, and not a neighbour's row.
    traced = np.asarray(jax.jit(embed)(jnp.array([9, 10, -1, FURTHEST])))
    assert np.isfinite(traced[0]).all()
    assert np.isnan(traced[1:]).all()


def test_check_positions():
    check_positions(10, 10)
    check_positions(11, None)
    with pytest.raises(UserError, match=r"positions up to 10 are past the learned table of 10"):
        check_positions(11, 10)


def test_the_readme_sized_use():
    """The functions alone, as a stranger would call them: no method object, no model."""
    table = wavelet_position(np.arange(8), *scale_shift_grid(64))
    assert table.shape == (8, 64)
    np.testing.assert_array_equal(np.asarray(table[0, ::8]), 1)  # t = b = 0, whatever the scale


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 0, "head_dim": 8}, "nope's num_heads must be at least 1, not 0"),
        ({"num_heads": 2, "head_dim": "8"}, "nope's head_dim must be a whole number, not '8'"),
        ({"num_heads": 2.0, "head_dim": 8}, "nope's num_heads must be a whole number, not 2.0"),
    ],
)
def test_heads_of_another_kind_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        make("nope", **sizes)


@pytest.mark.parametrize("name", ["wavelet", "discrete_wavelet", "shaw", "transformer_xl", "alibi", "t5"])
@pytest.mark.parametrize("distance", [np.array([2**32]), np.array([2**31], np.uint32), 2**70, np.array([-(2**31) - 1])])
def test_distances_past_int32_are_refused(name, distance):
    """2^32 was distance 0."""
    method = make(name, num_heads=2, head_dim=8)
    terms = method.terms(method.init(jax.random.key(0)))
    with pytest.raises(UserError, match=r"must be integers from -2\^31 to 2\^31 - 1 \(int32\), not "):
        (terms.relative_keys or terms.bias)(distance)


def test_positions_past_int32_are_refused():
    rope, waves = (make(name, num_heads=2, head_dim=8).terms({}) for name in ("rope", "sinusoidal"))
    for positions in (np.array([2**32]), np.array([2**31], np.uint32)):
        with pytest.raises(UserError, match=r"must be integers from -2\^31"):
            rope.turns_of(positions)
        with pytest.raises(UserError, match=r"must be integers from -2\^31"):
            waves.embed(positions)
    with pytest.raises(UserError, match="must be integers, not bool"):
        waves.embed(np.array([True]))
    with pytest.raises(UserError, match="must be integers, not 'one'"):
        waves.embed("one")
