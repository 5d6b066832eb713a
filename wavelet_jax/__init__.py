"""Wavelet-based positional representation for long context, in JAX and Flax.

    from wavelet_jax import attention, positions, wavelet_position

`attention` is a package: the function is `wavelet_jax.attention.attention`. Names are imported when they are first
used, so that `import wavelet_jax` costs nothing.
"""

import importlib
from typing import Any

from wavelet_jax.version import __version__

# Name -> the module that has it; None: a module of that name.
_WHERE = {
    "attention": None,
    "positions": None,
    "wavelets": None,
    "interop": None,
    "UserError": "errors",
    "Terms": "positions",
    "make": "positions",
    "scale_shift_grid": "wavelets",
    "wavelet_position": "wavelets",
    "train": "training.loop",
    "evaluate": "evaluation.evaluate",
    "get_config": "config.default",
}

__all__ = [
    "Terms",
    "UserError",
    "__version__",
    "attention",
    "evaluate",
    "get_config",
    "interop",
    "make",
    "positions",
    "scale_shift_grid",
    "train",
    "wavelet_position",
    "wavelets",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'wavelet_jax' has no attribute {name!r}")
    module = importlib.import_module(f"wavelet_jax.{_WHERE[name] or name}")
    return module if _WHERE[name] is None else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
