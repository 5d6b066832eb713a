"""Nesterov's accelerated gradient as fairseq has it (`fairseq.optim.nag`; the paper, section 6.1 and A.7).

The form of Bengio et al. (arXiv 1212.0901), in which parameters are already where the momentum takes them. With the
learning rates l_t, c = l_t / l_(t-1), the gradient g and momentum mu:

    p += mu^2 c v - (1 + mu) l_t g
    v  = mu c v - l_t g

The velocity v is in units of parameters, and c rescales it where the learning rate changes. `optax.sgd(nesterov=True)`
keeps its trace in units of gradients: the same where the learning rate is constant.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class NagState(NamedTuple):
    """count: updates made, int32. learning_rate: of the last one. velocity: v, like the parameters."""

    count: jax.Array
    learning_rate: jax.Array
    velocity: optax.Updates


def nag(schedule: optax.Schedule, momentum: float) -> optax.GradientTransformation:
    """The transformation of a learning rate's schedule and a momentum in [0, 1)."""

    def init(params: optax.Params) -> NagState:
        return NagState(jnp.int32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params))

    def update(grads: optax.Updates, state: Any, params: optax.Params | None = None):
        del params
        rate = jnp.asarray(schedule(state.count), jnp.float32)
        # Before the first update v is 0, and after one at a learning rate of 0 too: any c will do.
        c = jnp.where(state.learning_rate > 0, rate / state.learning_rate, 1.0)
        updates = jax.tree.map(
            lambda v, g: momentum**2 * c * v - (1 + momentum) * rate * g,
            state.velocity,
            grads,
        )
        velocity = jax.tree.map(lambda v, g: momentum * c * v - rate * g, state.velocity, grads)
        return updates, NagState(jnp.asarray(optax.safe_increment(state.count)), rate, velocity)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]  # optax: `updates`
