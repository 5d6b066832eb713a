"""A constant table of relative keys as NumPy: its numbers, known while tracing, and how far they matter."""

import jax
import jax.numpy as jnp
import numpy as np

from wavelet_jax.positions.terms import Terms


def evaluate(terms: Terms, highest: int, lowest: int) -> np.ndarray | None:
    """relative_keys of the distances highest, highest - 1, .., lowest: [n, D] or [H, n, D]; None where it is traced."""
    with jax.ensure_compile_time_eval():
        table = terms.relative_keys(jnp.arange(highest, lowest - 1, -1, dtype=jnp.int32))
    return None if isinstance(table, jax.core.Tracer) else np.asarray(table)


def reach(terms: Terms, tolerance: float, margin: int) -> int | None:
    """A distance, tokens, past which a constant relative_keys is within the tolerance of 0; None: not known.

    `Terms.support` is stated for the method's own tolerance: twice as far, the table is seen to be down to ours, in
    `margin` distances on both sides.
    """
    if terms.support is None:
        return None
    far = 2 * terms.support
    ends = evaluate(terms, far + margin, far), evaluate(terms, -far, -far - margin)
    return far if max(np.max(np.abs(end)) for end in ends) <= tolerance else None
