"""A training state of a few arrays and its checkpoints, for tests and the programs that they start."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from wavelet_jax.runs import checkpoint
from wavelet_jax.training import steps

FINGERPRINT = "f" * 64


def make_state(step: int) -> steps.State:
    """A state of a few arrays, all of whose numbers tell the step; large enough for files of their own."""
    rng = np.random.default_rng(step)
    arrays = {name: jnp.asarray(rng.normal(size=(64, 40)), jnp.float32) for name in ("kernel", "embedding")}
    moments = ({"mu": jax.tree.map(lambda x: x * 2, arrays), "count": jnp.int32(step)},)
    return steps.State(jnp.int32(step), arrays, moments, skipped=jnp.int32(step + 5), skipped_in_a_row=jnp.int32(1))


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def same(left, right) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def restore(workdir: Path):
    return checkpoint.restore(workdir, abstract(make_state(0)), fingerprint=FINGERPRINT)


def flip(path: Path, where: float, mask: int) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= mask
    path.write_bytes(data)


def over_processes(state):
    """The state with every array divided over the four devices of two processes."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def place(leaf):
        spec = PartitionSpec("data") if leaf.ndim else PartitionSpec()
        return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, spec), np.asarray(leaf).__getitem__)

    return jax.tree.map(place, state)
