"""Prints the losses of five packed updates on all devices: packed_losses.py FSDP CONTEXT."""

import json
import sys

import jax
from support.packed import one_layer, packed_batch

from configs import smoke
from wavelet_jax.parallel import sharding
from wavelet_jax.training import steps

config = one_layer(smoke.get_config)
config.mesh.update(data=-1, fsdp=int(sys.argv[1]), context=int(sys.argv[2]))
config.train.update(batch_size=16, accumulation=2)
mesh = sharding.make_mesh(config)
graphdef, state, _ = steps.init(config, 257, mesh)
train_step = jax.jit(steps.make_train_step(config, graphdef, mesh))
windows = packed_batch(config, [2] * 200 + [300] * 3, 16).reshape(steps.batch_shape(config))
for _ in range(5):
    state, metrics = train_step(state, jax.device_put(windows, sharding.batch_sharding(mesh, leading=1)))
    print(json.dumps(float(metrics["loss"])))
