"""One call of attention, as every backend is given it."""

import dataclasses

import jax
import jax.numpy as jnp

from wavelet_jax.attention.common import Array
from wavelet_jax.errors import UserError
from wavelet_jax.hardware import devices
from wavelet_jax.positions.terms import Terms

# No entry of a constant table of relative keys has a larger error. In float32 scores this is below the rounding of
# their own sums of D products; bfloat16 rounds queries and keys by 4e-3 of their size, float16 by 5e-4.
FAR_TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-3, "float16": 1e-4}


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """Everything that a backend may ask about a call, beside its queries, keys and values.

    Attributes:
      terms: what the position method adds.
      queries, keys: T and S, tokens.
      heads, kv_heads, head_dim: H, K and D.
      dtype: of the queries.
      offset: position of query 0 minus that of key 0: an int, or traced; None: positions are not known to be
        consecutive.
      causal, window: as in `wavelet_jax.attention.attention`.
      query_positions, key_positions: int32 [T] or [B, T], and [S] or [B, S], NumPy's if they
        are known; None: only `offset` is known.
      segment_ids: int32 ([B, T], [B, S]) or None.
      mask: bool [B or 1, H or 1, T or 1, S or 1] or None; False hides a key.
      dropout_rate, dropout_key: of dropout on the attention probabilities.
      far_tolerance: as in `wavelet_jax.attention.attention`; None for the backend's own.
      varies: whether JAX tracks along which mesh axes the queries vary: inside `jax.shard_map` with `check_vma=True`.
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
    query_positions: Array | None = None
    key_positions: Array | None = None
    segment_ids: tuple[Array, Array] | None = None
    mask: jax.Array | None = None
    dropout_rate: float = 0.0
    dropout_key: jax.Array | None = None
    far_tolerance: float | None = None
    varies: bool = False

    @property
    def tolerance(self) -> float:
        """The largest error of an entry of a constant `relative_keys`: `far_tolerance`, or that of the dtype."""
        if self.far_tolerance is not None:
            return self.far_tolerance
        return FAR_TOLERANCE.get(jnp.dtype(self.dtype).name, FAR_TOLERANCE["float32"])

    @property
    def clamped_offset(self) -> int | jax.Array:
        """The offset, where causal no further below 0 than hides all keys: keeps int32 sums from wrapping."""
        offset = self.offset
        assert offset is not None, "not a call for a backend of tiles"
        if not self.causal:
            return offset
        return jnp.maximum(offset, -self.queries) if isinstance(offset, jax.Array) else max(offset, -self.queries)


def check_heads(terms: Terms, num_heads: int, head_dim: int) -> None:
    """Raises `UserError` for terms that were made for other heads than the queries' H = num_heads of D = head_dim.

    Terms of one's own may not say what they were made for; the shapes of their fields do, where they have heads.
    """

    def at(distance: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        """Arrays with heads, [H, ..], and arrays with head dimensions, [.., D]."""
        vectors = [field(distance) for field in (terms.relative_keys, terms.relative_values) if field is not None]
        fixed = [field for field in (terms.content_bias, terms.position_bias) if field is not None]
        biases = [] if terms.bias is None else [terms.bias(distance)]
        return [x for x in vectors if x.ndim == distance.ndim + 2] + fixed + biases, vectors + fixed

    with_heads, with_dimensions = jax.eval_shape(at, jax.ShapeDtypeStruct((1,), jnp.int32))
    for size, made, have in (
        ("num_heads", {x.shape[0] for x in with_heads} | {terms.num_heads}, num_heads),
        ("head_dim", {x.shape[-1] for x in with_dimensions} | {terms.head_dim}, head_dim),
    ):
        if other := {size for size in made if size is not None} - {have}:
            raise UserError(f"the position method was made for {size}={min(other)}, the queries have {have}")


def unsupported_by_tiles(call: Call) -> list[str]:
    """Reasons why no backend of tiles supports a call: each needs consecutive positions, and has no dropout."""
    found = []
    if call.offset is None:
        found.append("consecutive positions (leave them out, give scalars, or give arrays that are not traced)")
    if call.dropout_rate:
        found.append("no attention dropout")
    return found


def would_replicate() -> bool:
    """Whether a kernel that is traced here would be replicated: run in full on every device.

    XLA cannot divide a kernel's arrays among devices; inside a `jax.shard_map` over the whole mesh they are divided.
    """
    mesh = jax.sharding.get_abstract_mesh()
    divided = mesh.manual_axes and set(mesh.manual_axes) == set(mesh.axis_names)
    return devices.count() > 1 and not divided
