"""Position methods in other people's models: a file for each kind of model, so that none imports what it does not use.

`interop.nnx` and `interop.linen` each have a `PositionAttention`, an `attention_fn` for Flax's own attention module.
Equinox and bare JAX need nothing from here: `wavelet_jax.attention.attention` is a function, and the parameters of a
method are a dict of arrays (`examples/bare_jax.py`).
"""
