"""The paper's analyses of positions: RoPE as a wavelet transform, attention maps, receptive fields.

`python -m wavelet_jax.analysis --help` for the command. `rope_as_wavelet` and `windows` are pure functions.
"""
