"""Configs that earlier versions saved, brought to the present layout of keys."""

from typing import Any

from wavelet_jax import positions
from wavelet_jax.errors import UserError

VERSION = 4

Tree = dict[str, Any]


def upgrade(tree: Tree) -> Tree:
    """A saved config in the layout of `VERSION`.

    Version 1, which has no `config_version`, held the options of all methods in `position`, and one seed for
    parameters, dropout and the order of windows. Version 2 had no `model.precision`, version 3 no `model.scan_layers`.
    Keys that are missing or unknown stay so: the reader of a config names them.

    Args:
      tree: {section: {key: value}}, as config.json has it. It is not changed.

    Raises:
      UserError: the config is of a later version than this code; says so without naming the file.
    """
    version = tree.get("config_version", 1)
    if type(version) is not int or version < 1:
        raise UserError(f"config_version is {version!r}, not a whole number from 1")
    if version > VERSION:
        raise UserError(f"it is of version {version}, and this code reads versions up to {VERSION}: update wavelet_jax")
    for step in (_from_1, _from_2, _from_3)[version - 1 :]:
        tree = step(tree)
    return tree


def _from_1(tree: Tree) -> Tree:
    sections = {name: dict(keys) if isinstance(keys, dict) else keys for name, keys in tree.items()}
    data, train, position = (sections.get(name) for name in ("data", "train", "position"))
    if isinstance(data, dict):  # what runs did before there were these keys
        sections["data"] = data = {"missing_text": "error", "folder": "", **data}
    if isinstance(train, dict):
        seed = train.pop("seed", None)
        sections["train"] = train = {"init_from": "", **({} if seed is None else {"model_seed": seed}), **train}
        if isinstance(data, dict) and seed is not None:
            data["seed"] = seed
    if isinstance(sections.get("log"), dict):
        sections["log"] = {"wandb": "", **sections["log"]}
    if isinstance(position, dict) and position.get("method") in positions.METHODS:
        own = positions.config(position["method"])
        foreign = {option for method in positions.METHODS for option in positions.options(method)} - own.keys()
        sections["position"] = {key: value for key, value in position.items() if key not in foreign}
    sections["evaluators"] = {"validation": _validation(tree)}
    return {"config_version": 2, **sections}


def _from_2(tree: Tree) -> Tree:
    return _with_model(tree, 3, precision="default")


def _from_3(tree: Tree) -> Tree:
    return _with_model(tree, 4, scan_layers="never")


def _with_model(tree: Tree, version: int, **keys: str) -> Tree:
    """The tree as one of `version`, with keys of `model` that say what runs did before there were these keys."""
    model = tree.get("model")
    if isinstance(model, dict):
        model = {**keys, **model}
    return {**tree, "config_version": version, **({} if model is None else {"model": model})}


def _validation(tree: Tree) -> Tree:
    """The evaluator that does what version 1 did by keys of `eval`."""
    source = {"every": ("eval", "every"), "windows": ("eval", "windows"), "length": ("train", "length")}
    found = {"type": "loss"}
    for key, (section, name) in source.items():
        if isinstance(tree.get(section), dict) and name in tree[section]:
            found[key] = tree[section][name]
    return found
