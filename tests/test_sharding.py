"""The mesh, the rules, and that a run computes the same on one device and on eight virtual ones."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from configs import smoke
from wavelet_jax import sharding, training
from wavelet_jax.errors import UserError

LOSSES = """
import json, sys, jax, numpy as np
from configs import smoke
from wavelet_jax import sharding, training

tokens = np.random.default_rng(0).integers(0, 257, (5, 2, 8, 65)).astype(np.int32)
for shape in json.loads(sys.argv[1]):
    config = smoke.get_config("shaw")
    config.mesh.update(shape)
    config.train.update(batch_size=16, accumulation=2)
    config.model.update(dropout=0.1, num_layers=1)
    mesh = sharding.make_mesh(config)
    graphdef, state, abstract_state = training.init(config, 257, mesh)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract_state), strict=True):
        assert leaf.sharding == wanted.sharding
    train_step = jax.jit(training.make_train_step(config, graphdef))
    losses = []
    for batch in tokens:
        state, metrics = train_step(state, jax.device_put(batch, sharding.batch_sharding(mesh, leading=1)))
        losses.append(float(metrics["loss"]))
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params))
    print(json.dumps({"losses": losses, "held": held / whole}))
"""


def losses(devices: int, *shapes: dict[str, int]) -> list[dict]:
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", LOSSES, json.dumps(shapes)]
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    return [json.loads(line) for line in out.stdout.splitlines()]


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    """Sums over devices are taken in another order: rounding, grown a little by each of 5 Adam updates."""
    shapes = [{"data": -1}, {"data": 1, "fsdp": -1}, {"data": 2, "fsdp": 2, "tensor": 2}]
    (one,) = losses(1, {"data": -1})
    data, fsdp, mixed = losses(8, *shapes)
    for run in (data, fsdp, mixed):
        np.testing.assert_allclose(run["losses"], one["losses"], rtol=2e-5)
    assert one["losses"][-1] < one["losses"][0]
    assert data["held"] == 1
    assert fsdp["held"] < 0.4  # positions and norms are whole on each device
    assert mixed["held"] < 0.5


def make_config(**mesh):
    config = smoke.get_config()
    config.mesh.update(mesh)
    return config


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data": 3}, "mesh data 3 x fsdp 1 x tensor 1 takes 3 devices; there are 1"),
        ({"fsdp": 2}, "mesh data -1 x fsdp 2 x tensor 1 takes a multiple of 2 devices; there are 1"),
        ({"fsdp": -1}, "mesh sizes must be positive, with -1 at most once: data -1 x fsdp -1 x tensor 1"),
        ({"tensor": 0}, "mesh sizes must be positive"),
    ],
)
def test_a_mesh_that_does_not_fit_shows_the_arithmetic(mesh, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(make_config(**mesh))


def shardings(mesh: AbstractMesh, method: str) -> dict[str, PartitionSpec]:
    config = make_config()
    config.position.method = method
    _, _, shapes = training.init(config, 257, sharding.make_mesh(config))
    tree = sharding.tree_shardings(mesh, shapes)
    return {sharding.path_of(path): leaf.spec for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_rules_reach_parameters_and_moments_alike():
    mesh = AbstractMesh((1, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    specs = shardings(mesh, "transformer_xl")
    for place in ("params", "opt_state/1/0/mu", "opt_state/1/0/nu"):
        assert specs[f"{place}/blocks/1/query/kernel"] == PartitionSpec("fsdp", "tensor")
        assert specs[f"{place}/blocks/1/down/kernel"] == PartitionSpec("tensor", "fsdp")
        assert specs[f"{place}/embedding/embedding"] == PartitionSpec(None, ("fsdp", "tensor"))
        assert specs[f"{place}/blocks/0/position/projection"] == PartitionSpec()
        assert specs[f"{place}/blocks/0/attention_norm/scale"] == PartitionSpec()
    assert specs["step"] == PartitionSpec()


def test_an_array_that_cannot_be_split_is_named():
    mesh = AbstractMesh((1, 3, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(UserError, match=r"params/blocks/0/down/kernel \(64, 32\) cannot be split as"):
        shardings(mesh, "rope")
