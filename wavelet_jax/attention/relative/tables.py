"""A constant table of relative keys as NumPy: its numbers, known while tracing, and how far they matter."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from wavelet_jax.concrete import concretely
from wavelet_jax.positions.terms import Terms

# Factors go from the local band to the furthest distance that matters: the furthest that there is, or at a traced
# offset, all of the support. If that is this much past the lengths themselves (queries at position 2^30 over keys at 0,
# scales of 2^20), they would cost seconds, or gigabytes, for short sequences: the near form then serves everywhere.
MAX_FACTOR_DISTANCE = 2**14


def are_known(terms: Terms) -> bool:
    """Whether the numbers of relative_keys are known while tracing: there is one, and it reads nothing that is traced.

    An array that lies on several devices is as good as traced: to read it would be a program for all of them.
    """
    if terms.relative_keys is None:
        return False
    reads = jax.make_jaxpr(terms.relative_keys)(jax.ShapeDtypeStruct((1,), jnp.int32)).consts
    arrays = [x for x in reads if isinstance(x, jax.Array)]
    return not any(isinstance(x, Tracer) or len(x.sharding.device_set) > 1 for x in arrays)


def evaluate(terms: Terms, highest: int, lowest: int) -> np.ndarray:
    """relative_keys, which are known, of the distances highest, highest - 1, .., lowest: [n, D] or [H, n, D]."""
    assert terms.relative_keys is not None
    with concretely():
        return np.asarray(terms.relative_keys(jnp.arange(highest, lowest - 1, -1, dtype=jnp.int32)))


def support_at(terms: Terms, tolerance: float, margin: int) -> int | None:
    """A distance, tokens, past which a constant relative_keys is within the tolerance of 0; None: not known.

    `Terms.support` is stated for the method's own tolerance: twice as far, the table is seen to be down to ours, in
    `margin` distances on both sides.
    """
    if terms.support is None:
        return None
    far = 2 * terms.support
    ends = evaluate(terms, far + margin, far), evaluate(terms, -far, -far - margin)
    return far if max(np.max(np.abs(end)) for end in ends) <= tolerance else None
