"""A run of seconds on a CPU, for tests and for a first look at a change.

    python train.py --config=configs/smoke.py:wavelet --workdir=DIR

40 updates of a model with 2 layers of width 32 on the Python standard library's sources; the loss falls from 6.2 to
about 3.4 nats per byte. Variants: any position method.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(method: str = "wavelet") -> ConfigDict:
    config = default.get_config(method)
    config.model.update(num_layers=2, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64)
    default.set_position(config, max_positions=256)
    config.train.update(steps=40, length=64, batch_size=8)
    # A constant learning rate: the run can be made longer by --config.train.steps alone.
    config.optimizer.update(schedule="constant", warmup_steps=5, decay_steps=0)
    config.log.every = 5
    config.checkpoint.every = 20
    config.eval.update(every=20, windows=16, max_tokens=4096, resamples=200)
    config.compare.lengths = (64, 128, 256)
    return config
