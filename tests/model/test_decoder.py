"""The decoder with every method: what must hold of any of them, and both of the paper's shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.compilation import quick_jit

from configs import smoke
from wavelet_jax.errors import UserError
from wavelet_jax.model.decoder import Decoder
from wavelet_jax.model.layers import REMATS
from wavelet_jax.positions import METHODS

VOCAB = 50
methods = pytest.mark.parametrize("method", METHODS)


@functools.cache  # models of a method share what is compiled
def make_model(method: str = "wavelet", seed: int = 0, **model) -> Decoder:
    config = smoke.get_config(method)
    config.model.update({"num_kv_heads": 1, "num_layers": 1, **model})
    # Unit fan-in weights make attention nearly uniform; larger ones make position matter in every test below.
    decoder = Decoder(config, VOCAB, rngs=nnx.Rngs(seed))
    for block in decoder.blocks:
        block.query.kernel[...] *= 3.0
    return decoder


@quick_jit
def _logits(model: Decoder, ids, positions, segment_ids):
    return model(ids, positions=positions, segment_ids=segment_ids)


def logits_of(model: Decoder, ids, positions=None, segment_ids=None) -> jax.Array:
    """Compiled once a method and shape, whatever is left out; eager dispatch compiles every operation by itself."""
    positions = np.arange(ids.shape[1]) if positions is None else positions
    return _logits(model, ids, positions, np.zeros(ids.shape, int) if segment_ids is None else segment_ids)


@quick_jit
def extend(model: Decoder, ids, cache):
    hidden, cache = model.extend(ids, cache)
    return model.logits(hidden), cache


def tokens(batch: int, length: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCAB)


@methods
def test_prefix_does_not_see_what_follows(method):
    model = make_model(method)
    one = tokens(2, 16)
    other = tokens(2, 16, seed=1).at[:, :9].set(one[:, :9])
    np.testing.assert_array_equal(logits_of(model, one)[:, :9], logits_of(model, other)[:, :9])
    assert (logits_of(model, one)[:, 9:] != logits_of(model, other)[:, 9:]).any()


@methods
def test_causal_by_gradient(method):
    graphdef, state = nnx.split(make_model(method))
    params = nnx.to_pure_dict(state)

    @quick_jit
    def gradient_of_output(position):
        def output(params):  # every token has a row of its own, so the gradient to a row is that to a position
            return nnx.merge(graphdef, params).hidden(jnp.arange(10)[None])[0, position].sum()

        return jax.grad(output)(params)["embedding"]["embedding"][:10]

    for position in (0, 4, 9):
        gradient = np.abs(gradient_of_output(position)).max(axis=1)
        assert (gradient[position + 1 :] == 0).all()
        assert (gradient[: position + 1] > 0).all()


@methods
def test_cache_equals_full_pass(method):
    """Prefill in chunks, then one token at a time."""
    model = make_model(method)
    ids = tokens(2, 16)
    cache, outputs, start = model.init_cache(2, 20), [], 0
    for size in (6, 6, 1, 1, 1, 1):
        logits, cache = extend(model, ids[:, start : start + size], cache)
        outputs.append(logits)
        start += size
    assert int(cache.filled) == 16
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), logits_of(model, ids), atol=2e-5)


@pytest.mark.parametrize("method", ["wavelet", "sinusoidal"])
def test_cache_in_tiles_equals_full_pass(method):
    """A cache's positions are the first of consecutive ones: what the tiled backend needs while tracing."""
    model = make_model(method, attention_backend="tiled")
    ids = tokens(2, 9)
    cache, outputs = model.init_cache(2, 12), []
    for start in (0, 3, 6):
        logits, cache = extend(model, ids[:, start : start + 3], cache)
        outputs.append(logits)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), logits_of(make_model(method), ids), atol=2e-5)


@methods
def test_packed_documents_equal_separate_ones(method):
    model = make_model(method)
    first, second = tokens(2, 8), tokens(2, 8, seed=1)
    packed = logits_of(
        model,
        jnp.concatenate([first, second], axis=1),
        positions=np.concatenate([np.arange(8), np.arange(8)]),
        segment_ids=np.repeat([[1, 2], [3, 3]], 8, axis=1),
    )
    np.testing.assert_allclose(packed[0, :8], logits_of(model, first)[0], atol=2e-5)
    np.testing.assert_allclose(packed[0, 8:], logits_of(model, second)[0], atol=2e-5)
    # In the second row both halves are one segment, and see each other.
    assert np.abs(packed[1, 8:] - logits_of(model, second)[1]).max() > 1e-3


@methods
def test_finite_at_four_times_the_training_length(method):
    logits = logits_of(make_model(method), tokens(1, 4 * 64))  # configs/smoke.py trains at 64
    assert logits.shape == (1, 256, VOCAB)
    assert np.isfinite(logits).all()


def test_jit_equals_eager():
    model = make_model("wavelet")
    ids = tokens(2, 9)
    np.testing.assert_allclose(jax.jit(lambda model: model(ids))(model), model(ids), atol=1e-5)


@methods
def test_bfloat16_model_keeps_positions_at_distance_100_000(method):
    """The error of a bfloat16 model against a float32 one is that of its activations, near or far.

    Stated bound: 0.25 for logits of unit size, which have passed some 20 roundings of 2^-8 with weights of up to 3;
    positions in bfloat16 would be off by hundreds of tokens at this distance.
    """
    positions = np.concatenate([np.arange(8), 100_000 + np.arange(8)])
    ids = tokens(2, 16)
    exact, rounded = make_model(method), make_model(method, dtype="bfloat16")
    if exact.terms().max_positions is not None:
        with pytest.raises(UserError, match="past the learned table"):
            exact(ids, positions=positions)
        return
    approximate = logits_of(rounded, ids, positions)
    assert approximate.dtype == jnp.float32
    assert 0 < np.abs(approximate - logits_of(exact, ids, positions)).max() < 0.25


def test_learned_positions_refuse_what_is_past_their_table():
    model = make_model("learned")
    with pytest.raises(
        UserError, match=r"positions up to 256 are past the learned table of 256.*position.max_positions"
    ):
        model(tokens(1, 257))
    with pytest.raises(UserError, match="past the learned table"):
        jax.jit(lambda ids: model(ids))(tokens(1, 300))
    with pytest.raises(UserError, match="past the learned table"):
        model.init_cache(1, 257)


def test_every_method_tells_order_apart_and_nope_alone_does_not():
    """With positions, the last query's output changes when two earlier tokens change places."""
    ids = tokens(2, 16).at[:, :2].set(jnp.array([3, 7]))
    swapped = ids.at[:, :2].set(jnp.array([7, 3]))
    for method in METHODS:
        model = make_model(method)
        change = np.abs(logits_of(model, ids)[0, -1] - logits_of(model, swapped)[0, -1]).max()
        assert (change < 1e-5) == (method == "nope"), (method, change)


def test_llama_shape_equals_hugging_face_llama():
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    model = make_model("rope", tied_head=False, num_layers=2)
    blocks = model.blocks
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            rms_norm_eps=1e-6,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    ).eval()
    ours = {
        "model.embed_tokens.weight": model.embedding.embedding[...],
        "model.norm.weight": model.final_norm.scale[...],
        "lm_head.weight": model.head.kernel[...].T,
    }
    for i, block in enumerate(blocks):
        for theirs, layer in {
            "self_attn.q_proj": block.query,
            "self_attn.k_proj": block.key,
            "self_attn.v_proj": block.value,
            "self_attn.o_proj": block.out,
            "mlp.gate_proj": block.gate,
            "mlp.up_proj": block.up,
            "mlp.down_proj": block.down,
        }.items():
            ours[f"model.layers.{i}.{theirs}.weight"] = layer.kernel[...].T
        ours[f"model.layers.{i}.input_layernorm.weight"] = block.attention_norm.scale[...]
        ours[f"model.layers.{i}.post_attention_layernorm.weight"] = block.feed_forward_norm.scale[...]
    reference.load_state_dict({name: torch.tensor(np.array(array)) for name, array in ours.items()})
    ids = tokens(2, 33)
    with torch.no_grad():
        expected = reference(torch.tensor(np.array(ids), dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(model(ids), expected, atol=3e-5)


def test_baevski_auli_shape():
    """Pre-norm LayerNorm with biases, ReLU, no final norm, embeddings times sqrt(E), against plain arithmetic."""
    shape = {
        "norm": "layer",
        "activation": "relu",
        "use_bias": True,
        "final_norm": False,
        "scale_embedding": True,
        "d_ff": 96,
    }
    model = make_model("sinusoidal", **shape, initializer="xavier")
    block = model.blocks[0]
    bias_key = jax.random.key(5)
    for layer in (block.query, block.key, block.value, block.out, block.up, block.down):
        layer.bias[...] = 0.1 * jax.random.normal(bias_key, layer.bias[...].shape)
    ids = np.asarray(tokens(1, 6))

    def linear(layer, x):
        return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    embedding = np.asarray(model.embedding.embedding[...], np.float64)
    angles = np.arange(6)[:, None] * 10000.0 ** (-np.arange(0, 32, 2) / 32)
    x = embedding[ids[0]] * np.sqrt(32) + np.stack([np.sin(angles), np.cos(angles)], -1).reshape(6, 32)
    h = norm(x)
    query = linear(block.query, h).reshape(6, 2, 16)
    key, value = linear(block.key, h), linear(block.value, h)  # one key head for both query heads
    scores = np.einsum("thd,sd->hts", query, key) / 4
    scores[:, ~np.tri(6, dtype=bool)] = -np.inf
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    x = x + linear(block.out, np.einsum("hts,sd->thd", weights, value).reshape(6, 32))
    x = x + linear(block.down, np.maximum(linear(block.up, norm(x)), 0))
    np.testing.assert_allclose(model(ids)[0], x @ embedding.T, atol=5e-4, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"vocabulary": "adaptive", "cutoffs": (20,), "tied_head": True}], ids=str)
def test_the_gradient_of_a_frequent_token_is_summed_in_float32(changes):
    """1,000 equal tokens: in bfloat16, 256 + 1 is 256."""
    ids, targets = jnp.full((1, 1000), 7), jnp.full((1, 1000), 8)

    def gradient(dtype: str) -> np.ndarray:
        graphdef, state = nnx.split(make_model("nope", dtype=dtype, attention_backend="reference", **changes))

        def loss(state):
            model = nnx.merge(graphdef, state)
            return jnp.mean(model.losses(model.hidden(ids), targets))

        embedding = quick_jit(jax.grad(loss))(state)["embedding"]
        table = embedding["words"][0] if changes else embedding["embedding"]
        return np.asarray(table[...], np.float64)[7]

    wanted, found = gradient("float32"), gradient("bfloat16")
    # bfloat16 rounds by 2^-9 at each of some ten operations between the embedding and the loss.
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize("method", ["wavelet", "shaw"])
@pytest.mark.parametrize("attention", [{"attention_dropout": 0.1}, {"attention_backend": "tiled"}])
def test_rematerialisation_changes_no_gradient(method, attention):
    def gradients(remat):
        graphdef, params = nnx.split(make_model(method, remat=remat, dropout=0.1, **attention))
        key = jax.random.key(3)
        return quick_jit(jax.grad(lambda p: nnx.merge(graphdef, p)(tokens(2, 8), dropout_key=key).var()))(params)

    wanted = gradients("none")
    for remat in ("dots", "attention", "block"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), wanted, gradients(remat))


def test_rematerialisation_keeps_what_its_name_says():
    """Bytes of one more window that wait for the backward pass fall from policy to policy."""

    def kept(remat, batch):
        graphdef, params = nnx.split(make_model(remat=remat, attention_backend="tiled"))
        loss = functools.partial(lambda graphdef, p: nnx.merge(graphdef, p)(tokens(batch, 32)).var(), graphdef)
        _, pull = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    # Of a window, because parameters and the tiles' own constants wait too, once, by every policy.
    a_window = {remat: kept(remat, 3) - kept(remat, 2) for remat in REMATS}
    assert a_window["none"] > a_window["dots"] > a_window["attention"] > a_window["block"] > 0


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_is_a_function_of_its_key(kind):
    model, plain = make_model(**{kind: 0.5}), make_model()
    ids = tokens(1, 8)
    dropped = quick_jit(lambda seed: model(ids, dropout_key=jax.random.key(seed)))
    first, again, other = dropped(1), dropped(1), dropped(2)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    np.testing.assert_array_equal(logits_of(model, ids), logits_of(plain, ids))  # no key: no dropout


def test_only_learned_numbers_are_parameters():
    """Tables that a function computes, such as the wavelets', are no leaves of the model."""
    count = {m: sum(leaf.size for leaf in jax.tree.leaves(nnx.split(make_model(m))[1])) for m in METHODS}
    for name in METHODS:
        learned = jax.eval_shape(make_model(name).method.init, jax.random.key(0))
        assert count[name] - count["nope"] == sum(leaf.size for leaf in learned.values()), name
    assert count["shaw"] - count["nope"] == (2 * 64 + 1) * 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "rsm"}, r"unknown model.norm 'rsm': did you mean 'rms'\? allowed are rms, layer"),
        ({"activation": "gelu"}, "unknown model.activation 'gelu'.*allowed are swiglu, relu"),
        ({"dtype": "bfloat"}, "unknown model.dtype 'bfloat': did you mean 'bfloat16'"),
        ({"remat": "all"}, "unknown model.remat 'all'"),
        ({"initializer": "xaver"}, "did you mean 'xavier'"),
        ({"num_heads": 3, "num_kv_heads": 2}, "model.num_kv_heads 2 must divide model.num_heads 3"),
        ({"head_dim": 20}, r"8 scales cannot fill a head of 20 dimensions.*set num_scales to one of"),
    ],
)
def test_bad_shapes_are_refused(changes, message):
    config = smoke.get_config()
    config.model.update(changes)
    with pytest.raises(UserError, match=message):
        Decoder(config, VOCAB, rngs=nnx.Rngs(0))
