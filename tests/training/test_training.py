"""Loss, schedule, optimizer and the train step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.compilation import quick_jit

from configs.paper import table1
from wavelet_jax.errors import UserError
from wavelet_jax.model.decoder import Decoder
from wavelet_jax.parallel import sharding
from wavelet_jax.positions import METHODS
from wavelet_jax.training import steps
from wavelet_jax.training.nag import nag
from wavelet_jax.training.optimizer import learning_rate_schedule, make_optimizer

VOCAB = 257


def start(config):
    graphdef, state, _ = steps.init(config, VOCAB, sharding.make_mesh(config))
    return jax.jit(steps.make_train_step(config, graphdef)), state


def batch(parts: int = 1, size: int = 8, length: int = 64) -> jax.Array:
    """The same tokens however they are split in parts: bytes of a sentence over and over."""
    text = np.frombuffer(b"a wavelet has a scale and a shift; attention reads it. " * 40, np.uint8)
    rows = [text[i * 17 : i * 17 + length + 1] for i in range(size)]
    return jnp.asarray(np.stack(rows), jnp.int32).reshape(parts, size // parts, -1)


def test_one_step_golden_metrics(small_config):
    train_step, state = start(small_config())
    _, metrics = train_step(state, batch())
    got = {name: float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate")}
    expected = {"loss": GOLDEN_LOSS, "grad_norm": GOLDEN_GRAD_NORM, "learning_rate": 0.002 / 6}
    assert got == pytest.approx(expected, rel=1e-4), (
        "The first update of configs/smoke.py:wavelet has changed. If the change was meant (initialisation, loss, "
        f"schedule, ..), put these numbers into the test and say why in the commit: {got}"
    )


# Of the seed 0 initialisation. Logits are near N(0, 1) there, so the loss must lie near log(257) + 1/2 = 6.05.
GOLDEN_LOSS, GOLDEN_GRAD_NORM = 6.0780044, 4.5870271


def test_step_changes_parameters_and_optimizer_state(small_config):
    train_step, state = start(small_config("shaw"))
    after, _ = train_step(state, batch())
    assert int(after.step) == 1

    def changed(before, now) -> list[bool]:
        return [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(now), strict=True)]

    assert all(changed(state.params, after.params))  # Shaw's vectors among them
    assert all(changed(state.opt_state, after.opt_state))


@pytest.mark.parametrize("method", ["wavelet", "rope"])
def test_overfits_a_batch(small_config, method):
    config = small_config(method)
    config.optimizer.update(learning_rate=1e-2, weight_decay=0.0)
    train_step, state = start(config)
    for _ in range(80):
        state, metrics = train_step(state, batch(size=2))
    assert metrics["loss"] < 0.1


def test_accumulation_changes_no_update(small_config):
    states = {}
    for parts in (1, 4):
        config = small_config()
        config.train.accumulation = parts
        train_step, state = start(config)
        states[parts], _ = train_step(state, batch(parts))

    # Adam divides by the square root of small second moments, so look at the moments themselves.
    def moments(state):
        return jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))

    for whole, split in zip(moments(states[1]), moments(states[4]), strict=True):
        np.testing.assert_allclose(whole, split, atol=1e-7)


def test_dropout_follows_seed_and_step(small_config):
    config = small_config()
    config.model.dropout = 0.5
    train_step, state = start(config)
    (_, first), (_, again) = train_step(state, batch()), train_step(state, batch())
    _, later = train_step(state.replace(step=state.step + 1), batch())
    assert float(first["loss"]) == float(again["loss"])
    assert float(first["loss"]) != float(later["loss"])


def test_chunked_losses_equal_whole_ones(small_config):
    config = small_config()
    graphdef, params = nnx.split(Decoder(config, VOCAB, rngs=nnx.Rngs(0)))
    hidden = jax.random.normal(jax.random.key(0), (2, 11, 32))
    targets = jax.random.randint(jax.random.key(1), (2, 11), 0, VOCAB)

    def losses(hidden, chunk):
        return steps.token_losses(nnx.merge(graphdef, params), hidden, targets, chunk)

    logits = np.asarray(hidden, np.float64) @ np.asarray(params["embedding"]["embedding"][...], np.float64).T
    exact = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    for chunk in (0, 6, 8, 22, 1000):  # 11 steps in chunks of 3 and of 4 leave a remainder
        np.testing.assert_allclose(losses(hidden, chunk), exact, atol=1e-5)
    whole, chunked = (jax.grad(lambda h, c=chunk: losses(h, c).mean())(hidden) for chunk in (0, 6))
    np.testing.assert_allclose(whole, chunked, atol=1e-7)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [  # at updates 0, 4, 5, 15, 25 and 100: warm-up of 5, decay to a tenth at 25
        ("constant", [1 / 6, 5 / 6, 1, 1, 1, 1]),
        ("linear", [1 / 6, 5 / 6, 1, 0.55, 0.1, 0.1]),
        ("cosine", [1 / 6, 5 / 6, 1, 0.55, 0.1, 0.1]),
    ],
)
def test_schedules_at_their_corners(small_config, schedule, expected):
    config = small_config()
    config.optimizer.update(learning_rate=1.0, schedule=schedule, warmup_steps=5, decay_steps=25, final_fraction=0.1)
    rate = learning_rate_schedule(config)
    np.testing.assert_allclose([rate(step) for step in (0, 4, 5, 15, 25, 100)], expected, rtol=1e-5)


def test_bad_schedules_are_refused(small_config):
    config = small_config()
    config.optimizer.schedule = "cosin"
    config.optimizer.decay_steps = 100
    with pytest.raises(UserError, match=r"unknown optimizer.schedule 'cosin': did you mean 'cosine'\?"):
        learning_rate_schedule(config)
    config.optimizer.update(schedule="cosine", decay_steps=5, warmup_steps=5)
    with pytest.raises(UserError, match=r"optimizer.decay_steps 5 .* must be past optimizer.warmup_steps 5"):
        learning_rate_schedule(config)


def test_weight_decay_spares_norms_biases_and_positions(small_config):
    config = small_config("learned")
    config.model.use_bias = True
    config.optimizer.update(learning_rate=1.0, warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(config)
    _graphdef, state = nnx.split(Decoder(config, VOCAB, rngs=nnx.Rngs(0)))
    params = jax.tree.map(jnp.ones_like, nnx.to_pure_dict(state))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
        name = sharding.path_of(path)
        decayed = name.endswith("kernel") or name == "embedding/embedding"
        np.testing.assert_allclose(update, -0.5 if decayed else 0.0, err_msg=name)


def test_gradients_are_clipped_by_their_global_norm(small_config):
    config = small_config()
    config.optimizer.update(clip_norm=0.5)
    params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    grads = {"a": jnp.full(3, 3.0), "b": jnp.full((2, 2), 4.0)}
    optimizer = make_optimizer(config)
    _, opt_state = optimizer.update(grads, optimizer.init(params), params)
    mu = optax.tree.get(opt_state, "mu")  # (1 - b1) times the clipped gradient
    norm = np.sqrt(27 + 64)
    np.testing.assert_allclose(mu["a"], 0.1 * 3.0 * 0.5 / norm, rtol=1e-5)
    np.testing.assert_allclose(mu["b"], 0.1 * 4.0 * 0.5 / norm, rtol=1e-5)


def nag_loop(params, grads, rates, momentum):
    """The paper's formula, step by step, in float64."""
    p, buffer, before = np.array(params, np.float64), np.zeros(len(params)), rates[0]
    for g, rate in zip(np.asarray(grads, np.float64), np.asarray(rates, np.float64), strict=True):
        c = rate / before
        p += momentum**2 * c * buffer - (1 + momentum) * rate * g
        buffer = momentum * c * buffer - rate * g
        before = rate
    return p


def test_nag_is_the_formula_over_a_changing_schedule():
    rng = np.random.default_rng(0)
    params, grads = rng.normal(size=5).astype(np.float32), rng.normal(size=(60, 5)).astype(np.float32)
    rates = np.concatenate([np.linspace(1e-3, 1, 20), np.linspace(1, 1e-2, 40)]).astype(np.float32)
    optimizer = nag(lambda count: jnp.asarray(rates)[count], 0.9)
    ours, state = jnp.asarray(params), optimizer.init(params)
    update = jax.jit(optimizer.update)
    for i, g in enumerate(grads):
        updates, state = update(g, state)
        ours = optax.apply_updates(ours, updates)
        # Sums of at most 60 numbers of order 10 in float32.
        np.testing.assert_allclose(ours, nag_loop(params, grads[: i + 1], rates[: i + 1], 0.9), atol=1e-5, rtol=1e-5)


def test_nag_at_a_constant_rate_is_optax_s_nesterov_momentum():
    rng = np.random.default_rng(1)
    params = {"a": rng.normal(size=3).astype(np.float32), "b": rng.normal(size=(2, 2)).astype(np.float32)}
    ours, theirs = nag(optax.constant_schedule(0.1), 0.9), optax.sgd(0.1, momentum=0.9, nesterov=True)
    states = ours.init(params), theirs.init(params)
    for _ in range(4):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        (one, first), (other, second) = ours.update(grads, states[0]), theirs.update(grads, states[1])
        states = first, second
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


def test_nag_outlives_a_learning_rate_of_zero():
    rates = np.float32([1, 0, 0, 1])
    optimizer = nag(lambda count: jnp.asarray(rates)[count], 0.9)
    state = optimizer.init(jnp.zeros(1))
    for expected in (-1.9, 0, 0, -1.9):  # what is left of the velocity is nothing
        updates, state = optimizer.update(jnp.ones(1), state)
        np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_the_paper_s_schedule_at_its_corners():
    """Section 6.1: from 1e-7 to 1 in 16,000 updates, half a cosine of 270,000 down to 1e-4."""
    rate = learning_rate_schedule(table1.get_config("wavelet_ricker"))
    steps = [0, 1, 15_999, 16_000, 151_000, 286_000]
    slope = (1 - 1e-7) / 16_000
    expected = [1e-7, 1e-7 + slope, 1 - slope, 1, (1 + 1e-4) / 2, 1e-4]
    # The cosine's angle is in float32: at its end, 1e-4 of the rate of which 6e-8 is rounding.
    np.testing.assert_allclose([rate(step) for step in steps], expected, rtol=1e-3, atol=0)
    np.testing.assert_allclose([rate(step) for step in steps[:5]], expected[:5], rtol=1e-6, atol=0)


def test_the_paper_s_first_update():
    """Of configs/paper/table1.py: the gradient of the mean over tokens is clipped at 0.1; NAG moves by 1.99 of it."""
    config = table1.get_config("small_nope")
    config.model.update(num_layers=1, dropout=0.0, adaptive_dropout=0.0, cutoffs=(100, 110))
    config.train.update(length=64, batch_size=8, logits_chunk=0)
    config.optimizer.warmup_start = 1e-3
    graphdef, _ = steps.shapes(config, VOCAB, sharding.make_mesh(config))
    state = quick_jit(lambda: steps._make_state(config, VOCAB))()
    after, metrics = quick_jit(steps.make_train_step(config, graphdef))(state, batch())

    def loss(params):
        tokens = batch()[0]
        model = nnx.merge(graphdef, params)
        return steps.token_losses(model, model.hidden(tokens[:, :-1]), tokens[:, 1:], 0).mean()

    grads = quick_jit(jax.grad(loss))(state.params)
    norm = optax.tree.norm(grads)
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)
    assert norm > 0.1
    jax.tree.map(
        # Differences of parameters of order 1 carry their rounding, 6e-8.
        lambda g, old, new: np.testing.assert_allclose(new - old, -1.99 * 1e-3 * 0.1 * g / norm, atol=1.2e-7),
        *(grads, state.params, after.params),
    )


def test_bad_optimizers_are_refused(small_config):
    config = small_config()
    config.optimizer.name = "adam"
    with pytest.raises(UserError, match=r"unknown optimizer.name 'adam': did you mean 'adamw'\?"):
        make_optimizer(config)
    config.optimizer.update(name="nag", momentum=1.0)
    with pytest.raises(UserError, match=r"optimizer.momentum must be at least 0 and below 1, not 1\.0"):
        make_optimizer(config)


@pytest.mark.slow
def test_memory_of_a_step_is_linear_in_length(small_config):
    """With rematerialisation and tiles: four times the tokens take four times the memory, and not sixteen."""
    config = small_config()
    config.model.update(remat="block", num_layers=1, attention_backend="tiled")
    config.train.logits_chunk = 256
    graphdef, state = steps.shapes(config, VOCAB, sharding.make_mesh(config))
    taken = []
    for length in (1024, 4096):
        tokens = jax.ShapeDtypeStruct((1, 1, length + 1), jnp.int32)
        program = jax.jit(steps.make_train_step(config, graphdef)).lower(state, tokens).compile()
        taken.append(program.memory_analysis().temp_size_in_bytes)
    assert taken[1] < 4.1 * taken[0]


@pytest.mark.parametrize("remat", ["none", "block"])
def test_no_angle_of_rope_is_computed_in_a_step(small_config, remat):
    """Its positions are known: cosines and sines are constants of the program, forward and backward."""
    config = small_config("rope")
    config.model.remat = remat
    graphdef, state = steps.shapes(config, VOCAB, sharding.make_mesh(config))
    tokens = jax.ShapeDtypeStruct(steps.batch_shape(config), jnp.int32)
    program = jax.jit(steps.make_train_step(config, graphdef)).lower(state, tokens).as_text()
    assert "stablehlo.cosine" not in program  # smoke's learning rate is constant
    assert "stablehlo.sine" not in program


def products(config) -> list[str]:
    """The matrix products of a train step, forward and backward, as the compiler is given them."""
    graphdef, state = steps.shapes(config, VOCAB, sharding.make_mesh(config))
    tokens = jax.ShapeDtypeStruct(steps.batch_shape(config), jnp.int32)
    program = jax.jit(steps.make_train_step(config, graphdef)).lower(state, tokens).as_text()
    return [line for line in program.splitlines() if "stablehlo.dot_general" in line]


HIGHEST = "precision = [HIGHEST, HIGHEST]"


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("method", METHODS)
def test_float32_is_float32(small_config, method, backend):
    """On TPUs and GPUs too, which cut operands to bfloat16 and TF32 where no precision is stated."""
    config = small_config(method)
    config.model.attention_backend = backend
    found = products(config)
    assert len(found) >= 3 * (7 + 2 + 1), "of a layer, which all call, its scores and values, and the head"
    assert all(HIGHEST in line for line in found)


def test_a_lower_precision_is_for_products_with_parameters(small_config):
    config = small_config("wavelet")
    config.model.precision = "default"
    lower = [line for line in products(config) if HIGHEST not in line]
    # Query, key, value, out, gate, up and down of the layer that all call, and the head; each of them forward, and two
    # backward.
    assert len(lower) == 3 * (7 + 1)


def test_products_of_bfloat16_are_of_bfloat16(small_config):
    """But for the head's gradients, from float32 losses, which then take the device's fastest."""
    config = small_config("rope")
    config.model.dtype = "bfloat16"
    config.model.attention_backend = "tiled"
    of_bfloat16 = re.compile(r"\(tensor<[\dx]*xbf16>, tensor<[\dx]*xbf16>\)")
    wide = [line for line in products(config) if not of_bfloat16.search(line)]
    assert len(wide) == 2
    assert not any(HIGHEST in line for line in wide)
