"""A scan over layers against layers one by one: the same model, in another form."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.compilation import quick_jit

from configs import smoke
from wavelet_jax.errors import UserError
from wavelet_jax.model import layers
from wavelet_jax.model.decoder import Decoder
from wavelet_jax.positions import METHODS

VOCAB, LAYERS = 50, 3
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 16), np.int32)


def config_of(method: str, **model):
    config = smoke.get_config(method)
    config.model.update(
        {"num_layers": LAYERS, "d_model": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, **model}
    )
    return config


@functools.cache
def pair(method: str, **model) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """(graphdef, parameters) of the layers one by one, and of the scan: each drawn by itself from one seed."""
    made = []
    for scan in ("never", "always"):
        graphdef, state = nnx.split(Decoder(config_of(method, scan_layers=scan, **model), VOCAB, rngs=nnx.Rngs(0)))
        made.append((graphdef, nnx.to_pure_dict(state)))
    return made[0], made[1]


def assert_close(one: Any, other: Any, tolerance: float = 2e-5) -> None:
    """Trees of one structure whose arrays differ by rounding only, against the largest number of each."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1e-3, float(np.abs(x).max())))


def loss(graphdef, dropout, params):
    key = jax.random.key(5) if dropout else None
    hidden = nnx.merge(graphdef, params).hidden(TOKENS[:, :-1], dropout_key=key)
    return jnp.mean(nnx.merge(graphdef, params).losses(hidden, TOKENS[:, 1:]))


@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_equal_those_of_layers_one_by_one(method):
    (listed, params), (scanned, stack) = pair(method)
    assert_close(layers.other_form(params), stack, 1e-6)
    value, grads = quick_jit(jax.value_and_grad(functools.partial(loss, listed, False)))(params)
    found, found_grads = quick_jit(jax.value_and_grad(functools.partial(loss, scanned, False)))(
        layers.other_form(params)
    )
    np.testing.assert_allclose(found, value, rtol=1e-6)
    assert_close(layers.other_form(grads), found_grads)


@pytest.mark.parametrize("remat", layers.REMATS)
def test_dropout_and_rematerialization_are_those_of_layers_one_by_one(remat):
    model = {"dropout": 0.2, "attention_dropout": 0.1, "activation_dropout": 0.1, "remat": remat}
    (listed, params), (scanned, _) = pair("shaw", **model)
    value, grads = quick_jit(jax.value_and_grad(functools.partial(loss, listed, True)))(params)
    found, found_grads = quick_jit(jax.value_and_grad(functools.partial(loss, scanned, True)))(
        layers.other_form(params)
    )
    np.testing.assert_allclose(found, value, rtol=1e-6)
    assert_close(layers.other_form(grads), found_grads)
    again = quick_jit(jax.value_and_grad(functools.partial(loss, scanned, True)))(layers.other_form(params))
    jax.tree.map(np.testing.assert_array_equal, (found, found_grads), again)


@pytest.mark.parametrize("method", ["wavelet", "rope", "t5", "shaw"])
@pytest.mark.parametrize("traced", [True, False])
def test_a_cache_equals_a_full_pass(method, traced):
    _, (scanned, stack) = pair(method)
    model = nnx.merge(scanned, stack)
    extend = quick_jit(lambda params, ids, cache: nnx.merge(scanned, params).extend(ids, cache))
    whole = quick_jit(lambda params: nnx.merge(scanned, params).hidden(TOKENS))(stack)
    cache, parts = model.init_cache(2, 20), []
    for start, stop in ((0, 7), (7, 8), (8, 16)):
        ids = TOKENS[:, start:stop]
        hidden, cache = extend(stack, ids, cache) if traced else model.extend(jnp.asarray(ids), cache)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)
    assert cache.keys.shape == (LAYERS, 2, 20, 1, 16)
    assert cache.room == 20
    assert int(cache.filled) == 16
    np.testing.assert_array_equal(cache.keys[:, :, 16:], 0)


def test_a_layer_of_a_stack_is_that_of_the_list():
    (listed, params), (scanned, _) = pair("shaw")
    list_, stack = nnx.merge(listed, params), nnx.merge(scanned, layers.other_form(params))
    for layer in range(LAYERS):
        one, other = (nnx.to_pure_dict(nnx.state(model.block(layer))) for model in (list_, stack))
        jax.tree.map(np.testing.assert_array_equal, one, other)
        np.testing.assert_array_equal(
            list_.terms(layer).relative_keys(np.arange(4)), stack.terms(layer).relative_keys(np.arange(4))
        )


def test_the_other_form_of_the_other_form_is_the_same_with_the_optimizer():
    (_, params), _ = pair("shaw")
    state = {"params": params, "opt_state": optax.adamw(1e-3).init(params)}
    there = layers.other_form(state)
    assert set(there["params"]) == {*params, "layers"} - {"blocks"}
    assert there["params"]["layers"]["query"]["kernel"].shape == (LAYERS, 32, 32)
    assert there["opt_state"][0].mu["layers"]["query"]["kernel"].shape == (LAYERS, 32, 32)
    back = layers.other_form(there)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)


@pytest.mark.parametrize("scan", ["never", "always"])
def test_a_deeper_model_is_traced_once(scan):
    """What a layer computes while it is traced, and the constants it closes over, are in the program once."""

    def program(count: int) -> str:
        config = config_of("wavelet", num_layers=count, scan_layers=scan, attention_backend="tiled")
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, VOCAB, rngs=nnx.Rngs(0))))
        tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)
        return jax.jit(lambda state, ids: nnx.merge(graphdef, state).hidden(ids)).lower(state, tokens).as_text()

    two, six = program(2), program(6)
    assert two.count("dot_general") == six.count("dot_general")
    grown = len(six) - len(two)
    assert grown < 0.1 * len(two), "a call and its arguments for each layer"


def test_auto_scans_deep_models():
    for count, scanned in ((1, False), (layers.LEAST_SCANNED - 1, False), (layers.LEAST_SCANNED, True)):
        assert layers.are_scanned(config_of("nope", num_layers=count)) == scanned
    with pytest.raises(UserError, match=r"unknown model.scan_layers 'alway': did you mean 'always'"):
        Decoder(config_of("nope", scan_layers="alway"), VOCAB, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("scan", ["always", "never"])
def test_angles_of_traced_positions_are_computed_once_for_all_layers(scan):
    """Reading after a cache whose length is traced: the sines of its queries, and none in each layer."""
    graphdef, params = pair("rope")[scan == "always"]

    def read(params, filled):
        model = nnx.merge(graphdef, params)
        return model.extend(TOKENS, model.init_cache(len(TOKENS), 32).at(filled))[0]

    def sines(jaxpr) -> int:  # as often as they run
        found = 0
        for equation in jaxpr.eqns:
            inner = [getattr(sub, "jaxpr", sub) for sub in jax.tree.leaves(tuple(equation.params.values()))]
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            found += equation.primitive.name == "sin"
            found += times * sum(sines(sub) for sub in inner if hasattr(sub, "eqns"))
        return found

    assert sines(jax.make_jaxpr(read)(params, 3).jaxpr) == 1
