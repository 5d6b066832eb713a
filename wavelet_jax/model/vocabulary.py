"""Adaptive input and adaptive softmax: rare words have narrow vectors, and are scored only where one of them is due.

Grave et al. (arXiv 1609.04309) and Baevski and Auli (arXiv 1809.10853), tied as in the paper's model (section 6.1),
fairseq's transformer_lm_wiki103. Words are numbered from the most frequent on and cut into clusters. Those of cluster 0
have vectors as wide as the model, those of cluster i vectors that are factor^i times narrower, and each cluster has a
projection. The softmax reads the same vectors, and its tails the same projections:

    p(word) = p_head(word)                  of cluster 0
    p(word) = p_head(class i) p_i(word)     of cluster i

where p_head is over the words of cluster 0 and a class for each other cluster, and p_i over the words of cluster i: the
loss of a target needs the head and at most one tail. It is exactly that of the softmax that `log_probs` writes out.

Dimensions in names: E d_model, N words of a cluster, D their width, V vocabulary.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from wavelet_jax.errors import UserError
from wavelet_jax.model.products import dropout, precision_of, product


def clusters(config: ConfigDict, vocab_size: int) -> list[tuple[int, int, int]]:
    """(start, stop, D) of each cluster: words start .. stop - 1 have vectors of D numbers.

    The numbers of `config.model` are in their ranges (`numeric_keys.check`).

    Raises:
      UserError: cutoffs that are none, do not ascend or reach the vocabulary; a factor that does not divide d_model.
    """
    cutoffs, width, factor = config.model.cutoffs, config.model.d_model, config.model.adaptive_factor
    bounds = [0, *cutoffs, vocab_size]
    if not cutoffs or any(stop <= start for start, stop in itertools.pairwise(bounds)):
        raise UserError(
            f"model.cutoffs {cutoffs} must be whole numbers that ascend, above 0 and below the vocabulary's size, "
            f"{vocab_size}"
        )
    if width % factor ** len(cutoffs):
        raise UserError(
            f"model.adaptive_factor {factor} must divide model.d_model {width} once for each of model.cutoffs {cutoffs}"
        )
    return [(bounds[i], bounds[i + 1], width // factor**i) for i in range(len(cutoffs) + 1)]


class AdaptiveVocabulary(nnx.Module):
    """The vectors of all words, into the model and out of it.

    Args:
      config: reads `model.cutoffs`, `model.adaptive_factor`, `model.adaptive_dropout`, `model.d_model`, `model.dtype`.
      vocab_size: V.
      kernel_init: of projections and classes; vectors are N(0, D^-1/2).
      rngs: needs a "params" stream.
    """

    def __init__(self, config: ConfigDict, vocab_size: int, *, kernel_init, rngs: nnx.Rngs):
        width = config.model.d_model
        self.clusters = tuple(clusters(config, vocab_size))
        self.dtype, self.precision = jnp.dtype(config.model.dtype), precision_of(config)
        self.dropout = nnx.Dropout(config.model.adaptive_dropout)
        self.words, self.projections = nnx.List(), nnx.List()
        for start, stop, narrow in self.clusters:
            vectors_init = nnx.initializers.normal(narrow**-0.5)
            self.words.append(nnx.Param(vectors_init(rngs.params(), (stop - start, narrow))))
            self.projections.append(nnx.Param(kernel_init(rngs.params(), (narrow, width))))
        self.classes = nnx.Param(kernel_init(rngs.params(), (width, len(self.clusters) - 1)))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Vectors [.., E] of words, any shape of int32."""
        # Every cluster is read for every token, and all but its own are zeroed: products of D x E, which are nothing
        # beside a block, where an arrangement by cluster would cost sorting.
        x: Any = 0.0
        for (start, stop, _), words_NxD, projection_DxE in zip(
            self.clusters, self.words, self.projections, strict=True
        ):
            mine = (start <= ids) & (ids < stop)
            vectors = words_NxD[...][jnp.clip(ids - start, 0, stop - start - 1)]
            narrow = jnp.where(mine[..., None], vectors, 0).astype(self.dtype)
            x += product(narrow, projection_DxE[...], self.precision)
        return x

    def cluster_of(self, ids: jax.Array) -> jax.Array:
        """The number of each word's cluster, int32."""
        return jnp.asarray(sum((ids >= start).astype(jnp.int32) for start, _, _ in self.clusters[1:]))

    def losses(self, hidden: jax.Array, targets: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """-log p(target) in nats, float32, of hidden states [.., E] and targets [..].

        The head's logits are there at once, and those of one tail. A tail that no target is in is not computed, which
        is decided while the program runs (`lax.cond`: a branch that is not taken costs no time, forward or backward):
        give neighbours in `cluster_of` together, as `training.token_losses` does, and most calls need no tail.

        dropout_key: for `model.adaptive_dropout`, on the hidden states and, as in fairseq, inside the tails; None: off.
        """
        count = len(self.clusters)
        keys = [None] * count if dropout_key is None else jax.random.split(dropout_key, count)
        cluster, hidden = self.cluster_of(targets), dropout(self.dropout, hidden, keys[0])
        first = self.clusters[0][1]
        losses = cross_entropy(self._head(hidden), jnp.where(cluster == 0, targets, first + cluster - 1))
        for i in range(1, count):
            losses += jax.lax.cond(
                (cluster == i).any(),
                # Or the branch that is not taken would make zeros of the size of the logits for the backward pass.
                jax.checkpoint(functools.partial(self._tail_losses, i)),
                lambda hidden, targets, key: jnp.zeros(targets.shape),
                *(hidden, targets, keys[i]),
            )
        return losses

    def log_probs(self, hidden: jax.Array) -> jax.Array:
        """log p of every word, [.., V] float32, of hidden states [.., E]: for few tokens, such as those decoded."""
        first = self.clusters[0][1]
        head = jax.nn.log_softmax(self._head(hidden))
        tails = [
            head[..., first + i - 1, None] + jax.nn.log_softmax(self._tail(i, hidden, None))
            for i in range(1, len(self.clusters))
        ]
        return jnp.concatenate([head[..., :first], *tails], axis=-1)

    def _head(self, hidden: jax.Array) -> jax.Array:
        """Logits of the words of cluster 0 and of the classes, float32. Those words are as wide as the hidden states,
        and cluster 0's projection is the input's alone."""
        return jnp.concatenate(
            [self._product(hidden, self.words[0][...].T), self._product(hidden, self.classes[...])], axis=-1
        )

    def _tail_losses(self, i: int, hidden: jax.Array, targets: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """-log p_i(target) where the target is in cluster i, and 0 where it is not."""
        start, stop, _ = self.clusters[i]
        words = jnp.clip(targets - start, 0, stop - start - 1)
        losses = cross_entropy(self._tail(i, hidden, dropout_key), words)
        return jnp.where(self.cluster_of(targets) == i, losses, 0)

    def _tail(self, i: int, hidden: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """Logits of the words of cluster i, float32."""
        narrow = self._product(hidden, self.projections[i][...].T).astype(self.dtype)
        return self._product(dropout(self.dropout, narrow, dropout_key), self.words[i][...].T)

    def _product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return product(x.astype(self.dtype), kernel, self.precision, jnp.float32)
