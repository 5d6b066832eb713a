"""One call of attention as a backend judges it, before any array is computed."""

import dataclasses

import jax
import jax.numpy as jnp

from wavelet_jax.errors import UserError
from wavelet_jax.hardware import devices
from wavelet_jax.positions.terms import Terms


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """Everything by which a backend may or may not carry a call.

    Attributes:
      terms: what the position method adds.
      queries, keys: T and S, tokens.
      heads, kv_heads, head_dim: H, K and D.
      dtype: of the queries.
      offset: position of query 0 less that of key 0: an int, or traced; None: positions are not known to be
        consecutive.
      causal, window: as in `wavelet_jax.attention.attention`.
      segments: whether there are segment ids.
      dropout: whether attention probabilities are dropped.
      varies: whether JAX tracks along which mesh axes the queries vary: inside `jax.shard_map` with `check_vma=True`.
      far_tolerance: as in `wavelet_jax.attention.attention`; None for the backend's own.
    """

    terms: Terms
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    offset: int | jax.Array | None
    causal: bool = True
    window: int | None = None
    segments: bool = False
    dropout: bool = False
    varies: bool = False
    far_tolerance: float | None = None


def check_heads(terms: Terms, num_heads: int, head_dim: int) -> None:
    """Raises `UserError` for terms that were made for other heads than the queries' H = num_heads of D = head_dim.

    Terms of one's own may not say what they were made for; the shapes of their fields do, where they have heads.
    """

    def at(distance: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        """What has heads, [H, ..], and what has head dimensions, [.., D]."""
        vectors = [field(distance) for field in (terms.relative_keys, terms.relative_values) if field is not None]
        fixed = [field for field in (terms.content_bias, terms.position_bias) if field is not None]
        biases = [] if terms.bias is None else [terms.bias(distance)]
        return [x for x in vectors if x.ndim == distance.ndim + 2] + fixed + biases, vectors + fixed

    with_heads, with_dimensions = jax.eval_shape(at, jax.ShapeDtypeStruct((1,), jnp.int32))
    for size, made, have in (
        ("num_heads", {x.shape[0] for x in with_heads} | {terms.num_heads}, num_heads),
        ("head_dim", {x.shape[-1] for x in with_dimensions} | {terms.head_dim}, head_dim),
    ):
        if other := made - {have, None}:
            raise UserError(f"the position method was made for {size}={min(other)}, the queries have {have}")


def consecutive_only(call: Call) -> list[str]:
    """The obstacles of every backend of tiles."""
    found = []
    if call.offset is None:
        found.append("consecutive positions (leave them out, give scalars, or give arrays that are not traced)")
    if call.dropout:
        found.append("no attention dropout")
    return found


def is_repeated() -> bool:
    """Whether a kernel in this traced function would do the work of all devices on each of them.

    XLA cannot divide a kernel's arrays among devices; inside of a `jax.shard_map` over the whole mesh they are divided.
    """
    mesh = jax.sharding.get_abstract_mesh()
    divided = mesh.manual_axes and set(mesh.manual_axes) == set(mesh.axis_names)
    return devices.count() > 1 and not divided
