"""TFDS data sets as a source: "tfds:NAME", "tfds:NAME/CONFIG", either with ":VERSION", prepared as ArrayRecord files.

Reading them needs no TensorFlow, no network and not the code that prepared them: their folder describes itself.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from wavelet_jax.data.notes import Notes, count_replaced
from wavelet_jax.errors import UserError, nearest, unknown
from wavelet_jax.files.reading import MissingFile, user_path

PREFIX = "tfds:"
_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[^/:]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_AHEAD = 64  # records read ahead of the one that is tokenized; a book of pg19 has some 400 KB
# Builders that come with this package, and their configurations: `python -m wavelet_jax.data.NAME` prepares them.
OWN = {"wikitext": ("wikitext2", "wikitext103")}


def full_name(config) -> str:
    """The data set that is read, with its configuration and version: "wiki40b/en/1.3.0"."""
    return _open(config).info.full_name


def find_files(config) -> dict[str, list[str]]:
    """The files that hold the "train" and the "validation" split, in the order in which they are read.

    Without `config.data.validation_split` (the list is empty) the train split is to be divided.

    Raises:
      UserError: a data set that is not known, not prepared or not as ArrayRecord; a split that is not there, or empty;
        splits that share an example; a field that is not there, or holds no text.
    """
    if config.data.train_files or config.data.validation_files:
        raise UserError(
            f"config.data.source is {config.data.source!r}, which reads no other files: set it to 'text' or 'jsonl', "
            "or leave config.data.train_files and config.data.validation_files empty"
        )
    info = _open(config).info
    _check_field(config, info)
    parts = {"train": _parts(info, config.data.train_split, "train_split"), "validation": []}
    if config.data.validation_split:
        parts["validation"] = _parts(info, config.data.validation_split, "validation_split")
    for part in parts["train"]:
        for other in parts["validation"]:
            first = max(part.skip, other.skip)
            if part.filename == other.filename and first < min(part.skip + part.take, other.skip + other.take):
                raise UserError(
                    f"example {first} of {part.filename} is in both splits: change config.data.train_split "
                    f"{config.data.train_split!r} or config.data.validation_split {config.data.validation_split!r}"
                )
    return {split: [str(part.filename) for part in those] for split, those in parts.items()}


def documents(config, split: str, label: str, notes: Notes) -> Iterator[str]:
    """The documents of the "train" or the "validation" split, in the data set's order, without those that are blank.

    Grain's threads read `_AHEAD` of them ahead. Bytes that are not UTF-8 become U+FFFD, which is counted in `notes`.
    `label` goes before the progress bar.

    Raises:
      UserError: a file that cannot be read.
    """
    import grain  # takes over a second to import, and only this and windows need it

    field = config.data.text_field
    wanted = config.data.train_split if split == "train" else config.data.validation_split
    source = _open(config).as_data_source(wanted)

    def text_of(example: dict) -> tuple[str, int]:
        if example[field] is None:  # what the reader makes of the records of a file that was cut
            raise ValueError("a record is empty: a file is damaged")
        return example[field].decode("utf-8", "replace"), count_replaced(example[field])

    texts = grain.MapDataset.source(source).map(text_of)
    options = grain.ReadOptions(num_threads=min(config.data.threads, _AHEAD), prefetch_buffer_size=_AHEAD)
    with contextlib.closing(iter(texts.to_iter_dataset(options))) as reading:
        bar = tqdm(_named(config, reading), label, len(source), unit=" documents", delay=1, leave=False, disable=None)
        for number, (text, replaced) in enumerate(bar):
            if replaced:
                notes.add(
                    "{file} is not UTF-8 throughout: U+FFFD stands for bytes that are not, {count} times, first in "
                    "example {first}",
                    f"{config.data.source}, split {wanted!r},",
                    str(number),
                    replaced,
                )
            if text.strip():
                yield text


def _named(config, reading: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """The same, with a `UserError` for whatever the reader of ArrayRecord files raises: it has no error of its own."""
    while True:
        try:
            text = next(reading)
        except StopIteration:
            return
        except (OSError, ValueError, RuntimeError, IndexError) as error:
            said = " ".join(str(error).split())  # one line
            raise UserError(f"cannot read {config.data.source} in {_folder(config)}: {said}") from error
        yield text


def _open(config) -> Any:
    """The prepared data set, a read-only `tfds.core.DatasetBuilder`."""
    import tensorflow_datasets as tfds

    folder = _folder(config)
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # a damaged description fails in many ways, and none of them is documented
        raise UserError(f"{folder} cannot be opened as a TFDS data set: {error}".splitlines()[0]) from error
    file_format: Any = builder.info.file_format
    if file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        made_as = file_format.value
        raise UserError(f"{folder} is prepared as {made_as}, not as array_record: remove it, then {_command(config)}")
    return builder


def _folder(config) -> Path:
    """The folder of the data set, of its newest version if the config names no version."""
    source = config.data.source
    if not (match := _NAME.fullmatch(source.removeprefix(PREFIX))):
        raise UserError(
            f"config.data.source {source!r} does not name a TFDS data set: write tfds:NAME or tfds:NAME/CONFIG, with "
            ":VERSION where it matters, such as 'tfds:wiki40b/en:1.3.0'"
        )
    if not config.data.tfds_dir:
        raise UserError("config.data.tfds_dir is empty: name the folder of the prepared TFDS data sets")
    base = _root(config) / match["name"]
    versions = _versions(base / match["config"] if match["config"] else base)
    if match["version"]:
        versions = [folder for folder in versions if folder.name == match["version"]]
    if versions:
        return max(versions, key=lambda folder: tuple(map(int, folder.name.split("."))))
    configs = sorted({folder.parent.name for folder in _versions(base, "*")})
    if configs and not match["config"]:
        raise UserError(
            f"{source} comes in configurations, and {', '.join(configs)} are prepared in {_root(config)}: set "
            f"config.data.source to '{PREFIX}{match['name']}/{configs[0]}' or another"
        )
    if match["name"] in OWN and match["config"] not in OWN[match["name"]]:
        ours = (f"{PREFIX}{match['name']}/{each}" for each in OWN[match["name"]])
        raise unknown("config.data.source", source, ours)
    _check_known(config, match["name"])
    raise MissingFile(f"{source} is not prepared in config.data.tfds_dir {_root(config)}: {_command(config)}")


def _root(config) -> Path:
    return user_path(config.data.tfds_dir, "config.data.tfds_dir", config.data.folder).absolute()


def _versions(base: Path, between: str = "") -> list[Path]:
    """The folders of prepared versions in `base`, or in its sub-folders that match `between`."""
    described = base.glob(os.path.join(between, "*", "dataset_info.json"))
    return [path.parent for path in described if _VERSION.fullmatch(path.parent.name)]


def _command(config) -> str:
    """The command that prepares the data set, for the user: it may take hours, a license, TensorFlow or Beam."""
    name = config.data.source.removeprefix(PREFIX)
    match = _NAME.fullmatch(name)
    assert match is not None, "checked before"
    if match["name"] in OWN:
        return (
            f"prepare it once with: python -m wavelet_jax.data.{match['name']} --name={match['config']} "
            f"--tfds_dir='{_root(config)}'"
        )
    return (
        'prepare it once with: python -c "import tensorflow_datasets as tfds, tensorflow_datasets.text; '
        f"tfds.builder('{name}', data_dir='{_root(config)}', file_format='array_record').download_and_prepare()\""
    )


def _check_known(config, name: str) -> None:
    """Raises `UserError` for a name that neither TFDS nor the folder of prepared data sets knows."""
    import tensorflow_datasets as tfds

    # TFDS finds builders by importing groups of them, and none after the first that misses a requirement, such as h5py.
    import tensorflow_datasets.text

    prepared = {path.parent.name for path in _versions(_root(config), "*")}
    prepared |= {path.parent.parent.name for path in _versions(_root(config), os.path.join("*", "*"))}
    known = prepared.union(OWN, tfds.list_builders(with_community_datasets=False))
    if name not in known:
        near = nearest(name, sorted(known))  # all of them, a thousand, would not fit a line
        hint = f"did you mean {PREFIX + near!r}?" if near else "TFDS has none of that name"
        there = f"prepared in {_root(config)}: {', '.join(sorted(prepared)) or 'none'}"
        raise UserError(f"unknown TFDS data set {name!r}: {hint} ({there})")


def _check_field(config, info) -> None:
    """Raises `UserError` where `config.data.text_field` is not a text of each example."""
    name, features = config.data.text_field, info.features
    if name not in features:
        raise UserError(f"{config.data.source}: {unknown('config.data.text_field', name, features)}")
    feature = features[name]
    if feature.shape != () or feature.np_dtype not in (np.str_, np.bytes_, np.object_):
        raise UserError(
            f"{config.data.source}: feature {name!r} is {type(feature).__name__}, not text: set config.data.text_field "
            f"to another of {', '.join(features)}"
        )


def _parts(info, split: str, key: str) -> list:
    """The files of a split such as "train" or "train[:90%]+test", each with `filename`, `skip` and `take`."""
    for part in split.split("+"):
        name = part.split("[")[0].strip()
        if name not in info.splits and name != "all":
            way_out = ", or empty to take documents out of the train split" if key == "validation_split" else ""
            raise UserError(f"{info.full_name}: {unknown(f'config.data.{key}', name, info.splits)}{way_out}")
    try:
        parts = [part for part in info.splits[split].file_instructions if part.take]
    except Exception as error:  # a split that cannot be parsed, or ends past the last example
        raise UserError(
            f"config.data.{key} {split!r} is not a split of {info.full_name}: {error}".splitlines()[0]
        ) from error
    if not parts:
        raise UserError(f"config.data.{key} {split!r} holds no example of {info.full_name}")
    return parts
