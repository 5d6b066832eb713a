"""A run's config as its config.json has it: what the file must hold, and which of its keys are missing.

configs/default.py says what the keys mean. Files of earlier versions lack some keys, so a key is asked for when it is
read, and the values that are there must be of their types.
"""

import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from wavelet_jax import positions
from wavelet_jax.config import numeric_keys
from wavelet_jax.errors import UserError

_NUMBERS = tuple[float, ...]  # of whole numbers too, and of lists of them: a grid for every head
_POSITION = {
    option: _NUMBERS if isinstance(value, tuple) else type(value)
    for name in positions.METHODS
    for option, value in positions.options(name).items()
}

# Types of values by section and key, as configs/default.py sets them: texts, flags and lists, ..
TYPES: dict[str, dict[str, Any]] = {
    "data": {
        **dict.fromkeys(("source", "train_files", "validation_files", "text_field", "validation_text_field"), str),
        **dict.fromkeys(("document", "tfds_dir", "train_split", "validation_split", "tokenizer", "packing"), str),
        **dict.fromkeys(("tokenizer_file", "cache_dir", "missing_text", "folder"), str),
    },
    "model": {
        **dict.fromkeys(("norm", "activation", "vocabulary", "initializer", "dtype", "remat"), str),
        **dict.fromkeys(("use_bias", "final_norm", "tied_head", "scale_embedding"), bool),
        "attention_backend": str,
    },
    "position": {"method": str, **_POSITION},
    "optimizer": {"name": str, "schedule": str},
    "compare": {"variants": tuple[str, ...], "label": str, "protocol": str},
}
# .. and numbers, which have their ranges in `numeric_keys`.
for _key, _range in numeric_keys.RANGES.items():
    _section, _name = _key.split(".")
    TYPES.setdefault(_section, {})[_name] = int if _range.whole else float
for _key in numeric_keys.EACH:
    _section, _name = _key.split(".")
    TYPES.setdefault(_section, {})[_name] = tuple[int, ...]

# Keys that runs of earlier versions did not have, with the value by which those versions did what they did.
_LATER = {"data.missing_text": "error", "data.folder": ""}

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
            "(configs/default.py says what it means)"
        )


def of_tree(tree: Any, path: Path) -> SavedConfig:
    """The config of what a config.json holds.

    Raises:
      UserError: it is not sections of keys, or a value is not of its key's type; says so without naming the file.
    """
    if not isinstance(tree, dict):
        raise UserError(f"it holds {_described(tree)}, not sections of keys")
    config = SavedConfig().of(path)
    for section, values in tree.items():
        _check_name(section)
        if not isinstance(values, dict):
            raise UserError(f"section {section!r} is {_described(values)}, not keys and values")
        for key, value in values.items():
            _check_name(key)
            _check_value(section, key, value)
        later = {key.partition(".")[2]: value for key, value in _LATER.items() if key.startswith(f"{section}.")}
        made = later | {key: _tuples(value) for key, value in values.items()}
        config[section] = SavedConfig(made).of(path, f"{section}.")
    return config


def unread(config: ConfigDict) -> list[str]:
    """The keys of a config that this version does not have."""
    return [f"{section}.{key}" for section in config for key in config[section] if key not in TYPES.get(section, {})]


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z]\w*", name):
        raise UserError(f"{name!r} cannot be the name of a section or key")


def _check_value(section: str, key: str, value: Any) -> None:
    kind = TYPES.get(section, {}).get(key)
    fits = _is_plain(value) if kind is None else _fits(value, kind)
    if not fits:
        wanted = _NAMES.get(kind, "a plain value or a list of them")
        raise UserError(f"{section}.{key} is {_described(value)}, not {wanted}")


def _fits(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (str, int, bool):
        return type(value) is kind
    if kind is _NUMBERS and isinstance(value, list) and value and all(isinstance(each, list) for each in value):
        return all(_fits(each, kind) for each in value)
    return isinstance(value, list) and all(_fits(each, kind.__args__[0]) for each in value)


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
