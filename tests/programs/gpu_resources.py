"""What the kernels of `triton_gpu` take of a GPU, from the compiler: registers, spills, shared memory. Needs no GPU.

    python tests/programs/gpu_resources.py [--arch=80,90] [--dtype=bfloat16,float32] [--head_dim=64,128,256]
        [--kernel=NAME,..] [--causal=0]

compiles every launch of a call with wavelets, forward and backward, for each entry of `gpu.SIZES`, with the
`ptxas` that triton brings along, and prints one JSON object a kernel. A machine with triton and JAX is enough.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[2]))

from wavelet_jax import positions
from wavelet_jax.attention.call import Call
from wavelet_jax.attention.flash import gpu

TRITON_TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}

# Shared memory that one program may take, bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability".
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


def launches(
    capability: int, dtype: str, head_dim: int, *, method: str = "wavelet", length: int = 1024, causal: bool = True
) -> list[gpu.Launch]:
    """The launches of a call and its gradients, with grouped queries, traced and not run."""
    made = []

    def record(launch: gpu.Launch) -> list[jax.Array]:
        made.append(launch)
        return [jnp.zeros(x.shape, x.dtype) for x in launch.outputs]

    terms = positions.make(method, num_heads=4, head_dim=head_dim).terms({})
    call = Call(terms, length, length, 4, 2, head_dim, jnp.dtype(dtype), 0, causal=causal)
    query, key = (jax.ShapeDtypeStruct((1, length, heads, head_dim), dtype) for heads in (4, 2))
    with gpu.launching(record, capability):
        if found := gpu.unsupported(call):
            raise ValueError(found)
        jax.eval_shape(
            lambda *x: jax.vjp(lambda *y: gpu.attention(*y, call), *x)[1](jnp.zeros_like(x[0])), query, key, key
        )
    return made


def resources(launch: gpu.Launch) -> dict[str, int]:
    """Compiles a launch as jax-triton would: registers a thread, bytes of spills, bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    from wavelet_jax.attention.flash import gpu_kernels

    function = getattr(gpu_kernels, launch.kernel)
    types = [TRITON_TYPES[jnp.dtype(x.dtype).name] for x in launch.arrays]
    types += ["i32"] * len(launch.counts) + [TRITON_TYPES[jnp.dtype(x.dtype).name] for x in launch.outputs]
    signature = dict(zip(function.arg_names, types, strict=False))
    constants = dict(launch.constants) | {name: 1 for name, count in launch.counts.items() if count == 1}
    assert list(signature) + list(launch.constants) == function.arg_names
    assert list(signature)[len(launch.arrays) :][: len(launch.counts)] == list(launch.counts)
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if signature[name].startswith("*")
    }
    compiled = triton.compile(
        triton.compiler.ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", launch.capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True},
    )
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
        command = [get_ptxas(launch.capability).path, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spills": int(spills[1]) + int(spills[2]),
        "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async.sync"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
    }


def main(arguments: list[str]) -> None:
    given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    chosen = {name: given.pop(name).split(",") for name in list(given)}
    wanted = {"arch": ["80", "90"], "dtype": ["bfloat16", "float32"], "head_dim": ["64", "128", "256"], "causal": ["1"]}
    wanted |= chosen
    for arch in map(int, wanted["arch"]):
        for dtype in wanted["dtype"]:
            for head_dim in map(int, wanted["head_dim"]):
                for launch in launches(arch, dtype, head_dim, causal=wanted["causal"] == ["1"]):
                    if launch.kernel in wanted.get("kernel", [launch.kernel]):
                        blocks = {name: launch.constants[name] for name in ("BLOCK_M", "BLOCK_N", "R")}
                        row = {"arch": arch, "dtype": dtype, "head_dim": head_dim, "kernel": launch.kernel} | blocks
                        row |= {"warps": launch.warps, "stages": launch.stages}
                        print(json.dumps(row | resources(launch)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
