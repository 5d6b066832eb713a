"""Attention over a mesh equals one device's, forward and backward, and its positions are global ones."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from programs.sharded_cases import AXES, CASES, MESH
from support.project import ROOT, environment
from support.tolerances import OUTPUT, SHARED_BY_KEYS

from wavelet_jax.attention import sharded
from wavelet_jax.errors import UserError
from wavelet_jax.positions import make

# What the default tests run; the others are slow.
QUICK = ("wavelet", "rope", "wavelet-window-segments", "alibi-documents")
# Their positions are added to the embedding, outside of attention, or are none.
WITHOUT_DISTANCES = ("sinusoidal", "learned", "nope")


def compare(*cases: str) -> list[dict]:
    command = [sys.executable, str(ROOT / "tests" / "programs" / "sharded_cases.py"), *cases]
    out = subprocess.run(command, cwd=ROOT, env=environment(devices=8), capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    results = [json.loads(line) for line in out.stdout.splitlines()]
    assert [result["case"] for result in results] == list(cases)
    return results


def check(results: list[dict]) -> None:
    for result in results:
        assert result["out"] < OUTPUT, result
        assert result["gradients"] < SHARED_BY_KEYS, result
        # Local offsets instead of global ones could not pass for right.
        if not result["case"].startswith(WITHOUT_DISTANCES):
            assert result["by_local_offsets"] > 1000 * OUTPUT, result


def test_eight_devices_compute_what_one_does():
    check(compare(*QUICK))


@pytest.mark.slow
def test_eight_devices_compute_what_one_does_in_every_case():
    check(compare(*(case for case in CASES if case not in QUICK)))


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_every_device_has_the_same_work_under_a_causal_mask(shards):
    order = sharded.zigzag(96, shards)
    assert sorted(order) == list(range(96))
    seen = (order + 1).reshape(shards, -1).sum(axis=1)  # keys that the queries of a device see
    assert len(set(seen)) == 1
    own = order.reshape(shards, 2, -1)
    assert (np.diff(own, axis=2) == 1).all()  # in runs of consecutive positions


def test_one_device_has_tokens_as_they_are():
    np.testing.assert_array_equal(sharded.zigzag(7, 1), np.arange(7))


def shapes_of(batch: int = 2, length: int = 48, kv_heads: int = 2) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((batch, length, heads, 16), jnp.float32) for heads in (4, kv_heads, kv_heads)]


def attend(method, shapes) -> jax.ShapeDtypeStruct:
    """What attention over `MESH` comes to, of a method without parameters."""
    mesh = AbstractMesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * len(MESH))
    positions = np.arange(shapes[0].shape[1])
    return jax.eval_shape(lambda *x: sharded.attention(*x, method.terms, {}, positions, mesh=mesh, **AXES), *shapes)


def test_a_method_made_for_other_heads_is_refused():
    """For as many as a device has, too: cut for the second device, those would be the first one's again."""
    with pytest.raises(UserError, match="the position method was made for num_heads=2, the queries have 4"):
        attend(make("alibi", num_heads=2, head_dim=16), shapes_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"length": 50},
            "a length of 50 cannot be split over 2 devices: it must be a multiple of 4 .* such as 48 or 52",
        ),
        ({"kv_heads": 1}, r"1 key heads cannot be split over 2 devices \(tensor\): 1 can"),
        ({"batch": 3}, r"a batch of 3 cannot be split over 2 devices \(data\)"),
    ],
)
def test_what_cannot_be_split_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        attend(make("rope", num_heads=4, head_dim=16), shapes_of(**changes))
