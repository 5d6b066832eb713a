"""Adaptive input and softmax: against PyTorch's in float64, and what must hold of the loss that goes through them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from support.compilation import quick_jit

from configs import smoke
from wavelet_jax.errors import UserError
from wavelet_jax.model import vocabulary
from wavelet_jax.model.decoder import Decoder
from wavelet_jax.parallel import sharding
from wavelet_jax.runs import throughput
from wavelet_jax.training import steps

# Words 0 .. 9 have vectors of 32 numbers, 10 .. 25 of 8, 26 .. 49 of 2.
VOCAB, CUTOFFS, WIDTH = 50, (10, 26), 32
CLUSTERS = [(0, 10, 32), (10, 26, 8), (26, 50, 2)]


def make_config(**model):
    config = smoke.get_config("nope")
    # Where no key is given, dropout must not be seen in any test.
    config.model.update(
        {"num_layers": 1, "vocabulary": "adaptive", "cutoffs": CUTOFFS, "adaptive_dropout": 0.5} | model
    )
    return config


@functools.cache
def make_model() -> Decoder:
    """Compiled as a whole: one by one, its initialisers take seconds."""
    config = make_config()
    graphdef, _ = steps.shapes(config, VOCAB, sharding.make_mesh(config))
    return nnx.merge(
        graphdef, quick_jit(lambda: nnx.to_pure_dict(nnx.state(Decoder(config, VOCAB, rngs=nnx.Rngs(0)))))()
    )


def hidden_and_targets(batch: int = 2, length: int = 11) -> tuple[jax.Array, jax.Array]:
    """Targets of every cluster, and among them the first and the last word of each."""
    edges = np.array([0, 9, 10, 25, 26, 49])
    targets = np.random.default_rng(0).integers(0, VOCAB, batch * length)
    targets[: len(edges)] = edges
    return jax.random.normal(jax.random.key(0), (batch, length, WIDTH)), jnp.asarray(targets.reshape(batch, length))


def torch_softmax(embedding: vocabulary.AdaptiveVocabulary):
    """PyTorch's adaptive softmax with these numbers, in float64."""
    torch = pytest.importorskip("torch")
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(WIDTH, VOCAB, CUTOFFS, div_value=4.0, dtype=torch.float64)

    def tensor(x):
        return torch.nn.Parameter(torch.tensor(np.asarray(x[...], np.float64)))

    theirs.head.weight = tensor(np.concatenate([embedding.words[0][...], embedding.classes[...].T]))
    for i, tail in enumerate(theirs.tail, start=1):
        tail[0].weight, tail[1].weight = tensor(embedding.projections[i]), tensor(embedding.words[i])
    return torch, theirs


@pytest.mark.parametrize("chunk", [0, 8])  # all at once; rows of 11 tokens in chunks of 4, which leaves a remainder
def test_loss_and_gradients_equal_pytorch_s(chunk):
    """Float32 against float64: sums of 50 products of unit normals, and their softmax."""
    model = make_model()
    torch, theirs = torch_softmax(model.embedding)
    hidden, targets = hidden_and_targets()
    weights = np.random.default_rng(1).uniform(0.5, 1.5, targets.shape)  # so that no two targets' gradients are alike
    graphdef, params = nnx.split(model)

    def losses_and_sum(params, hidden):
        losses = steps.token_losses(nnx.merge(graphdef, params), hidden, targets, chunk)
        return (losses * weights).sum(), losses

    function = quick_jit(jax.value_and_grad(losses_and_sum, argnums=(0, 1), has_aux=True))
    (_, losses), (of_params, of_hidden) = function(params, hidden)

    inputs = torch.tensor(np.asarray(hidden, np.float64).reshape(-1, WIDTH), requires_grad=True)
    expected = -theirs(inputs, torch.tensor(np.asarray(targets).reshape(-1), dtype=torch.long)).output
    (expected * torch.tensor(weights.reshape(-1))).sum().backward()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(losses.reshape(-1), expected.detach())
    close(of_hidden.reshape(-1, WIDTH), inputs.grad)
    ours = of_params["embedding"]
    close(ours["words"][0][...], theirs.head.weight.grad[:10])
    close(ours["classes"][...], theirs.head.weight.grad[10:].T)
    for i, tail in enumerate(theirs.tail, start=1):
        close(ours["projections"][i][...], tail[0].weight.grad)
        close(ours["words"][i][...], tail[1].weight.grad)
    assert (ours["projections"][0][...] == 0).all()  # the input's alone


def test_log_probabilities_of_all_words():
    model = make_model()
    torch, theirs = torch_softmax(model.embedding)
    hidden, targets = hidden_and_targets()
    log_probs, losses = quick_jit(lambda hidden: (model.logits(hidden), model.losses(hidden, targets)))(hidden)
    expected = theirs.log_prob(torch.tensor(np.asarray(hidden, np.float64).reshape(-1, WIDTH)))
    np.testing.assert_allclose(log_probs.reshape(-1, VOCAB), expected.detach(), rtol=1e-5, atol=1e-5)
    picked = np.take_along_axis(np.asarray(log_probs), np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses, -picked, rtol=1e-5, atol=1e-5)


def test_input_is_each_word_s_vector_times_its_cluster_s_projection():
    embedding = make_model().embedding
    ids = np.arange(VOCAB).reshape(5, 10)
    expected = [
        np.asarray(embedding.words[i][...], np.float64)[word - start] @ np.asarray(embedding.projections[i][...])
        for i, (start, stop, _) in enumerate(CLUSTERS)
        for word in range(start, stop)
    ]
    np.testing.assert_allclose(quick_jit(embedding.__call__)(ids).reshape(VOCAB, WIDTH), expected, atol=2e-6)
    assert [words.shape for words in embedding.words] == [(stop - start, width) for start, stop, width in CLUSTERS]


def test_a_tail_that_is_not_needed_is_not_touched():
    """Numbers that are not finite in it reach neither a loss nor, as they would through a mask, a gradient."""
    graphdef, state = nnx.split(make_model())
    params = nnx.to_pure_dict(state)
    params["embedding"]["words"][2] = jnp.full((24, 2), jnp.nan)
    hidden, _ = hidden_and_targets()
    targets = jnp.arange(22).reshape(2, 11)  # none of the last cluster

    def loss(params, targets):
        return steps.token_losses(nnx.merge(graphdef, params), hidden, targets, 6).sum()

    gradient = quick_jit(jax.grad(loss))
    finite = [
        all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params, some)))
        for some in (targets, targets.at[1, 3].set(26))
    ]
    assert finite == [True, False]


def test_tails_are_computed_where_their_words_are_and_nowhere_else(monkeypatch):
    """Rows of 12 tokens in 4 chunks of 3: the last chunk holds all the rare words, wherever in the rows they stand."""
    computed = []
    tail = vocabulary.AdaptiveVocabulary._tail

    def counting(self, i, hidden, dropout_key):
        jax.debug.callback(lambda: computed.append(i))
        return tail(self, i, hidden, dropout_key)

    monkeypatch.setattr(vocabulary.AdaptiveVocabulary, "_tail", counting)
    hidden, _ = hidden_and_targets(length=12)
    targets = jnp.full((2, 12), 5).at[0, 0].set(30).at[0, 5].set(12).at[1, 7].set(49)
    model = make_model()
    quick_jit(lambda hidden, targets: steps.token_losses(model, hidden, targets, 6))(hidden, targets)
    jax.effects_barrier()
    assert sorted(computed) == [1, 2]


def arrays(jaxpr) -> list[int]:
    """Sizes of all arrays that a jaxpr makes, inner ones too."""
    sizes = []
    for equation in jaxpr.eqns:
        sizes += [out.aval.size for out in equation.outvars if hasattr(out.aval, "size")]
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                sizes += arrays(inner) if hasattr(inner, "eqns") else []
    return sizes


def test_logits_of_all_tokens_are_never_there_at_once():
    graphdef, params = nnx.split(make_model())
    hidden, targets = hidden_and_targets(length=96)

    def loss(params, hidden):
        return steps.token_losses(nnx.merge(graphdef, params), hidden, targets, 16).sum()

    largest = max(arrays(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, hidden).jaxpr))
    assert largest == hidden.size < targets.size * VOCAB


def test_dropout_is_a_function_of_its_key():
    """Tokens and targets that are all alike: every chunk draws for itself, and every token in it."""
    model = make_model()
    hidden = jnp.broadcast_to(hidden_and_targets()[0][:1, :1], (2, 8, WIDTH))

    @quick_jit
    def losses(seed):
        targets = jnp.full((2, 8), 40)
        return steps.token_losses(model, hidden, targets, 4, dropout_key=jax.random.key(seed))

    first, again, other = losses(1), losses(1), losses(2)
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(np.stack([first, other]))) == 32


@pytest.mark.slow
def test_a_text_read_in_parts_has_the_losses_of_the_whole():
    """By the cache, as long blocks are evaluated; decoding one token at a time gives the same probabilities."""
    config = make_config()
    graphdef, state = nnx.split(make_model())
    params = nnx.to_pure_dict(state)
    tokens = jax.random.randint(jax.random.key(0), (2, 13), 0, VOCAB)
    whole = steps.make_eval_step(config, graphdef)(params, tokens)
    step, model = quick_jit(steps.make_chunk_step(config, graphdef)), nnx.merge(graphdef, params)
    cache, parts = model.init_cache(2, 12), []
    for start in (0, 6):
        losses, cache = step(params, cache, tokens[:, start : start + 7])
        parts.append(losses)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)
    picked = np.take_along_axis(np.asarray(model(tokens[:, :-1])), np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(-picked, whole, atol=2e-5)


def test_rules_reach_vectors_projections_and_velocities():
    config = make_config()
    config.optimizer.name = "nag"
    _, shapes = steps.shapes(config, VOCAB, sharding.make_mesh(config))
    mesh = AbstractMesh((1, 2, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    tree = jax.tree_util.tree_flatten_with_path(sharding.tree_shardings(mesh, shapes))[0]
    specs = {sharding.path_of(path): leaf.spec for path, leaf in tree}
    for place in ("params", "opt_state/1/velocity"):
        for i in range(3):
            assert specs[f"{place}/embedding/words/{i}"] == PartitionSpec(None, ("fsdp", "tensor"))
            assert specs[f"{place}/embedding/projections/{i}"] == PartitionSpec(None, ("fsdp", "tensor"))
        assert specs[f"{place}/embedding/classes"] == PartitionSpec()
    assert specs["opt_state/1/learning_rate"] == PartitionSpec()


def test_products_that_every_token_needs():
    config = make_config()
    block = 4 * 32 * 32 + 3 * 32 * 64
    assert throughput.matrix_parameters(config, VOCAB) == block + 32 * 32 + 32 * (10 + 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": "adapted"}, "unknown model.vocabulary 'adapted': did you mean 'adaptive'"),
        ({"cutoffs": ()}, r"model.cutoffs \(\) must be whole numbers that ascend, above 0 and below .* size, 50"),
        ({"cutoffs": (26, 10)}, r"model.cutoffs \(26, 10\) must be whole numbers that ascend"),
        ({"cutoffs": (0, 10)}, r"each of model\.cutoffs must be at least 1, not 0"),
        ({"cutoffs": (10, 50)}, "below the vocabulary's size, 50"),
        ({"cutoffs": (10, 26.0)}, r"each of model\.cutoffs must be a whole number, not 26\.0"),
        ({"adaptive_factor": 3}, r"model.adaptive_factor 3 must divide model.d_model 32 once for each of .*\(10, 26\)"),
        ({"adaptive_factor": 0}, r"model\.adaptive_factor must be at least 1, not 0"),
        ({"adaptive_dropout": 1.0}, "model.adaptive_dropout must be at least 0 and below 1, not 1.0"),
        (
            {"tied_head": False},
            "model.vocabulary 'adaptive' ties its softmax to its input: set model.tied_head to True",
        ),
    ],
)
def test_bad_vocabularies_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Decoder(make_config(**changes), VOCAB, rngs=nnx.Rngs(0))
