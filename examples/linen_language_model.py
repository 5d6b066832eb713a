"""A small language model in Flax Linen, before and after its positions are wavelets: compare `Before` with `After`.

    python examples/linen_language_model.py --positions=wavelet

trains it on the bytes of a module of Python's standard library, in seconds on a CPU, and then, what `Before` cannot,
reads texts of four times the length that it was trained on.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from wavelet_jax import positions
from wavelet_jax.interop.linen import PositionAttention

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 4, 2, 64, 8


class Before(nn.Module):
    """Learned positions, added to the token embedding."""

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        x_BxTxE = nn.Embed(256, WIDTH)(tokens_BxT)
        x_BxTxE += nn.Embed(LENGTH, WIDTH)(jnp.arange(tokens_BxT.shape[1]))
        mask = nn.make_causal_mask(tokens_BxT)
        for _ in range(LAYERS):
            x_BxTxE = Block()(x_BxTxE, mask)
        return nn.Dense(256)(x_BxTxE)


class After(nn.Module):
    """Wavelets of the distance, in attention; no [T, T] mask either, so memory is linear in length."""

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        x_BxTxE = nn.Embed(256, WIDTH)(tokens_BxT)
        method = positions.make("wavelet", num_heads=HEADS, head_dim=WIDTH // HEADS)
        for _ in range(LAYERS):
            x_BxTxE = Block(attention_fn=PositionAttention(method, causal=True))(x_BxTxE)
        return nn.Dense(256)(x_BxTxE)


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    attention_fn: Callable = nn.dot_product_attention

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        attention = nn.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=self.attention_fn)
        x_BxTxE += attention(nn.LayerNorm()(x_BxTxE), mask=mask)
        return x_BxTxE + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x_BxTxE))))


def main(argv: list[str] | None = None) -> list[float]:
    """Trains, and returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", choices=("learned", "wavelet"), default="wavelet")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)

    text = np.frombuffer(Path(os.__file__).read_bytes(), np.uint8).astype(np.int32)
    train, held_out = np.split(text, [len(text) * 9 // 10])
    model = Before() if args.positions == "learned" else After()
    params = jax.jit(model.init)(jax.random.key(0), train[None, :LENGTH])
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    def loss_of(params, tokens_BxT):
        """Mean nats per byte."""
        logits = model.apply(params, tokens_BxT[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT[:, 1:]).mean()

    @jax.jit
    def train_step(params, state, tokens_BxT):
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens_BxT)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    rng, losses = np.random.default_rng(0), []
    for step in range(args.steps):
        starts = rng.integers(len(train) - LENGTH, size=BATCH)
        params, state, loss = train_step(params, state, train[starts[:, None] + np.arange(LENGTH + 1)])
        losses.append(float(loss))
        print(f"step {step + 1}: {losses[-1]:.3f} nats per byte", flush=True)
    for length in (LENGTH,) if args.positions == "learned" else (LENGTH, 4 * LENGTH):
        windows = held_out[: len(held_out) // (length + 1) * (length + 1)].reshape(-1, length + 1)
        print(f"held out, {length} bytes: {jax.jit(loss_of)(params, windows):.3f} nats per byte")
    return losses


if __name__ == "__main__":
    main()
