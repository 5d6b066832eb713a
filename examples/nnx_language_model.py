"""A small language model in Flax NNX, before and after its positions are wavelets: compare `Before` with `After`.

    python examples/nnx_language_model.py --positions=wavelet

trains it on the bytes of a module of Python's standard library, in seconds on a CPU, and then, what `Before` cannot,
reads texts of four times the length that it was trained on.
"""

import argparse
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from wavelet_jax import positions
from wavelet_jax.interop.nnx import PositionAttention

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 4, 2, 64, 8


class Before(nnx.Module):
    """Learned positions, added to the token embedding."""

    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(256, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        x_BxTxE = self.tokens(tokens_BxT)
        x_BxTxE += self.positions(jnp.arange(tokens_BxT.shape[1]))
        for block in self.blocks:
            x_BxTxE = block(x_BxTxE)
        return self.head(x_BxTxE)


class After(nnx.Module):
    """Wavelets of the distance, in attention."""

    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(256, WIDTH, rngs=rngs)
        method = positions.make("wavelet", num_heads=HEADS, head_dim=WIDTH // HEADS)
        self.blocks = nnx.List([Block(rngs, attention_fn=PositionAttention(method)) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        x_BxTxE = self.tokens(tokens_BxT)
        for block in self.blocks:
            x_BxTxE = block(x_BxTxE)
        return self.head(x_BxTxE)


class Block(nnx.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, rngs: nnx.Rngs, **options):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs, **options)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x_BxTxE: jax.Array) -> jax.Array:
        x_BxTxE += self.attention(self.norms[0](x_BxTxE), is_causal=True)
        return x_BxTxE + self.down(jax.nn.gelu(self.up(self.norms[1](x_BxTxE))))


def loss_of(model: nnx.Module, tokens_BxT: jax.Array) -> jax.Array:
    """Mean nats per byte."""
    logits = model(tokens_BxT[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT[:, 1:]).mean()


@jax.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, tokens_BxT: jax.Array):
    loss, gradients = nnx.value_and_grad(loss_of)(model, tokens_BxT)
    optimizer.update(model, gradients)
    return model, optimizer, loss


def main(argv: list[str] | None = None) -> list[float]:
    """Trains, and returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", choices=("learned", "wavelet"), default="wavelet")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)

    text = np.frombuffer(Path(os.__file__).read_bytes(), np.uint8).astype(np.int32)
    train, held_out = np.split(text, [len(text) * 9 // 10])
    model = (Before if args.positions == "learned" else After)(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    rng, losses = np.random.default_rng(0), []
    for step in range(args.steps):
        starts = rng.integers(len(train) - LENGTH, size=BATCH)
        model, optimizer, loss = train_step(model, optimizer, train[starts[:, None] + np.arange(LENGTH + 1)])
        losses.append(float(loss))
        print(f"step {step + 1}: {losses[-1]:.3f} nats per byte", flush=True)
    for length in (LENGTH,) if args.positions == "learned" else (LENGTH, 4 * LENGTH):
        windows = held_out[: len(held_out) // (length + 1) * (length + 1)].reshape(-1, length + 1)
        print(f"held out, {length} bytes: {jax.jit(loss_of)(model, windows):.3f} nats per byte")
    return losses


if __name__ == "__main__":
    main()
