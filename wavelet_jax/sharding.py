"""The device mesh, and where every array of a run lies on it."""

import math
import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from wavelet_jax import devices
from wavelet_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# The first rule whose regex is found in an array's path gives its partition, of parameters and of the optimizer's
# moments alike. Paths are those of the parameter tree, "blocks/0/query/kernel".
RULES = (
    (r"(^|/)position/", PartitionSpec()),
    (r"embedding/embedding$", PartitionSpec(None, ("fsdp", "tensor"))),  # the vocabulary need not divide
    (r"head/kernel$", PartitionSpec(("fsdp", "tensor"), None)),
    (r"(query|key|value|up|gate)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(out|down)/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"", PartitionSpec()),
)
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(config: ConfigDict) -> Mesh:
    """The mesh of `config.mesh` over `devices.current()`. Raises `UserError` where the sizes do not fit them."""
    sizes = {"data": config.mesh.data, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
    count = devices.count()
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if list(sizes.values()).count(-1) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh sizes must be positive, with -1 at most once: {shown}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if count % fixed or (fixed != count and -1 not in sizes.values()):
        wanted = f"a multiple of {fixed}" if -1 in sizes.values() else fixed
        raise UserError(f"mesh {shown} takes {wanted} devices; there are {count}")
    shape = tuple(count // fixed if size == -1 else size for size in sizes.values())
    if config.model.num_kv_heads % shape[-1]:
        raise UserError(f"mesh.tensor {shape[-1]} must divide model.num_kv_heads {config.model.num_kv_heads}")
    # Auto: the compiler places what no rule names. The default, Explicit, is refused by embedding look-ups.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices.current())


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Raises `UserError` where a batch cannot be cut evenly over the mesh."""
    parts = config.train.accumulation * mesh.shape["data"] * mesh.shape["fsdp"]
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
        if len(spec) > len(leaf.shape):  # an optimizer's scalars share the paths of what they count
            spec = PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise UserError(f"{path} {leaf.shape} cannot be split as {spec} over mesh {dict(mesh.shape)}") from error
        return sharding

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Where a batch of tokens lies: its batch dimension over data and fsdp, after `leading` whole ones."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, *BATCH))
