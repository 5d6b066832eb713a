"""The main job: wavelet, RoPE and ALiBi trained short on real text, then tested on lengths up to 16 times as long.

    python train.py

trains a byte-level model of each on the Python standard library's sources, one after another, and draws
`runs/quickstart/extrapolation.png`: about twelve minutes on two cores, in 1.5 GiB. Expected perplexity per byte at 128
and at 1,024: wavelet 3.04 and 3.12, RoPE 3.07 and 18.0, ALiBi 3.32 and 3.22.

`configs/quickstart.py:METHOD` is a single run of any method; `--config.compare.variants="('wavelet', 'nope')"`
compares others.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(method: str = "") -> ConfigDict:
    config = default.get_config(method or "wavelet")
    config.train.update(steps=700, batch_size=16)
    config.optimizer.learning_rate = 4e-3
    config.eval.every = 400
    config.compare.variants = () if method else ("wavelet", "rope", "alibi")
    config.compare.lengths = (128, 256, 512, 1024, 2048)
    return config
