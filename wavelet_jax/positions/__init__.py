"""Position methods behind one seam: a frozen dataclass of hyper-parameters -> `Terms` -> attention."""

import dataclasses

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

__all__ = ["METHODS", "PositionMethod", "Terms", "make", "options"]

METHODS: dict[str, type[PositionMethod]] = {
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


def options(name: str) -> dict[str, object]:
    """The options of a method and their defaults. Raises `UserError` for an unknown method."""
    if name not in METHODS:
        raise unknown("position method", name, METHODS)
    return {
        field.name: field.default
        for field in dataclasses.fields(METHODS[name])
        if field.name not in ("num_heads", "head_dim")
    }


def make(name: str, *, num_heads: int, head_dim: int, **method_options) -> PositionMethod:
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
            raise unknown(f"option of {name}", option, allowed)
        if isinstance(allowed[option], bool) and not isinstance(value, bool):  # numbers are checked by their ranges
            raise UserError(f"{name}'s {option} must be True or False, not {shown(value)}")
    return METHODS[name](num_heads=num_heads, head_dim=head_dim, **method_options)
