"""Wavelet-based positional representation for long context (Oka et al., ICLR 2025), in JAX and Flax."""
