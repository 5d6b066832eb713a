"""Compiling without XLA's optimizations, for tests whose time is nearly all compilation: eight times as fast.

An option that the installed XLA does not have is left out: XLA refuses to compile with an unknown one, and ends the
process for an unknown flag. Tests named `jit_equals_eager` compile as usual.
"""

import functools

import jax


def _is_known(option: str, value: object) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


# The emitters of fusions were an option up to JAX 0.10, and are the only way since.
_WANTED = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
OPTIONS = {option: value for option, value in _WANTED.items() if _is_known(option, value)}
FLAGS = " ".join(f"--{option}={str(value).lower()}" for option, value in OPTIONS.items())  # for XLA_FLAGS

quick_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
