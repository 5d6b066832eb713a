"""What a command sets before it starts: memory that is kept, and compiled programs."""

import ctypes

import jax
import pytest

from wavelet_jax.commands import cli
from wavelet_jax.hardware import devices


@pytest.fixture
def cache():
    """JAX's setting of the cache, put back at the end."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("accelerator", "chosen", "expected"),
    [(False, None, None), (True, None, "wavelet_jax/programs"), (True, "/elsewhere", "/elsewhere")],
)
def test_programs_for_accelerators_are_kept(monkeypatch, tmp_path, cache, accelerator, chosen, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(devices, "has_accelerator", lambda: accelerator)
    jax.config.update("jax_compilation_cache_dir", chosen)
    cli._keep_programs()
    assert jax.config.jax_compilation_cache_dir == (expected and str(tmp_path / expected))


@pytest.mark.parametrize("accelerator", [False, True])
def test_freed_memory_is_kept_where_the_cpu_computes(monkeypatch, accelerator):
    set_to = []
    monkeypatch.setattr(
        ctypes, "CDLL", lambda name: type("C", (), {"mallopt": lambda *given: set_to.append(given[1:])})
    )
    monkeypatch.setattr(devices, "has_accelerator", lambda: accelerator)
    cli._keep_memory()
    assert bool(set_to) != accelerator
