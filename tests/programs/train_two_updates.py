"""Trains two updates in ./run with nothing but an installed package: train_two_updates.py FILES."""

import sys

import wavelet_jax
from wavelet_jax.config import default
from wavelet_jax.training.loop import train

config = default.get_config("wavelet")
config.data.update(source="text", train_files=sys.argv[1], cache_dir="cache", validation_fraction=0.2)
config.model.update(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64)
config.train.update(steps=2, length=32, batch_size=4)
config.optimizer.warmup_steps = 1
train(config, "run")
print(wavelet_jax.__file__)
