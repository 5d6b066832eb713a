"""A small language model in bare JAX: attention is a function, and what a position method learns a dict of arrays.

    python examples/bare_jax.py --method=wavelet

`method.init(key)` goes into your parameters and `method.terms(params)` is called where attention is; nothing here knows
of Flax. In Equinox the same: the method is a static field of the module, its parameters a field like any other.
Several texts in a row are kept apart by `segment_ids`.
"""

import argparse
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wavelet_jax import positions
from wavelet_jax.attention import attention

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 4, 2, 64, 8
METHODS = {  # name -> options; trainable wavelets have scales and shifts to learn
    "wavelet": {"trainable": True},
    "rope": {},
    "alibi": {},
    "t5": {},
    "shaw": {},
    "transformer_xl": {},
}


def init(key: jax.Array, method: positions.PositionMethod) -> dict:
    shapes = {
        "qkv": (WIDTH, 3, HEADS, WIDTH // HEADS),
        "out": (WIDTH, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
    }
    keys = iter(jax.random.split(key, 2 + LAYERS * (1 + len(shapes))))

    def matrix(*shape):
        return jax.random.normal(next(keys), shape) / shape[0] ** 0.5

    layers = [
        {name: matrix(*shape) for name, shape in shapes.items()} | {"position": method.init(next(keys))}
        for _ in range(LAYERS)
    ]
    return {"tokens": matrix(256, WIDTH), "layers": layers, "head": matrix(WIDTH, 256)}


def forward(params: dict, method: positions.PositionMethod, tokens_BxT: jax.Array, texts_BxT: jax.Array) -> jax.Array:
    """Logits [B, T, 256]; tokens see those of their own text only."""
    x_BxTxE = params["tokens"][tokens_BxT]
    for layer in params["layers"]:
        query_BxTxHxD, key_BxTxHxD, value_BxTxHxD = jnp.moveaxis(
            jnp.einsum("bte,eihd->btihd", norm(x_BxTxE), layer["qkv"]), 2, 0
        )
        h_BxTxHxD = attention(
            query_BxTxHxD, key_BxTxHxD, value_BxTxHxD, method.terms(layer["position"]), segment_ids=texts_BxT
        )
        x_BxTxE += h_BxTxHxD.reshape(x_BxTxE.shape) @ layer["out"]
        x_BxTxE += jax.nn.gelu(norm(x_BxTxE) @ layer["up"]) @ layer["down"]
    return norm(x_BxTxE) @ params["head"]


def norm(x_BxTxE: jax.Array) -> jax.Array:
    return x_BxTxE * jax.lax.rsqrt(jnp.mean(x_BxTxE**2, axis=-1, keepdims=True) + 1e-6)


def main(argv: list[str] | None = None) -> list[float]:
    """Trains, and returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="wavelet")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)

    text = np.frombuffer(Path(os.__file__).read_bytes(), np.uint8).astype(np.int32)
    # Paragraphs are our texts: each begins after an empty line.
    starts = np.concatenate([[False], (text[:-2] == ord("\n")) & (text[1:-1] == ord("\n")), [False]])
    texts = np.cumsum(starts)
    method = positions.make(args.method, num_heads=HEADS, head_dim=WIDTH // HEADS, **METHODS[args.method])
    params = init(jax.random.key(0), method)
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    def loss_of(params, tokens_BxT, texts_BxT):
        """Mean nats per byte."""
        logits = forward(params, method, tokens_BxT[:, :-1], texts_BxT[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT[:, 1:]).mean()

    @jax.jit
    def train_step(params, state, tokens_BxT, texts_BxT):
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens_BxT, texts_BxT)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    rng, losses = np.random.default_rng(0), []
    for step in range(args.steps):
        window = rng.integers(len(text) - LENGTH, size=BATCH)[:, None] + np.arange(LENGTH + 1)
        params, state, loss = train_step(params, state, text[window], texts[window])
        losses.append(float(loss))
        print(f"step {step + 1}: {losses[-1]:.3f} nats per byte", flush=True)
    return losses


if __name__ == "__main__":
    main()
