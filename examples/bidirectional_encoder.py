"""A small bidirectional encoder in Flax NNX with wavelet positions: it fills in hidden bytes of lines of source code.

    python examples/bidirectional_encoder.py --grid=both_sides

What shifts mean where a query sees both sides. A wavelet psi((t - b) / a) of the distance t = m - n (query less key) is
even about its shift b, and its centre lies b tokens before the query. In the grid of Eq. (13) all shifts are 0 or
more, as suits a causal model: no centre lies after the query. A bidirectional model still tells the two sides apart, by
the wavelets with b > 0, but it does not see them alike: it has centres up to max(b) tokens before the query, and only
flanks after it. (With shifts of 0 alone every wavelet would be even in t: a token before the query and the same token
as far after it would score the same.)

`--grid=both_sides` centres the shifts on 0: the table for t is then that for -t with its dimensions in another order,
so neither side is preferred, in as many dimensions. `--grid=paper` is Eq. (13). Any other grid is given in the same
way: a scale and a shift for every head dimension.
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
from wavelet_jax.wavelets import scale_shift_grid

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 4, 2, 48, 32
PADDING, HIDDEN = 0, 1  # bytes that no source code holds
HIDDEN_SHARE = 0.15


def both_sides(head_dim: int, num_scales: int) -> tuple[np.ndarray, np.ndarray]:
    """(scales, shifts), [head_dim] each: those of Eq. (13) with the shifts of each scale centred on 0."""
    scales, shifts = scale_shift_grid(head_dim, num_scales)
    return scales, shifts - shifts.max() / 2


class Encoder(nnx.Module):
    """Logits [B, T, 256] of every byte from bytes [B, T], some hidden; attention sees no padding."""

    def __init__(self, grid: str, rngs: nnx.Rngs):
        head_dim = WIDTH // HEADS
        scales, shifts = {"paper": scale_shift_grid, "both_sides": both_sides}[grid](head_dim, num_scales=4)
        method = positions.make("wavelet", num_heads=HEADS, head_dim=head_dim, scales=scales, shifts=shifts)
        self.tokens = nnx.Embed(256, WIDTH, rngs=rngs)
        self.attention, self.norms, self.up, self.down = (nnx.List([]) for _ in range(4))
        for _ in range(LAYERS):
            self.attention.append(
                nnx.MultiHeadAttention(HEADS, WIDTH, attention_fn=PositionAttention(method), decode=False, rngs=rngs)
            )
            self.norms.append(nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)]))
            self.up.append(nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs))
            self.down.append(nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs))
        self.head = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        # [B, 1, 1, T]: the same for all heads and queries, so it costs no [T, T] array.
        mask = (tokens_BxT != PADDING)[:, None, None, :]
        x_BxTxE = self.tokens(tokens_BxT)
        for attention, norms, up, down in zip(self.attention, self.norms, self.up, self.down, strict=True):
            x_BxTxE += attention(norms[0](x_BxTxE), mask=mask)
            x_BxTxE += down(jax.nn.gelu(up(norms[1](x_BxTxE))))
        return self.head(x_BxTxE)


def loss_of(model: Encoder, tokens_BxT: jax.Array, hidden_BxT: jax.Array) -> jax.Array:
    """Mean nats a hidden byte."""
    logits = model(jnp.where(hidden_BxT, HIDDEN, tokens_BxT))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT)
    return jnp.sum(losses * hidden_BxT) / jnp.sum(hidden_BxT)


@jax.jit
def train_step(model: Encoder, optimizer: nnx.Optimizer, tokens_BxT: jax.Array, hidden_BxT: jax.Array):
    loss, gradients = nnx.value_and_grad(loss_of)(model, tokens_BxT, hidden_BxT)
    optimizer.update(model, gradients)
    return model, optimizer, loss


def main(argv: list[str] | None = None) -> list[float]:
    """Trains, and returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=("paper", "both_sides"), default="both_sides")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)

    lines = [line for line in Path(os.__file__).read_bytes().splitlines() if line.strip()]
    padded = [list(line[:LENGTH].ljust(LENGTH, bytes([PADDING]))) for line in lines]
    lines_NxT = np.array(padded, np.int32)
    model = Encoder(args.grid, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    rng, losses = np.random.default_rng(0), []
    for step in range(args.steps):
        tokens_BxT = lines_NxT[rng.integers(len(lines_NxT), size=BATCH)]
        hidden_BxT = (rng.random(tokens_BxT.shape) < HIDDEN_SHARE) & (tokens_BxT != PADDING)
        model, optimizer, loss = train_step(model, optimizer, tokens_BxT, hidden_BxT)
        losses.append(float(loss))
        print(f"step {step + 1}: {losses[-1]:.3f} nats a hidden byte", flush=True)
    return losses


if __name__ == "__main__":
    main()
