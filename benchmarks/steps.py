"""Whole train steps to measure: ours, ours with attention cut out, and x-transformers' (PyTorch) at the same shape.

Every function here gives a `Step`: calling `run` makes one update of the parameters that the step holds, and returns
when it is done. All on one device: JAX's first, and PyTorch's of the same kind.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import jax
import numpy as np
from jax.sharding import AxisType
from ml_collections import ConfigDict

from benchmarks import measure
from wavelet_jax.model import block
from wavelet_jax.parallel import sharding
from wavelet_jax.training import steps

# Position methods that x-transformers has in the same form, and its names for them.
X_TRANSFORMERS_METHODS = {
    "rope": {"rotary_pos_emb": True},
    "alibi": {"alibi_pos_bias": True},
    "nope": {},
}


@dataclass
class Step:
    """One case: `run()` is one update, `loss()` the loss of the last one in nats per token."""

    parameters: int
    run: Callable[[], None]
    loss: Callable[[], float]


def ours(config: ConfigDict, vocab_size: int, tokens_BxL1: np.ndarray, *, attend: bool = True) -> Step:
    """The step that train.py makes (donated state and all), compiled; without attention where not `attend`.

    Raises `UserError` for a config that the decoder, the position method or the optimizer refuses.
    """
    device = jax.devices()[:1]
    types = (AxisType.Auto,) * len(sharding.AXES)
    mesh = jax.make_mesh((1,) * len(types), sharding.AXES, axis_types=types, devices=device)
    graphdef, state, _ = steps.init(config, vocab_size, mesh)
    parameters = steps.count_parameters(state.params)
    train_step = jax.jit(steps.make_train_step(config, graphdef), donate_argnums=0)
    tokens_1xBxL1 = jax.device_put(tokens_BxL1[None].astype(np.int32), sharding.batch_sharding(mesh, leading=1))
    metrics = {}

    def run() -> None:
        nonlocal state
        state, new = jax.block_until_ready(train_step(state, tokens_1xBxL1))
        metrics.update(new)

    with contextlib.nullcontext() if attend else without_attention():
        run()  # traced here
    return Step(parameters, run, lambda: float(metrics["loss"]))


@contextlib.contextmanager
def without_attention() -> Iterator[None]:
    """What is traced inside has query + key + value in attention's place: no scores, no softmax, no position term.

    A sum of all three and not the value alone: else the compiler would drop the query and key projections, forward and
    backward, and their time would be counted as attention's.
    """

    def add(query_BxTxHxD, key_BxTxKxD, value_BxTxKxD, terms, **_) -> jax.Array:
        group = query_BxTxHxD.shape[2] // key_BxTxKxD.shape[2]
        return query_BxTxHxD + jax.numpy.repeat(key_BxTxKxD + value_BxTxKxD, group, axis=2)

    with mock.patch.object(block, "attention", add):
        yield


def x_transformers_obstacle() -> str | None:
    """Why x-transformers cannot be measured beside JAX's device, or None."""
    missing = [name for name in ("torch", "x_transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (pip install -e '.[bench]')"
    platform = jax.default_backend()
    if platform == "cpu":
        return None
    if platform != "gpu":
        return f"JAX computes on a {platform}, which PyTorch has no use of here"
    import torch

    return None if torch.cuda.is_available() else "JAX computes on a GPU, and this PyTorch sees none"


def x_transformers(
    config: ConfigDict, method: str, vocab_size: int, tokens_BxL1: np.ndarray, *, compiled: bool = False
) -> Step:
    """The same update of `x_transformers_network`: clipping by the global norm, AdamW with decay on matrices only.

    PyTorch's quickest ways are taken: the fused AdamW, as many threads as XLA, TF32 on a GPU as XLA has it, and
    `torch.compile` where `compiled`. Not the same: a constant learning rate, which costs next to nothing, and logits,
    which are all held at once (ours: config.train.logits_chunk).

    Args:
      method: one of `X_TRANSFORMERS_METHODS`.
      tokens_BxL1: [B, L+1] token ids.
    """
    import torch

    torch.set_num_threads(measure.threads())
    torch.manual_seed(config.train.model_seed)
    device = "cpu"
    if jax.default_backend() == "gpu":
        device = "cuda"
        torch.set_float32_matmul_precision("high")
    network = x_transformers_network(config, method, vocab_size).to(device)
    params = list(network.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.optimizer.weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.optimizer.learning_rate,
        betas=(config.optimizer.b1, config.optimizer.b2),
        eps=config.optimizer.eps,
        fused=True,
    )
    tokens = torch.from_numpy(tokens_BxL1.astype(np.int64)).to(device)
    forward = torch.compile(network) if compiled else network
    loss = torch.zeros(())

    def run() -> None:
        nonlocal loss
        logits_BxLxV = forward(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits_BxLxV.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return Step(sum(p.numel() for p in params), run, lambda: loss.item())


def x_transformers_network(config: ConfigDict, method: str, vocab_size: int):
    """The decoder of a config as x-transformers' `TransformerWrapper` and `Decoder`, in float32, a `torch.nn.Module`.

    With our parameters in it it gives our logits (tests/test_benchmarks.py), for RoPE in the interleaved layout: SwiGLU
    without biases, RMSNorm before each sublayer and at the end, a tied head, the whole head rotated, attention by
    `scaled_dot_product_attention`.
    """
    from x_transformers import Decoder, TransformerWrapper
    from x_transformers.x_transformers import GLU

    shape = config.model
    decoder = Decoder(
        dim=shape.d_model,
        depth=shape.num_layers,
        heads=shape.num_heads,
        attn_dim_head=shape.head_dim,
        attn_flash=True,
        rotary_emb_dim=shape.head_dim,
        use_rmsnorm=True,
        ff_mult=(shape.d_ff + 0.5) / shape.d_model,  # it takes the whole part of the product with d_model
        ff_glu=True,
        ff_swish=True,
        ff_no_bias=True,
        verbose=False,
        **X_TRANSFORMERS_METHODS[method],
    )
    network = TransformerWrapper(
        num_tokens=vocab_size,
        max_seq_len=config.train.length,
        attn_layers=decoder,
        use_abs_pos_emb=False,
        tie_embedding=True,
        tie_embedding_scale=1.0,
    )
    for module in network.modules():
        if isinstance(module, GLU):
            module.proj.register_parameter("bias", None)  # `ff_no_bias` leaves this one
    return network
