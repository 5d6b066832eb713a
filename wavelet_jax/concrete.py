"""Computing constants while a function is being traced."""

import contextlib
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh


@contextlib.contextmanager
def concretely() -> Iterator[None]:
    """A block in which JAX computes with known numbers at once, on one device, whatever is being traced around it.

    `jax.ensure_compile_time_eval` alone keeps the caller's mesh: inside `jax.shard_map` it would place a constant on
    manual axes, which only a traced value can be on.
    """
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())), jax.ensure_compile_time_eval():
        yield
