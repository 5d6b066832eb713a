"""A run on each mesh, printed as JSON lines: mesh_losses.py '[method, updates, dropout, changes, meshes]'.

The losses of its updates, the share of the parameters that a device holds, and at the end the loss of every target of a
batch, by the evaluation step.
"""

import json
import sys

import jax
import numpy as np
from support import compilation

from configs import smoke
from wavelet_jax.parallel import sharding
from wavelet_jax.training import steps

method, count, dropout, changes, shapes = json.loads(sys.argv[1])
tokens = np.random.default_rng(0).integers(0, 257, (count, 2, 8, 65)).astype(np.int32)
for shape in shapes:
    config = smoke.get_config(method)
    config.mesh.update(shape)
    config.train.update(batch_size=16, accumulation=2, logits_chunk=128)
    config.model.update(dropout=dropout, num_layers=1, num_heads=4, num_kv_heads=2)
    for key, value in changes.items():
        config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
    mesh = sharding.make_mesh(config)
    graphdef, state, abstract_state = steps.init(config, 257, mesh)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract_state), strict=True):
        assert leaf.sharding == wanted.sharding
    train_step = jax.jit(steps.make_train_step(config, graphdef, mesh), compiler_options=compilation.OPTIONS)
    losses = []
    for batch in tokens:
        state, metrics = train_step(state, jax.device_put(batch, sharding.batch_sharding(mesh, leading=1)))
        losses.append(float(metrics["loss"]))
    eval_step = jax.jit(steps.make_eval_step(config, graphdef, mesh), compiler_options=compilation.OPTIONS)
    by_token = eval_step(state.params, jax.device_put(tokens[0, 0], sharding.batch_sharding(mesh)))
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params))
    print(json.dumps({"losses": losses, "held": held / whole, "by_token": np.asarray(by_token).tolist()}))
