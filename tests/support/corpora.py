"""Configs of small corpora, and what is in their caches."""

from pathlib import Path

from ml_collections import ConfigDict

END = 256


def make_config(cache: Path, **keys) -> ConfigDict:
    data = {
        "cache_dir": str(cache),
        "source": "text",
        "train_files": "",
        "validation_files": "",
        "text_field": "text",
        "validation_text_field": "",
        "missing_text": "error",
        "folder": "",
        "document": "file",
        "tfds_dir": "no_data_sets",
        "train_split": "train",
        "validation_split": "validation",
        "validation_fraction": 0.3,
        "tokenizer": "byte",
        "tokenizer_file": "",
        "vocab_size": 0,
        "threads": 4,
    }
    assert keys.keys() <= data.keys()
    return ConfigDict({"data": data | {name: str(key) if isinstance(key, Path) else key for name, key in keys.items()}})


def byte_ids(*documents: str) -> list[int]:
    return [token for document in documents for token in [*document.encode(), END]]


def folders(cache: Path) -> tuple[list[Path], list[Path]]:
    """(whole corpora, temporary folders) of a cache."""
    found = [path for path in cache.iterdir() if path.is_dir()]
    return [p for p in found if p.name[0] != "."], [p for p in found if p.name[0] == "."]
