"""Memory and time of a run before it starts: the train step, compiled for devices that need not exist.

    python train.py --config=FILE.py --compile_only                             for the devices of this machine
    python train.py --config=FILE.py --compile_only --topology=v5e:16x16        for a TPU slice, without a TPU

Nothing is computed, read or written. The compiled program is the run's own, so its bytes are the compiler's word, not a
formula; the time is an estimate from FLOPs and a utilization that you state.
"""

import dataclasses
import itertools
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from wavelet_jax.commands import terminal
from wavelet_jax.data.tokenizers import Byte
from wavelet_jax.errors import UserError
from wavelet_jax.hardware import devices, memory
from wavelet_jax.parallel import sharding
from wavelet_jax.runs import directory, throughput
from wavelet_jax.training import steps

MORE_CHIPS = 64  # times as many are the most that are thought of


@dataclasses.dataclass(frozen=True)
class Usage:
    """Bytes on one device of a compiled train step, and what else the compiler says of it.

    Attributes:
      count: the model's parameters, of all devices together.
      parameters, optimizer: their shards.
      other: of arguments and results: tokens, metrics, padding.
      temporaries: the most that is held at a time of activations, gradients and all that is computed on the way.
      program: the code.
      flops: the compiler's count on all devices; it takes the body of a loop once. NaN where it does not count.
      seconds: that compiling took.
      refused: whether the compiler found no room; its sum is then in `temporaries`, whatever it is made of.
    """

    count: int
    parameters: int
    optimizer: int
    other: int
    temporaries: int
    program: int
    flops: float
    seconds: float
    refused: bool = False

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.other + self.temporaries + self.program


def show(
    configs: Sequence[ConfigDict],
    *,
    topology: str | None = None,
    vocab_size: int | None = None,
    utilization: float = 0.4,
) -> None:
    """Prints the plan of each config.

    Args:
      configs: what would be trained.
      topology: a TPU slice to compile for, such as "v5e:16x16"; None: the devices of this machine.
      vocab_size: instead of the size that the config's tokenizer has.
      utilization: fraction of the devices' peak that the estimate of time assumes.

    Raises:
      UserError: a value out of its range, an unknown slice, or a mesh or batch that does not fit the devices.
    """
    if not 0 < utilization <= 1:
        raise UserError(f"--utilization must be above 0 and at most 1, not {utilization}")
    if vocab_size is not None and vocab_size < 1:
        raise UserError(f"--vocab_size must be at least 1, not {vocab_size}")
    targets = jax.devices() if topology is None else devices.topology(topology)
    title = "the devices of this machine" if topology is None else topology
    with devices.compiled_for(targets):
        for config in configs:
            size = vocabulary(config) if vocab_size is None else vocab_size
            mesh = sharding.make_mesh(config)
            sharding.check_batch(config, mesh)
            limit = devices.limit(targets[0])
            usage = compiled(config, size, mesh)
            print(table(config, size, mesh, usage, limit, title, utilization), flush=True)
            if limit is not None and usage.total > limit:
                print("\nwhat would fit:", flush=True)
                for line in remedies(config, size, usage, limit):
                    print(f"  {line}", flush=True)
    terminal.check()


def vocabulary(config: ConfigDict) -> int:
    """The size of the vocabulary as far as the config says it, since no text is read.

    A text with fewer words or pairs than `data.vocab_size` asks for gives a smaller one.
    """
    match config.data.tokenizer:
        case "byte":
            return Byte.vocab_size
        case tokenizer if config.data.vocab_size < 1:
            raise UserError(
                f"data.vocab_size {config.data.vocab_size} leaves the size of the {tokenizer} vocabulary to the text, "
                "which --compile_only does not read: give --vocab_size"
            )
    return config.data.vocab_size


def compiled(config: ConfigDict, vocab_size: int, mesh: Mesh) -> Usage:
    """Compiles the train step that train.py runs for the devices of the mesh."""
    graphdef, abstract_state = steps.shapes(config, vocab_size, mesh)
    place = sharding.batch_sharding(mesh, leading=1)
    tokens = jax.ShapeDtypeStruct(steps.batch_shape(config), jnp.int32, sharding=place)
    count = int(steps.count_parameters(abstract_state.params))
    parameters, optimizer = _shard_bytes(abstract_state.params), _shard_bytes(abstract_state.opt_state)
    step = steps.jit_train_step(config, graphdef, abstract_state, mesh)
    start = time.perf_counter()
    try:
        program = step.lower(abstract_state, tokens).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_by(str(error))
        if needed is None:
            raise
        seconds = time.perf_counter() - start
        rest = needed - parameters - optimizer
        return Usage(count, parameters, optimizer, 0, rest, 0, float("nan"), seconds, refused=True)
    seconds = time.perf_counter() - start
    found = program.memory_analysis()
    arguments = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return Usage(
        count,
        parameters,
        optimizer,
        max(0, arguments - parameters - optimizer),
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
        (program.cost_analysis() or {}).get("flops", float("nan")) * mesh.size,
        seconds,
    )


def needed_by(message: str) -> int | None:
    """Bytes that a TPU's compiler says a program needs where it finds no room, in either of its forms."""
    amount = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"Used {amount} of [\d.]+[KMGT]? hbm", message)
    found = found or re.search(rf"total memory required for HLO temporaries \({amount}\)", message)
    return found and round(float(found[1]) * 2 ** (10 * " KMGT".index(found[2] or " ")))


def _shard_bytes(tree: Any) -> int:
    """Bytes of a tree of `ShapeDtypeStruct`s with shardings on each device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


# -- what would fit ---------------------------------------------------------------------------------------------------


def changes(config: ConfigDict, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Changes of keys that save memory, each with those before it: those that cost the least time come first."""
    batch_devices = sharding.batch_devices(mesh)
    config = config.copy_and_resolve_references()
    tokens = config.train.batch_size // config.train.accumulation * config.train.length
    chunk = 1024 * batch_devices  # tokens per device whose products still fill it
    if chunk < tokens and not 0 < config.train.logits_chunk <= chunk:
        yield {"train.logits_chunk": chunk}
    if mesh.shape["data"] > 1:
        yield {"mesh.data": 1, "mesh.fsdp": batch_devices}
    if config.model.remat != "block":
        yield {"model.remat": "block"}
    accumulation = 2 * config.train.accumulation
    while config.train.batch_size % (accumulation * batch_devices) == 0:
        yield {"train.accumulation": accumulation}
        accumulation *= 2


def remedies(config: ConfigDict, vocab_size: int, usage: Usage, limit: int) -> Iterator[str]:
    """Lines that say what would fit into `limit` bytes per device: `changes` one upon the other, each compiled."""
    config = config.copy_and_resolve_references()
    flags_ = {}
    for change in changes(config, sharding.make_mesh(config)):
        config.update_from_flattened_dict(change)
        try:
            usage = compiled(config, vocab_size, sharding.make_mesh(config))
        except UserError as error:  # a mesh whose axes do not divide an array
            yield f"{_as_flags(change)} is not possible: {error}"
            return
        flags_ |= change
        fits = usage.total <= limit
        verdict = "fits" if fits else "does not fit"
        size = memory.shown(usage.total)
        yield f"{_as_flags(flags_)}: {size} per device, {verdict} (compiled, {usage.seconds:.0f} s)"
        if fits:
            return
    yield more_chips(config, sharding.make_mesh(config), usage, limit)


def more_chips(config: ConfigDict, mesh: Mesh, usage: Usage, limit: int) -> str:
    """By how many more devices it might fit, by a formula: the state is split over all of them, and activations are
    as long as there are windows to split."""
    windows = config.train.batch_size // (config.train.accumulation * sharding.batch_devices(mesh))
    state = usage.parameters + usage.optimizer
    for times in itertools.takewhile(lambda times: times <= MORE_CHIPS, (2**i for i in itertools.count(1))):
        total = state / times + (usage.total - state) / min(times, windows)
        if total <= limit:
            return (
                f"{times * mesh.size:,} devices, the new ones along mesh.fsdp: about {memory.shown(round(total))} a "
                "device (estimated, not compiled)"
            )
    return (
        f"up to {MORE_CHIPS} times as many devices along mesh.fsdp would not (estimated): what is left is one window's "
        "activations, for which a larger mesh.tensor, devices with more memory or a shorter train.length are left"
    )


def _as_flags(change: dict[str, Any]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in change.items())


# -- the table --------------------------------------------------------------------------------------------------------


def table(
    config: ConfigDict, vocab_size: int, mesh: Mesh, usage: Usage, limit: int | None, title: str, utilization: float
) -> str:
    """The plan as text."""
    windows, length = config.train.batch_size, config.train.length
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [
        f"{title}: {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {axes}",
        f"{directory.label(config)}, {usage.count:,} parameters ({vocab_size:,} words), {windows:,} windows of "
        f"{length:,} tokens per update, compiled in {usage.seconds:.0f} s",
        "",
        "bytes per device",
    ]
    rows = [("parameters", usage.parameters, ""), ("optimizer", usage.optimizer, "")]
    if usage.refused:
        rows.append(("the rest", usage.temporaries, "the compiler found no room, and says no more"))
    else:
        rows.append(("tokens, padding", usage.other, ""))
        rows.append(("activations", usage.temporaries, "and gradients: temporary arrays at their most"))
        rows.append(("program", usage.program, ""))
    lines += [f"  {name:18}{memory.shown(size):>12}  {note}".rstrip() for name, size, note in rows]
    verdict = "and how much there is is not known"
    if limit is not None:
        fits = "it fits" if usage.total <= limit else f"does not fit: over by {memory.shown(usage.total - limit)}"
        verdict = f"of {memory.shown(limit)}: {fits}"
    lines.append(f"  {'total':18}{memory.shown(usage.total):>12}  {verdict}")

    flops = throughput.update_flops(config, vocab_size)
    peak, whose = devices.peak_flops(config.model.dtype)
    seconds = flops / (utilization * devices.total_flops(config.model.dtype))
    compiler = "not counted" if np.isnan(usage.flops) else f"{usage.flops:.2e}"
    lines += [
        "",
        "an update",
        f"  {'model FLOPs':18}{flops:>12.2e}  6 N T and causal attention; nothing that is computed twice",
        f"  {'compiler FLOPs':18}{compiler:>12}  of all devices; the body of a loop counts once",
        f"  {'seconds':18}{seconds:>12.3g}  estimated, at {utilization:.0%} of {peak / 1e12:,.4g} TFLOP/s per device "
        f"({whose})",
        f"  {'tokens per second':18}{windows * length / seconds:>12,.0f}  estimated; "
        f"{config.train.steps:,} updates would take {throughput.duration(config.train.steps * seconds)}",
    ]
    return "\n".join(lines)
