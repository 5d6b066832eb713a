"""The mesh, the rules, and that a run computes the same on one device and on eight virtual ones."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from support.project import program, run

from configs import smoke
from wavelet_jax.errors import UserError
from wavelet_jax.parallel import sharding
from wavelet_jax.training import steps

ONE = {"data": -1}

# Sums over devices are taken in another order, which rounds losses by a few 2^-24 = 6e-8 of themselves, and gradients
# likewise; Adam divides these by the roots of small second moments, so that it grows a little with every update.
# Measured over nine meshes: 1.6e-7 to 2.4e-7 at the first update, at most 6.3e-7 within 20; here eight times that, for
# the sums of other machines.
ROUNDING = 5e-6
# One target's loss is no mean over 1,024 of them, in which such errors cancel: at most 2.0e-6 (measured).
TARGET_ROUNDING = 1.6e-5


def losses(devices: int, method: str, steps: int, dropout: float, changes: dict, *shapes: dict[str, int]) -> list[dict]:
    out = run(program("mesh_losses", json.dumps([method, steps, dropout, changes, shapes])), devices=devices)
    assert out.returncode == 0, out.stderr
    return [json.loads(line) for line in out.stdout.splitlines()]


def compare(
    method: str, steps: int, dropout: float, *shapes: dict[str, int], changes: dict | None = None
) -> list[float]:
    """Holds runs on meshes of eight devices to that on one; returns the share of parameters that a device holds.

    changes: {"section.key": value} of the config, JSON values.
    """
    changes = changes or {}
    (one,), runs = losses(1, method, steps, dropout, changes, ONE), losses(8, method, steps, dropout, changes, *shapes)
    assert len(runs) == len(shapes)
    assert one["losses"][-1] < one["losses"][0]
    for shape, there in zip(shapes, runs, strict=True):
        np.testing.assert_allclose(there["losses"], one["losses"], rtol=ROUNDING, err_msg=str(shape))
        # Losses of targets differ by far more than this: they stand in the order of the text.
        np.testing.assert_allclose(there["by_token"], one["by_token"], rtol=TARGET_ROUNDING, err_msg=str(shape))
    return [there["held"] for there in runs]


@pytest.mark.slow
def test_a_mixed_mesh_computes_what_one_device_does():
    (held,) = compare("wavelet", 3, 0.0, {"data": -1, "fsdp": 2, "context": 2, "tensor": 2})
    assert held < 0.5


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    """Shaw's vectors are learned, of each layer; dropout falls on the same numbers where the length is not divided."""
    shapes = [
        {"data": -1},
        {"data": 1, "fsdp": -1},
        {"data": 4, "tensor": 2},
        {"data": 2, "fsdp": 2, "tensor": 2},
    ]
    data, fsdp, _, mixed = compare("shaw", 20, 0.1, *shapes)
    assert data == 1
    assert fsdp < 0.4  # positions and norms are whole on each device
    assert mixed < 0.5


@pytest.mark.slow
def test_a_divided_length_computes_what_a_whole_one_does():
    shapes = [
        {"data": 1, "context": -1},
        {"data": 2, "context": 4},
        {"data": 1, "fsdp": 4, "context": 2},
        {"data": 1, "context": 4, "tensor": 2},
        {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
    ]
    compare("wavelet", 20, 0.0, *shapes)


@pytest.mark.slow
def test_an_adaptive_vocabulary_and_nag_compute_on_meshes_what_they_do_on_one_device():
    shapes = [{"data": -1}, {"data": 2, "fsdp": 2, "context": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
    changes = {"model.vocabulary": "adaptive", "model.cutoffs": [40, 120], "model.adaptive_factor": 2}
    changes |= {"optimizer.name": "nag", "optimizer.learning_rate": 0.1}
    compare("wavelet", 10, 0.0, *shapes, changes=changes)


def make_config(method="wavelet", **mesh):
    config = smoke.get_config(method)
    config.mesh.update(mesh)
    return config


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data": 3}, "mesh data 3 x fsdp 1 x context 1 x tensor 1 takes 3 devices; there are 1"),
        ({"fsdp": 2}, "mesh data -1 x fsdp 2 x context 1 x tensor 1 takes a multiple of 2 devices; there are 1"),
        ({"fsdp": -1}, "mesh sizes must be positive, with -1 at most once: data -1 x fsdp -1 x context 1 x tensor 1"),
        ({"tensor": 0}, "mesh sizes must be positive"),
    ],
)
def test_a_mesh_that_does_not_fit_shows_the_arithmetic(mesh, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(make_config(**mesh))


@pytest.mark.parametrize(
    ("devices", "mesh", "model", "length", "message"),
    [
        (12, {"tensor": 3}, 4, 64, "mesh.tensor 3 does not divide model.num_kv_heads 4: mesh.tensor may be 1, 2 or 4"),
        (8, {"context": -1, "data": 1}, 4, 40, "train.length may be 32 or 48, or mesh.context 1, 2, 4"),
        (
            16,
            {"context": 16},
            4,
            20,
            "mesh.context 16 does not divide train.length 20, .* may be 32, or mesh.context 1, 2",
        ),
    ],
)
def test_heads_and_lengths_that_do_not_divide_are_refused_with_those_that_do(devices, mesh, model, length, message):
    config = make_config(**mesh)
    config.model.update(num_heads=model, num_kv_heads=model)
    config.train.length = length
    with pytest.raises(UserError, match=message):
        sharding.mesh_shape(config, devices)


def test_sizes_of_all_axes():
    config = make_config(context=2, tensor=2)
    assert sharding.mesh_shape(config, 24) == {"data": 6, "fsdp": 1, "context": 2, "tensor": 2}


def shardings(mesh: AbstractMesh, method: str, **model) -> dict[str, PartitionSpec]:
    config = make_config(method)
    config.model.update(model)
    _, _, shapes = steps.init(config, 257, sharding.make_mesh(config))
    tree = sharding.tree_shardings(mesh, shapes)
    return {sharding.path_of(path): leaf.spec for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_rules_reach_parameters_and_moments_alike():
    mesh = AbstractMesh((1, 2, 1, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    specs = shardings(mesh, "transformer_xl")
    for place in ("params", "opt_state/1/0/mu", "opt_state/1/0/nu"):
        assert specs[f"{place}/blocks/1/query/kernel"] == PartitionSpec("fsdp", "tensor")
        assert specs[f"{place}/blocks/1/down/kernel"] == PartitionSpec("tensor", "fsdp")
        assert specs[f"{place}/embedding/embedding"] == PartitionSpec(None, ("fsdp", "tensor"))
        assert specs[f"{place}/blocks/0/position/projection"] == PartitionSpec()
        assert specs[f"{place}/blocks/0/attention_norm/scale"] == PartitionSpec()
    assert specs["step"] == PartitionSpec()


def test_stacked_layers_are_divided_as_each_of_them():
    mesh = AbstractMesh((1, 2, 1, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    listed = shardings(mesh, "transformer_xl", scan_layers="never")
    stacked = shardings(mesh, "transformer_xl", scan_layers="always")
    of_layers = {path: spec for path, spec in stacked.items() if "/layers/" in path}
    assert len(of_layers) == sum("/blocks/0/" in path for path in listed)
    for path, spec in of_layers.items():
        one = listed[path.replace("/layers/", "/blocks/0/")]
        assert spec == (PartitionSpec(None, *one) if one else one), path


def test_an_array_that_cannot_be_split_is_named():
    mesh = AbstractMesh((1, 3, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    with pytest.raises(UserError, match=r"params/blocks/0/down/kernel \(64, 32\) cannot be split as"):
        shardings(mesh, "rope")
