"""Attention on four virtual devices in programs that are not ours; `test_callers.py` runs this in a process of its own.

    python tests/programs/caller_cases.py METHOD ...

prints one JSON object per case: the largest difference between a gradient there and on one device.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.compilation import quick_jit

from configs import smoke
from wavelet_jax.attention import attention, tiled
from wavelet_jax.attention.tiled.geometry import TileSizes
from wavelet_jax.parallel import sharding
from wavelet_jax.positions import make
from wavelet_jax.training import steps

B, T, H, K, D = 4, 40, 4, 2, 8
BATCH = PartitionSpec("batch")


def loss_of(method):
    def loss(params, query, key, value):
        return jnp.sum(jnp.sin(attention(query, key, value, method.terms(params).without_embedding(), backend="tiled")))

    return loss


def largest(found, wanted) -> float:
    found, wanted = (jax.tree.leaves(jax.tree.map(np.asarray, tree)) for tree in (found, wanted))
    return max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))


def by_shard_map(name: str, kind: AxisType) -> float:
    """The gradient of a sum over devices, taken on each of them, with `jax.shard_map`'s own checks."""
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
    loss = loss_of(make(name, num_heads=H, head_dim=D))

    def on_device(params, *arrays):
        return jax.grad(lambda *inputs: jax.lax.psum(loss(*inputs), "batch"), argnums=(0, 1, 2, 3))(params, *arrays)

    specs = PartitionSpec(), BATCH, BATCH, BATCH
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=specs)
    return compare(name, mapped, mesh, specs[1:])


def by_explicit_mesh(name: str) -> float:
    mesh = jax.make_mesh((2, 2), ("batch", "heads"))
    specs = (PartitionSpec("batch", None, "heads"),) * 3
    return compare(name, jax.grad(loss_of(make(name, num_heads=H, head_dim=D)), argnums=(0, 1, 2, 3)), mesh, specs)


def compare(name: str, function, mesh, specs) -> float:
    method = make(name, num_heads=H, head_dim=D)
    params = method.init(jax.random.key(3))
    arrays = [jax.random.normal(jax.random.key(i), (B, T, heads, D)) for i, heads in enumerate((H, K, K))]
    wanted = quick_jit(jax.grad(loss_of(method), argnums=(0, 1, 2, 3)))(params, *arrays)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
        return largest(quick_jit(function)(params, *arrays), wanted)


def train_step_in_set_mesh() -> float:
    """Our own train step with its mesh set around it, against the same step without."""
    config = smoke.get_config("shaw")
    config.mesh.update(data=2, tensor=2)
    config.model.update(num_layers=1, attention_backend="tiled")
    config.train.update(length=T, batch_size=B)
    mesh = sharding.make_mesh(config)
    tokens = np.random.default_rng(0).integers(0, 257, (1, B, T + 1)).astype(np.int32)
    tokens = jax.device_put(tokens, sharding.batch_sharding(mesh, leading=1))

    def after_one() -> tuple[dict, dict]:
        graphdef, state, _ = steps.init(config, 257, mesh)
        state, metrics = quick_jit(steps.make_train_step(config, graphdef, mesh))(state, tokens)
        return state.params, metrics

    wanted = jax.tree.map(np.asarray, after_one())
    with jax.set_mesh(mesh):
        return largest(after_one(), wanted)


if __name__ == "__main__":
    # So that a few tokens have tiles of all kinds.
    tiled.TILES = dict.fromkeys(tiled.TILES, TileSizes(rows=8, block=4, band=4, keys=8))
    for number, name in enumerate(sys.argv[1:]):
        kind = (AxisType.Auto, AxisType.Explicit)[number % 2]
        print(json.dumps({"case": f"{name} by shard_map", "error": by_shard_map(name, kind)}), flush=True)
        print(json.dumps({"case": f"{name} on an explicit mesh", "error": by_explicit_mesh(name)}), flush=True)
    print(json.dumps({"case": "train step in set_mesh", "error": train_step_in_set_mesh()}), flush=True)
