"""Attention with its sequence over several devices: ours (keys gathered), a ring, and one device.

    python benchmarks/sharded.py                                             4 virtual devices on this machine's cores
    python benchmarks/sharded.py --devices=8 --length=8192 --methods=rope

Causal, one sequence, forward and backward. The cases take turns in one process (benchmarks/measure.py): times are over
one device's, medians over rounds [quartiles]. Virtual devices share the same cores, so a ratio of 1 is the best that
there is, and what is above it is work that a device would do twice or wait for. Memory is the compiler's count of
temporaries per device. Errors are the largest differences from one device's output and gradients.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.sharding import AxisType, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not installed

from benchmarks import measure, ring
from wavelet_jax import positions
from wavelet_jax.attention import attention, sharded
from wavelet_jax.commands import cli
from wavelet_jax.errors import UserError
from wavelet_jax.files.reading import user_path
from wavelet_jax.runs import directory

DEVICES = flags.DEFINE_integer("devices", 4, "along the length; virtual ones on a CPU")
LENGTH = flags.DEFINE_integer("length", 4096, "tokens, a multiple of twice that")
HEADS = flags.DEFINE_integer("heads", 4, "heads of queries, keys and values")
HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "size of a head")
METHODS = flags.DEFINE_list("methods", ["wavelet", "rope"], "position methods: those without learned tables or biases")
ROUNDS = flags.DEFINE_integer("rounds", 7, "turns of every case")
OUT = flags.DEFINE_string("out", str(Path(__file__).parent / "results" / "sharded.json"), "the results")

ONE, GATHERED, RING = "one device", "gathered", "ring"
AXIS = "context"


def main() -> None:
    directory.check_least({"--devices": (DEVICES.value, 1), "--rounds": (ROUNDS.value, 1)})
    jax.config.update("jax_num_cpu_devices", DEVICES.value)
    if jax.device_count() < DEVICES.value:
        raise UserError(f"--devices={DEVICES.value}: there are {jax.device_count()}")
    results = {"environment": measure.environment(), "rows": []}
    for name in METHODS.value:
        results["rows"] += _measure(name)
        measure.write_results(user_path(OUT.value, "--out"), results)
    print(OUT.value)


def _measure(name: str) -> list[dict]:
    """The rows of one method: a case each."""
    method = positions.make(name, num_heads=HEADS.value, head_dim=HEAD_DIM.value)
    params = method.init(jax.random.key(0))
    terms = method.terms(params)
    if params or terms.bias is not None:
        raise UserError(f"the ring carries rotations and constant relative keys, not {name}")
    order = sharded.zigzag(LENGTH.value, DEVICES.value)
    mesh = jax.make_mesh((DEVICES.value,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[: DEVICES.value])
    spec = PartitionSpec(None, AXIS)

    def gathered(query, key, value):
        return sharded.attention(query, key, value, method.terms, {}, order, mesh=mesh, length_axis=AXIS)

    def in_a_ring(query, key, value):
        turns = terms.turns_of(order)
        query, key = terms.rotated(query, turns), terms.rotated(key, turns)

        def on_device(*arrays):
            return ring.attention(terms, AXIS, *arrays)

        return jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(query, key, value)

    def alone(query, key, value):
        return attention(query, key, value, terms, backend="tiled")

    generator = np.random.default_rng(0)
    shape = 1, LENGTH.value, HEADS.value, HEAD_DIM.value
    arrays = [generator.standard_normal(shape, np.float32) for _ in range(4)]
    cases, found, temporaries = {}, {}, {}
    for case, function, given, sharding in (
        (ONE, alone, arrays, jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        (GATHERED, gathered, [x[:, order] for x in arrays], NamedSharding(mesh, spec)),
        (RING, in_a_ring, [x[:, order] for x in arrays], NamedSharding(mesh, spec)),
    ):

        def both_ways(*given, function=function):
            out, transposed = jax.vjp(function, *given[:3])
            return out, *transposed(given[3])

        given = [jax.device_put(x, sharding) for x in given]
        program = jax.jit(both_ways, out_shardings=sharding).lower(*given).compile()
        cases[case] = lambda program=program, given=given: jax.block_until_ready(program(*given))
        found[case] = [np.asarray(x) for x in program(*given)]
        temporaries[case] = program.memory_analysis().temp_size_in_bytes
    times = measure.in_turn(cases, ROUNDS.value)
    rows = []
    print(f"{name}, {LENGTH.value:,} tokens over {DEVICES.value} devices, forward and backward: time over one device's")
    for case, ratio in measure.ratios(times, ONE).items():
        row = {"method": name, "case": case, "length": LENGTH.value, "devices": 1 if case == ONE else DEVICES.value}
        row |= {"seconds": times[case], "over_one": ratio, "temporary_bytes": temporaries[case]}
        size = temporaries[case] / 2**20
        said = f"  {case:12} {ratio[1]:.2f} [{ratio[0]:.2f}, {ratio[2]:.2f}], {size:.0f} MiB per device"
        if case != ONE:
            errors = [np.max(np.abs(x - one[:, order])) for x, one in zip(found[case], found[ONE], strict=True)]
            row["largest_error"] = float(max(errors))
            said += f", errors to {row['largest_error']:.1e}"
        rows.append(row)
        print(said)
    return rows


if __name__ == "__main__":
    cli.run(main)
