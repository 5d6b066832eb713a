"""The keys of a config as dotted names, such as "train.steps"."""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def flatten(tree: Mapping | ConfigDict, *, sections: bool = False, prefix: str = "") -> dict[str, Any]:
    """{"train.steps": 1000, ..} of sections in sections, however deep; with `sections`, those themselves too."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, Mapping | ConfigDict):
            found |= {prefix + name: value} if sections else {}
            found |= flatten(value, sections=sections, prefix=f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def json_values(config: ConfigDict) -> dict[str, Any]:
    """`flatten`, with the values as a config.json has them: lists for tuples, numbers for references."""
    return flatten(json.loads(config.to_json()))
