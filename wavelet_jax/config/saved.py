"""A run's config as its config.json has it: what the file must hold, and which of its keys are missing.

`config.default` says what the keys mean. Files of earlier versions may lack some keys, so a missing key is an error
when it is read. Values that are there must be of their types.
"""

import re
from pathlib import Path
from typing import Any, get_args

from ml_collections import ConfigDict

from wavelet_jax import positions
from wavelet_jax.config import numeric_keys, upgrade
from wavelet_jax.config.keys import flatten
from wavelet_jax.errors import UserError

NESTED = ("evaluators.",)  # sections of sections, whose names are the user's
_NUMBERS = tuple[float, ...]  # of whole numbers too, and of lists of them: a grid for every head

# Types of values by key, as wavelet_jax/config/default.py sets them: texts, flags and lists, ..
TYPES: dict[str, Any] = {
    "config_version": int,
    **dict.fromkeys(("data.source", "data.train_files", "data.validation_files", "data.text_field"), str),
    **dict.fromkeys(("data.validation_text_field", "data.document", "data.tfds_dir", "data.train_split"), str),
    **dict.fromkeys(("data.validation_split", "data.tokenizer", "data.tokenizer_file", "data.packing"), str),
    **dict.fromkeys(("data.cache_dir", "data.missing_text", "data.folder"), str),
    **dict.fromkeys(("model.norm", "model.activation", "model.vocabulary", "model.initializer", "model.dtype"), str),
    **dict.fromkeys(("model.precision", "model.remat", "model.scan_layers", "model.attention_backend"), str),
    **dict.fromkeys(("model.use_bias", "model.final_norm", "model.tied_head", "model.scale_embedding"), bool),
    **dict.fromkeys(("optimizer.name", "optimizer.schedule"), str),
    **dict.fromkeys(("train.init_from", "log.wandb", "evaluators.*.type"), str),
    **{"compare.variants": tuple[str, ...], "compare.label": str, "compare.protocol": str},
    # .. and numbers, which have their ranges in `numeric_keys`.
    **{key: int if allowed.whole else float for key, allowed in numeric_keys.RANGES.items()},
    **dict.fromkeys(numeric_keys.EACH, tuple[int, ...]),
}


def types(method: object) -> dict[str, Any]:
    """`TYPES`, and those of the options of a position method (no options for an unknown method)."""
    known = isinstance(method, str) and method in positions.METHODS
    options = positions.config(str(method)) if known else {"method": ""}
    own = {
        f"position.{option}": _NUMBERS if isinstance(value, tuple) else type(value) for option, value in options.items()
    }
    return TYPES | own


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", _NUMBERS: "a list of numbers"}
_NAMES |= {tuple[int, ...]: "a list of whole numbers", tuple[str, ...]: "a list of texts"}


class SavedConfig(ConfigDict):
    """A config, or a section of one, that says which file lacks a key when that is read."""

    def of(self, path: Path, prefix: str = "") -> "SavedConfig":
        """Itself, with the file and the section's name for errors."""
        object.__setattr__(self, "_place", (path, prefix))
        return self

    def copy_and_resolve_references(self, visit_map: dict | None = None) -> "SavedConfig":
        """See `ConfigDict`; the copy knows its file too."""
        return super().copy_and_resolve_references(visit_map).of(*self._place)

    def __getitem__(self, key: str) -> Any:
        if key in self or key.startswith("_"):  # names with an underscore are Python's own, such as __deepcopy__
            return super().__getitem__(key)
        path, prefix = self._place
        raise UserError(
            f"{path} is of an earlier version, without {prefix}{key}, or damaged: set it there "
            "(wavelet_jax/config/default.py says what it means)"
        )


def of_tree(tree: Any, path: Path) -> SavedConfig:
    """The config of what a config.json holds, in the present layout (`upgrade`).

    Raises:
      UserError: it is not sections of keys, is of a later version, or a value is not of its key's type; says so
        without naming the file.
    """
    if not isinstance(tree, dict):
        raise UserError(f"it holds {_described(tree)}, not sections of keys")
    for section, values in tree.items():
        _check_name(section)
        if section != "config_version" and not isinstance(values, dict):
            raise UserError(f"section {section!r} is {_described(values)}, not keys and values")
    tree = upgrade.upgrade(tree)
    position = tree.get("position")
    return _section(tree, types(position.get("method") if isinstance(position, dict) else None), path, "")


def _section(tree: dict, kinds: dict[str, Any], path: Path, prefix: str) -> SavedConfig:
    made = {}
    for name, value in tree.items():
        _check_name(name)
        key = prefix + name
        if isinstance(value, dict) and prefix in ("", *NESTED):
            made[name] = _section(value, kinds, path, f"{key}.")
        else:
            _check_value(key, value, _kind(key, kinds))
            made[name] = _tuples(value)
    return SavedConfig(made).of(path, prefix)


def unread(config: ConfigDict) -> list[str]:
    """The keys of a config that this version does not have."""
    kinds = types(config.position.method)
    return [key for key in flatten(config) if _kind(key, kinds) is None]


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z]\w*", name):
        raise UserError(f"{name!r} cannot be the name of a section or key")


def _kind(key: str, kinds: dict[str, Any]) -> Any:
    """The type of a key, or None if there is no such key. Names of sections inside of `NESTED` are the user's."""
    section, _, rest = key.partition(".")
    return kinds.get(f"{section}.*.{rest.partition('.')[2]}" if f"{section}." in NESTED else key)


def _check_value(key: str, value: Any, kind: Any) -> None:
    fits = _is_plain(value) if kind is None else _fits(value, kind)
    if not fits:
        wanted = _NAMES.get(kind, "a plain value or a list of them")
        raise UserError(f"{key} is {_described(value)}, not {wanted}")


def _fits(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (str, int, bool):
        return type(value) is kind
    if kind is _NUMBERS and isinstance(value, list) and value and all(isinstance(each, list) for each in value):
        return all(_fits(each, kind) for each in value)
    return isinstance(value, list) and all(_fits(each, get_args(kind)[0]) for each in value)


def _is_plain(value: Any, depth: int = 2) -> bool:
    """Whether a value is text, a number, true, false, or lists of those, up to `depth` in one another."""
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(each, depth - 1) for each in value)
    return isinstance(value, str | int | float)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _described(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."
