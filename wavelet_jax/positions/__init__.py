"""Position methods behind one seam: a frozen dataclass of hyper-parameters -> `Terms` -> attention."""

import dataclasses
from typing import Any

from wavelet_jax.errors import UserError, unknown
from wavelet_jax.integers import shown
from wavelet_jax.positions.absolute import Learned, NoPE, Sinusoidal
from wavelet_jax.positions.alibi import ALiBi
from wavelet_jax.positions.discrete_wavelet import DiscreteWavelet
from wavelet_jax.positions.rope import RoPE
from wavelet_jax.positions.shaw import Shaw
from wavelet_jax.positions.t5 import T5
from wavelet_jax.positions.terms import PositionMethod, Terms
from wavelet_jax.positions.transformer_xl import TransformerXL
from wavelet_jax.positions.wavelet import Wavelet

__all__ = [
    "METHODS",
    "OF_THE_MODEL",
    "PositionMethod",
    "Terms",
    "config",
    "fields",
    "make",
    "options",
    "unknown_option",
]

METHODS: dict[str, type[Any]] = {  # each a dataclass that is a `PositionMethod`
    "wavelet": Wavelet,
    "rope": RoPE,
    "alibi": ALiBi,
    "transformer_xl": TransformerXL,
    "shaw": Shaw,
    "t5": T5,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "nope": NoPE,
    "discrete_wavelet": DiscreteWavelet,
}


def fields(name: str) -> list[str]:
    """The names of all fields of a method's class. Raises `UserError` for an unknown method."""
    return [field.name for field in dataclasses.fields(_class(name))]


def _class(name: str) -> type[Any]:
    if name not in METHODS:
        raise unknown("position method", name, METHODS)
    return METHODS[name]


# Fields of methods that a model decides: they are arguments of `make`, and no keys of a config.
OF_THE_MODEL = ("num_heads", "head_dim", "d_model")


def options(name: str) -> dict[str, object]:
    """The options of a method and their defaults, as `make` takes them. Raises `UserError` for an unknown method."""
    taken, method = ("num_heads", "head_dim"), _class(name)
    return {field.name: field.default for field in dataclasses.fields(method) if field.name not in taken}


def config(name: str) -> dict[str, object]:
    """The section `position` of a config: the method's name, and its own options with their defaults.

    Left out are the fields that the model decides (`OF_THE_MODEL`). Raises `UserError` for an unknown method.
    """
    own = {option: default for option, default in options(name).items() if option not in OF_THE_MODEL}
    return {"method": name, **own}


def unknown_option(name: str, option: str) -> UserError:
    """A `UserError` for an option that a method does not have: the methods that do, or else the nearest name."""
    own = [each for each in config(name) if each != "method"]
    others = [method for method in METHODS if option in config(method)]
    if not others:
        return unknown(f"option of {name}", option, own)
    has = f"whose options are {', '.join(own)}" if own else "which has no options"
    return UserError(f"{option} is an option of {', '.join(others)}, not of {name}, {has}")


def make(name: str, *, num_heads: int, head_dim: int, **method_options: Any) -> PositionMethod:
    """Builds a position method: `method.init(key)` gives its parameters, `method.terms(params)` its `Terms`.

    Args:
      name: one of `METHODS`.
      num_heads: query heads.
      head_dim: D, the size of one head.
      **method_options: the fields of the method's class.

    Raises:
      UserError: unknown method or option (with the nearest name), a value of another kind than the option's default,
        or one that the method cannot honor.
    """
    allowed = options(name)
    for option, value in method_options.items():
        if option not in allowed:
            raise unknown_option(name, option)
        if isinstance(allowed[option], bool) and not isinstance(value, bool):  # numbers are checked by their ranges
            raise UserError(f"{name}'s {option} must be True or False, not {shown(value)}")
    return METHODS[name](num_heads=num_heads, head_dim=head_dim, **method_options)
