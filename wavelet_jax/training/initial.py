"""The state that a run begins with.

In this order, the first that applies:

1. the newest sound checkpoint in the run's own directory: the run resumes;
2. the parameters of another run, `config.train.init_from`: step, optimizer and data start over;
3. parameters drawn from `config.train.model_seed`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from wavelet_jax.data import Corpus, tokenizers
from wavelet_jax.errors import UserError
from wavelet_jax.files import places
from wavelet_jax.model import layers
from wavelet_jax.parallel.sharding import path_of
from wavelet_jax.runs import checkpoint, directory
from wavelet_jax.training import steps


def state(
    config: ConfigDict, workdir: Path, abstract: steps.State, corpus: Corpus, mesh: Mesh
) -> tuple[steps.State, int]:
    """The state of a run at its first update now, and its data position, windows.

    A run that resumes holds one state: nothing is drawn where a checkpoint is restored.

    Args:
      config: of the run.
      workdir: its directory.
      abstract: shapes, dtypes and shardings of the state, from `steps.shapes`.
      corpus: that the run reads.
      mesh: where the state is.

    Raises:
      UserError: checkpoints that cannot be used (`checkpoint.restore`), a seed that `steps.seed_key` refuses, or an
        `init_from` that does not fit.
    """
    restored = checkpoint.restore(workdir, abstract, fingerprint=corpus.fingerprint)
    if restored is not None:
        return restored
    fresh = steps.draw(config, corpus.tokenizer.vocab_size, abstract)
    if config.train.init_from:
        params = _from_another(config, fresh.params, corpus, mesh)
        return dataclasses.replace(fresh, params=params), 0
    return fresh, 0


def _from_another(config: ConfigDict, fresh: dict[str, Any], corpus: Corpus, mesh: Mesh) -> dict[str, Any]:
    """The parameters of the run in `config.train.init_from`; those of positions that it does not have stay fresh."""
    other = places.at(config.train.init_from, "config.train.init_from", config.data.folder)
    theirs = directory.load_config(other)
    if tokenizers.specification(theirs) != tokenizers.specification(config):
        raise UserError(
            f"config.train.init_from: {other} has another tokenizer ({theirs.data.tokenizer}, vocab_size "
            f"{theirs.data.vocab_size}) than this run ({config.data.tokenizer}, vocab_size {config.data.vocab_size})"
        )
    # A word or bpe vocabulary is made of its text: there the words are the same only if the text is.
    any_text = config.data.tokenizer in ("byte", "sentencepiece")
    with theirs.unlocked():  # parameters in the form of this run
        theirs.model.scan_layers = "always" if layers.are_scanned(config) else "never"
    abstract = steps.shapes(theirs, corpus.tokenizer.vocab_size, mesh)[1].params
    _check_shapes(other, fresh, abstract)
    loaded, step = checkpoint.restore_params(other, abstract, fingerprint=None if any_text else corpus.fingerprint)
    found = dict(_leaves(loaded))

    def choose(key_path: tuple, leaf: jax.Array) -> jax.Array:
        array = found.get(path_of(key_path))
        return leaf if array is None or array.shape != leaf.shape else array

    kept = [path for path, leaf in _leaves(fresh) if path not in found or found[path].shape != leaf.shape]
    logging.warning(
        "parameters are those of %s at update %d%s", other, step, f"; drawn afresh: {', '.join(kept)}" if kept else ""
    )
    return jax.tree_util.tree_map_with_path(choose, fresh)


def _check_shapes(other: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises `UserError` for arrays of two models that differ, but for those of positions."""
    mine, found = ({path: leaf.shape for path, leaf in _leaves(tree)} for tree in (ours, theirs))
    differing = [
        path for path in {**mine, **found} if mine.get(path) != found.get(path) and "position" not in path.split("/")
    ]
    if differing:
        first = differing[0]
        there, here = (list(tree[first]) if first in tree else "absent" for tree in (found, mine))
        raise UserError(
            f"config.train.init_from: {other} is another model: {first} is {there} there and {here} here (arrays that "
            f"differ: {len(differing):,}); only its length, schedule and position method may differ"
        )


def _leaves(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(path_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
