"""The device mesh, and where every array of a run lies on it."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from wavelet_jax.attention.sharded import divisors, zigzag
from wavelet_jax.errors import UserError
from wavelet_jax.hardware import devices

# Neighbours along the last axes are neighbours in the machine: `tensor` exchanges most often, then `context`.
AXES = ("data", "fsdp", "context", "tensor")

# The first rule whose regex is found in an array's path gives its partition, of parameters and of the optimizer's
# moments alike. Paths are those of the parameter tree, "blocks/0/query/kernel". Along `context` all are whole.
RULES = (
    (r"(^|/)position/", PartitionSpec()),
    # The vocabulary need not divide; of an adaptive one the narrowest vectors must.
    (r"embedding/(embedding|words/\d+|projections/\d+)$", PartitionSpec(None, ("fsdp", "tensor"))),
    (r"head/kernel$", PartitionSpec(("fsdp", "tensor"), None)),
    (r"(query|key|value|up|gate)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(out|down)/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"", PartitionSpec()),
)
# Arrays of all layers, whose first axis counts these, and whose others are those of the rules.
STACKED = re.compile(r"(^|/)layers/")
BATCH = PartitionSpec(("data", "fsdp"))

# What the dimensions of activations are divided over; see `constrain`. A token's own numbers (E) are whole.
DIMENSIONS = {"batch": ("data", "fsdp"), "length": "context", "heads": "tensor", "width": "tensor"}
# The same for `attention.sharded`.
ATTENTION_AXES = {"batch_axes": ("data", "fsdp"), "length_axis": "context", "head_axis": "tensor"}


def make_mesh(config: ConfigDict) -> Mesh:
    """The mesh of `config.mesh` over `devices.current()`. Raises `UserError` where it does not fit them, or the run."""
    shape = mesh_shape(config, devices.count())
    # Auto: the compiler places what no rule names. The default, Explicit, is refused by embedding look-ups.
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=types, devices=devices.current())


def mesh_shape(config: ConfigDict, count: int) -> dict[str, int]:
    """{axis: size} for this number of devices, in the order of `AXES`; errors as `make_mesh`."""
    sizes = {
        "data": config.mesh.data,
        "fsdp": config.mesh.fsdp,
        "context": config.mesh.context,
        "tensor": config.mesh.tensor,
    }
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if list(sizes.values()).count(-1) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh sizes must be positive, with -1 at most once: {shown}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if count % fixed or (fixed != count and -1 not in sizes.values()):
        wanted = f"a multiple of {fixed}" if -1 in sizes.values() else fixed
        raise UserError(f"mesh {shown} takes {wanted} devices; there are {count}")
    shape = {axis: count // fixed if size == -1 else size for axis, size in sizes.items()}
    heads, tensor = config.model.num_kv_heads, shape["tensor"]
    if heads % tensor:  # and so, num_kv_heads dividing num_heads, those too
        raise UserError(
            f"mesh.tensor {tensor} does not divide model.num_kv_heads {heads}: mesh.tensor may be {divisors(heads)}"
        )
    length, context = config.train.length, shape["context"]
    if context > 1 and length % (2 * context):
        below = length - length % (2 * context)
        fits = [size for size in range(1, count + 1) if size == 1 or length % (2 * size) == 0]
        fits = ", ".join(str(size) for size in fits if count % size == 0)
        raise UserError(
            f"mesh.context {context} does not divide train.length {length}, which each device holds two runs of: "
            f"train.length may be {f'{below} or ' if below else ''}{below + 2 * context}, or mesh.context {fits}"
        )
    return shape


def batch_devices(mesh: Mesh) -> int:
    """Number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Raises `UserError` where a batch cannot be cut evenly over the mesh."""
    parts = config.train.accumulation * batch_devices(mesh)
    if config.train.batch_size % parts:
        raise UserError(
            f"train.batch_size {config.train.batch_size} must be a multiple of {parts}: train.accumulation "
            f"{config.train.accumulation} x mesh data {mesh.shape['data']} x mesh fsdp {mesh.shape['fsdp']}"
        )


def path_of(key_path: tuple) -> str:
    """A tree path as the rules see it: "opt_state/1/0/mu/blocks/0/query/kernel"."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def tree_shardings(mesh: Mesh, tree):
    """A `NamedSharding` for every array (or `ShapeDtypeStruct`) of a tree, by `RULES`."""

    def place(key_path, leaf) -> NamedSharding:
        path = path_of(key_path)
        spec = next(spec for pattern, spec in RULES if re.search(pattern, path))
        if spec and STACKED.search(path):
            spec = PartitionSpec(None, *spec)
        if len(spec) > len(leaf.shape):  # an optimizer's scalars share the paths of what they count
            spec = PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise UserError(f"{path} {leaf.shape} cannot be split as {spec} over mesh {dict(mesh.shape)}") from error
        return sharding

    return jax.tree_util.tree_map_with_path(place, tree)


def placed(mesh: Mesh, shapes):
    """A tree of arrays' shapes (anything with shape and dtype) as `ShapeDtypeStruct`s with their `tree_shardings`."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        tree_shardings(mesh, shapes),
    )


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The sharding of a batch of tokens: its batch dimension over data and fsdp, after `leading` whole ones.

    Along `context` all of a row is on every device: it is one token longer than what the model reads, and small.
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, *BATCH))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Whole on each device."""
    return NamedSharding(mesh, PartitionSpec())


def load_batch(
    read: Callable[[int, int], np.ndarray], start: int, shape: tuple[int, ...], mesh: Mesh, leading: int = 0
) -> jax.Array:
    """Windows as one array over all processes, int32; each process reads those that its own devices hold.

    Args:
      read: (first, count) -> windows number first .. first + count - 1, [count, ..], such as `data.Windows.batch`.
      start: number of the batch's first window.
      shape: (rows, ..), or with 1 leading dimension (parts, rows, ..): window (part, row) is then number
        start + part * rows + row. Rows are split as `batch_sharding` says; their numbers are the same however many
        processes and devices there are.
    """
    *parts, rows = shape[: leading + 1]
    seen = {}  # devices along axes that do not split rows hold the same ones

    def held(index: Any) -> np.ndarray:
        row, stop, _ = index[leading].indices(rows)
        if row not in seen:
            windows = [read(start + part * rows + row, stop - row) for part in range(math.prod(parts))]
            seen[row] = np.concatenate(windows).reshape(*parts, stop - row, *shape[leading + 1 :])
        return seen[row]

    sharding = batch_sharding(mesh, leading)
    places = sharding.addressable_devices_indices_map(shape)
    # `jax.make_array_from_callback` would do the same by transfers that `jax.transfer_guard` does not allow.
    shards = jax.device_put([held(index) for index in places.values()], list(places))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def constrain(x: jax.Array, mesh: Mesh | None, *dimensions: str | None) -> jax.Array:
    """Says how an activation is divided, a name of `DIMENSIONS` (None: whole) for each dimension.

    Without a mesh, or on one device, x is as it was.
    """
    if mesh is None or mesh.size == 1:
        return x
    spec = PartitionSpec(*(name and DIMENSIONS[name] for name in dimensions))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


# -- the order of tokens along `context` ----------------------------------------------------------------------------


def token_order(length: int, mesh: Mesh | None) -> np.ndarray:
    """Positions, int32 [length], in the order in which a train step holds tokens: 0, 1, 2, .. where it is not divided.

    Everything between the first embedding and the losses is in this order; see `zigzag`.
    """
    return zigzag(length, 1 if mesh is None else mesh.shape["context"])


def into_order(x_BxT: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Numbers of tokens, in their own order, as a train step holds them: divided over batch and length."""
    if mesh is None or mesh.shape["context"] == 1:
        return x_BxT
    return constrain(x_BxT[:, token_order(x_BxT.shape[1], mesh)], mesh, "batch", "length")


def out_of_order(x_BxT: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The inverse of `into_order`."""
    if mesh is None or mesh.shape["context"] == 1:
        return x_BxT
    return x_BxT[:, np.argsort(token_order(x_BxT.shape[1], mesh))]
