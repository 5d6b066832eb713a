"""Table 2 (section 7, A.8): the shape of Llama-2-7B from scratch, wavelets of scales 2^2 to 2^9 against RoPE.

    python train.py --config=configs/paper/llama2.py:wavelet --workdir=DIR \
        --config.data.train_files='redpajama-sample/*_sample.jsonl' \
        --config.data.validation_files='codeparrot-clean-valid/*.json.gz' --config.data.tokenizer_file=tokenizer.model

The files are RedPajama's 1B-token sample (JSON lines with "text"), CodeParrot (with "content") and Llama's own
SentencePiece model; without that, `--config.data.tokenizer=bpe` trains as many BPE tokens on the text.

As the paper: 30,000 updates of one window of 4,096 tokens. One window cannot be split into rows, so all devices share
each product (mesh.tensor, up to 32 of them). Expected perplexity on CodeParrot (100 sequences, `non_overlapping`):

    tokens                     4,096    8,192   16,384   32,768
    wavelet_ricker_a2^2..2^9    9.00     9.01     8.83     8.60
    rope_theta5e5               9.45     9.33     9.12     8.90

Variants: any position method; with no variant, wavelets and RoPE one after another, and then the figures. Before it a
size: `1b_`, `350m_`, `100m_` or `10m_`, of about so many parameters, with heads of 128 as the paper's (10m: of 64, in
float32); a size alone, such as `10m`, trains and compares those two methods. Each run, at the paper's 123M tokens:

    size                          7b       1b     350m     100m      10m    small
    FLOPs                     5.3e18   8.0e17   3.0e17   8.3e16   7.4e15   3.7e13
    hours of one A100 at 40%      12      1.8      0.7      0.2     0.02

`small` is the shape of 10m for a laptop: 500 updates of 8 windows of L_train = 256, scored at 256 to 2,048 tokens,
20 sequences; about an hour on two cores for both methods.

`_pod` after the method is the run for a slice: 256 windows per update, a million tokens, parameters split over all
chips (for sizes from 350m down every chip has them all); and `_32k` the same with 32 windows of 32,768 tokens. Its
30,000 updates are 256 times the paper's tokens (`--config.train.steps`), and what comes out is not Table 2. What a
step takes there, compiled without a slice, and docs/launch.md has what that printed:

    python train.py --config=configs/paper/llama2.py:wavelet_pod --compile_only --topology=v5e:16x16

Nobody has trained the larger ones here.
"""

from ml_collections import ConfigDict

from configs import default

# Layers, d_model, heads and d_ff (8/3 of d_model, to a multiple of 128); parameters, 32,000 words:
SIZES = {
    "7b": (32, 4096, 32, 11008),  # 6,738,415,616
    "1b": (17, 2048, 16, 5632),  # 1,004,607,488
    "350m": (22, 1024, 8, 2816),  # 348,173,312
    "100m": (12, 640, 5, 1792),  # 101,924,480
    "10m": (8, 128, 2, 384),  # 9,898,112
}
SIZES["small"] = SIZES["10m"]
LABELS = {"rope": "rope_theta5e5", "wavelet": "wavelet_ricker_a2^2..2^9"}  # the table's names
POD = 256  # windows of 4,096 an update
# How devices share the sizes that one does not hold: one window at a time, a window or an eighth of one each.
MESH = {"": {"tensor": -1}, "pod": {"fsdp": -1}, "32k": {"fsdp": -1, "tensor": 8}}


def get_config(variant: str = "") -> ConfigDict:
    size, _, rest = variant.partition("_") if variant.split("_")[0] in SIZES else ("7b", "", variant)
    method, _, scale = rest.rpartition("_") if rest.endswith(("_pod", "_32k")) else (rest, "", "")
    config = default.get_config(method or "wavelet")
    config.data.update(source="jsonl", tokenizer="sentencepiece", vocab_size=32000, validation_text_field="content")
    layers, width, heads, d_ff = SIZES[size]
    config.model.update(num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=heads)
    config.model.update(head_dim=width // heads, d_ff=d_ff, tied_head=False, dtype="bfloat16", remat="block")
    default.set_position(config, first_exponent=2, theta=5e5, max_positions=4096)
    config.train.update(steps=30_000, length=4096, batch_size=1, logits_chunk=512)
    config.optimizer.learning_rate = 3e-4  # with b1 0.9 and b2 0.95, the paper's; the schedule is ours
    config.eval.sequences = 100
    config.compare.update(lengths=(4096, 8192, 16384, 32768), protocol="non_overlapping")
    if size in ("7b", "1b"):
        config.mesh.update(data=1, **MESH[scale])
    if scale:
        config.train.update(batch_size=POD, logits_chunk=512 * POD)  # 512 tokens per chip, where each has a window
    if scale == "32k":
        default.set_position(config, max_positions=32768)
        config.train.update(length=32768, batch_size=POD // 8)
    if size in ("10m", "small"):  # for CPUs too
        config.model.dtype = "float32"
    if size == "small":
        default.set_position(config, max_positions=2048)
        config.train.update(steps=500, length=256, batch_size=8, logits_chunk=256)
        config.checkpoint.every = config.eval.every = 250
        config.eval.update(windows=32, sequences=20)
        config.compare.lengths = (256, 512, 1024, 2048)
    if method:
        config.compare.label = LABELS.get(method, method)
    else:
        config.compare.variants = tuple(f"{size}_{method}" for method in LABELS)
    return config
