"""Table 2 (section 7, A.8): the shape of Llama-2-7B from scratch, wavelets of scales 2^2 to 2^9 against RoPE.

    python train.py --config=configs/paper/llama2.py:wavelet --workdir=DIR \
        --config.data.train_files='redpajama-sample/*_sample.jsonl' \
        --config.data.validation_files='codeparrot-clean-valid/*.json.gz' --config.data.tokenizer_file=tokenizer.model

The files are RedPajama's 1B-token sample (JSON lines with "text"), CodeParrot (with "content") and Llama's own
SentencePiece model; without that, `--config.data.tokenizer=bpe` trains as many BPE tokens on the text.

6,738,415,616 parameters with 32,000 words. An update is a window of 4,096 tokens for each of 256 chips, a million
tokens in all and 5e16 FLOPs. What it takes on a TPU slice, compiled without one:

    python train.py --config=configs/paper/llama2.py:wavelet --compile_only --topology=v5e:16x16

and docs/launch.md has what that printed. Nobody has trained it here. Expected perplexity on CodeParrot (100 sequences,
`non_overlapping`) at 4,096, 8,192, 16,384 and 32,768 tokens: wavelet 9.00, 9.01, 8.83, 8.60, RoPE (theta 5e5) 9.45,
9.33, 9.12, 8.90.

The paper's updates are of one window. That run is `--config.train.batch_size=1 --config.mesh.fsdp=1
--config.mesh.tensor=-1` on 8 chips with the memory for it.

Variants: any position method, and with `_32k` after it (`wavelet_32k`) windows of 32,768 tokens. Before it, a size:
`1b_`, `350m_`, `100m_` or `10m_`, of about so many parameters, with heads of 128 as the paper's (10m: of 64, in
float32) and the same tokens an update (100m and 10m: fewer); from 350m down a device holds a whole model. A size alone,
such as `10m`, trains wavelets and RoPE one after another and compares them; with no variant, those of 7b.
"""

from ml_collections import ConfigDict

from configs import default

# Layers, d_model, heads, d_ff (8/3 of d_model, to a multiple of 128) and windows an update; parameters, 32,000 words:
SIZES = {
    "7b": (32, 4096, 32, 11008, 256),  # 6,738,415,616
    "1b": (17, 2048, 16, 5632, 256),  # 1,004,607,488
    "350m": (22, 1024, 8, 2816, 256),  # 348,173,312
    "100m": (12, 640, 5, 1792, 64),  # 101,924,480
    "10m": (8, 128, 2, 384, 16),  # 9,898,112
}
LABELS = {"rope": "rope_theta5e5", "wavelet": "wavelet_ricker_a2^2..2^9"}  # the table's names


def get_config(variant: str = "") -> ConfigDict:
    size, _, method = variant.partition("_") if variant.split("_")[0] in SIZES else ("7b", "", variant)
    method, long = method.removesuffix("_32k"), method.endswith("_32k")
    config = default.get_config(method or "wavelet")
    config.data.update(source="jsonl", tokenizer="sentencepiece", vocab_size=32000, validation_text_field="content")
    layers, width, heads, d_ff, windows = SIZES[size]
    config.model.update(num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=heads)
    config.model.update(head_dim=width // heads, d_ff=d_ff, tied_head=False, dtype="bfloat16", remat="block")
    config.position.update(first_exponent=2, theta=5e5, max_positions=4096)
    config.train.update(steps=30_000, length=4096, batch_size=windows)
    config.train.logits_chunk = windows * 512  # 512 tokens a chip, where each has a window
    config.optimizer.learning_rate = 3e-4  # with b1 0.9 and b2 0.95, the paper's; the schedule is ours
    if size in ("7b", "1b"):
        config.mesh.update(data=1, fsdp=-1)
    if size == "10m":  # for CPUs too
        config.model.dtype = "float32"
    if long:
        config.position.max_positions = 32768
        config.train.update(length=32768, batch_size=max(1, windows // 8))
        config.mesh.tensor = min(8, heads) if size in ("7b", "1b") else 1
    config.eval.sequences = 100
    config.compare.update(lengths=(4096, 8192, 16384, 32768), protocol="non_overlapping")
    if method:
        config.compare.label = LABELS.get(method, method)
    else:
        config.compare.variants = tuple(f"{size}_{method}" for method in LABELS)
    return config
