"""Table 1 (section 6, A.7): perplexity on WikiText-103 past the training length, by position method.

    python -m wavelet_jax.data.wikitext --name=wikitext103 --tfds_dir=~/tensorflow_datasets
    python train.py --config=configs/paper/table1.py:wavelet_ricker --workdir=DIR

One row: Baevski and Auli's model (246.9M parameters: 16 layers of width 1,024, 8 heads of 128, adaptive input and
softmax), 286,000 updates of 73,728 words, of which the paper's 8 devices read 9,216 each. 2.9e19 FLOPs: 8 hours of
8 A100 at 40% of their peak. The text has 103,227,021 words; its word-level files themselves can be read too:
`--config.data.source=text --config.data.train_files=wiki.train.tokens --config.data.validation_files=wiki.valid.tokens`

Variants: a row of Table 1, nope | rope_theta1e4 | rope_theta5e5 | transformer_xl | alibi | wavelet_ricker |
wavelet_gaussian | wavelet_morlet | wavelet_haar | wavelet_haar_fixed_scale, or any position method, of which sinusoidal
is the original model's. With `_1024` after it L_train is 1,024 in place of 512. With no variant, or `1024`: the six
methods below one after another, then the figures. Expected perplexity, attention over the whole length:

    L_train           512                        1,024
    tokens            512    1,012    2,512      1,024    3,024    5,024
    nope            21.53    21.03    48.48      20.81    22.11    59.37
    rope_theta1e4   19.39    23.25    93.94      18.42    33.20   122.52
    rope_theta5e5   19.35    23.70    77.90      18.50    29.25    83.43
    transformer_xl  19.96    19.09    19.05      18.67    18.17    18.76
    alibi           19.69    18.71    18.41      18.66    17.86    17.88
    wavelet_ricker  19.19    18.23    17.99      18.26    17.14    17.44

The table's other half is `non_overlapping`, by eval.py over the runs that are there:

    python eval.py --workdir=DIR/nope --workdir=DIR/wavelet_ricker --lengths=128,256,512,1012,1512,2512 \
        --protocol=non_overlapping --out=OUT

`small_` before any of these is the same code at the size of a laptop: 4 layers of width 128, 4 heads of 32, WikiText-2,
L_train 128 in place of 512 and 256 in place of 1,024. `small` trains the six methods and draws the figures,
in about an hour on one core (docs/paper.md has what came out):

    python -m wavelet_jax.data.wikitext --name=wikitext2 --tfds_dir=~/tensorflow_datasets
    python train.py --config=configs/paper/table1.py:small --workdir=runs/table1_small

What differs from the paper: it trained in float16 with loss scaling, here activations are bfloat16 (float32 when small)
and parameters float32; fairseq draws q, k and v with half of Xavier's variance and the feed-forward layers as PyTorch
does, here all linear layers have Xavier's. What is scored is the validation split.
"""

from ml_collections import ConfigDict

from configs import default
from wavelet_jax import positions
from wavelet_jax.errors import unknown

MAIN = {  # the rows of both training lengths: options of config.position
    "nope": {"method": "nope"},
    "rope_theta1e4": {"method": "rope", "theta": 1e4},
    "rope_theta5e5": {"method": "rope", "theta": 5e5},
    "transformer_xl": {"method": "transformer_xl"},
    "alibi": {"method": "alibi"},
    "wavelet_ricker": {"method": "wavelet", "mother": "ricker"},
}
ROWS = {
    **{method: {"method": method} for method in positions.METHODS},
    **MAIN,
    "wavelet_gaussian": {"method": "wavelet", "mother": "gaussian"},
    "wavelet_morlet": {"method": "wavelet", "mother": "morlet"},
    # Eq. (15)'s Haar is the textbook's mirrored, for t = n - m (footnote 8).
    "wavelet_haar": {"method": "wavelet", "mother": "haar_standard"},
    "wavelet_haar_fixed_scale": {"method": "wavelet", "mother": "haar_standard"},  # see get_config
}
LENGTHS = {  # L_train: those of the table
    512: (128, 256, 512, 1012, 1512, 2512),
    1024: (1024, 1524, 3024, 5024),
    128: (32, 64, 128, 253, 378, 628),  # a quarter of those
    256: (256, 381, 756, 1256),
}


def get_config(variant: str = "") -> ConfigDict:
    words = variant.split("_")
    small, long = words[0] == "small", words[-1] == "1024"
    row = "_".join(words[small : len(words) - long])
    if row and row not in ROWS:
        names = [f"{size}{name}{length}" for size in ("", "small_") for name in ROWS for length in ("", "_1024")]
        raise unknown("variant of configs/paper/table1.py", variant, ["1024", "small", "small_1024", *names])
    position = ROWS[row or "wavelet_ricker"]
    config = section6(position["method"], small, long)
    config.position.update(position)
    if row == "wavelet_haar_fixed_scale":  # every scale 2^0, and the other rows' shifts: the paper does not state them
        shifts = config.model.head_dim // 8
        config.position.scales = (1.0,) * config.model.head_dim
        config.position.shifts = tuple(float(shift) for shift in range(shifts)) * 8
    config.compare.label = row
    if not row:
        start, end = "small_" * small, "_1024" * long
        config.compare.variants = tuple(f"{start}{name}{end}" for name in MAIN)
    return config


def section6(method: str, small: bool, long: bool = False) -> ConfigDict:
    """The model, training and evaluation of section 6 for a method, with L_train 512, or 1,024 if `long`."""
    config = default.get_config(method)
    config.data.update(source="tfds:wikitext/wikitext103", tokenizer="word")
    config.model.update(num_layers=16, d_model=1024, num_heads=8, num_kv_heads=8, head_dim=128, d_ff=4096)
    config.model.update(norm="layer", activation="relu", use_bias=True, final_norm=False)
    config.model.update(vocabulary="adaptive", cutoffs=(20_000, 60_000), adaptive_factor=4)
    config.model.update(scale_embedding=True, initializer="xavier", dtype="bfloat16")
    config.model.update(dropout=0.3, attention_dropout=0.1, activation_dropout=0.1, adaptive_dropout=0.2)
    config.train.update(steps=286_000, length=1024 if long else 512)
    config.train.batch_size = 8 * 9216 // config.train.length
    config.train.logits_chunk = 8 * 1024  # 1,024 tokens per device
    config.optimizer.update(name="nag", learning_rate=1.0, momentum=0.99, clip_norm=0.1)
    config.optimizer.update(warmup_start=1e-7, warmup_steps=16_000, final_fraction=1e-4)
    config.checkpoint.every = 5_000
    config.eval.update(every=5_000, windows=256, max_tokens=0)
    if small:
        config.data.source = "tfds:wikitext/wikitext2"
        config.model.update(num_layers=4, d_model=128, num_heads=4, num_kv_heads=4, head_dim=32, d_ff=512)
        config.model.update(cutoffs=(2_000, 10_000), dtype="float32")
        config.model.update(dropout=0.1, attention_dropout=0.0, activation_dropout=0.0, adaptive_dropout=0.1)
        config.train.update(steps=500, length=256 if long else 128, logits_chunk=256)
        config.train.batch_size = 2048 // config.train.length
        config.optimizer.warmup_steps = 50
        config.checkpoint.every = 250
        config.eval.update(every=250, windows=128, max_tokens=65_536)
    config.compare.lengths = LENGTHS[config.train.length]
    default.set_position(config, max_positions=max(config.compare.lengths))
    return config
