"""The paper's long-context model (section 7, A.8): the shape of Llama-2-7B from scratch, wavelets of scales 2^2 to 2^9.

    python train.py --config=configs/paper/llama2_7b.py:wavelet --workdir=DIR \
        --config.data.train_files='redpajama-sample/*.jsonl'

6,738,415,616 parameters with 32,000 words. An update is a window of 4,096 tokens for each of 256 chips, a million
tokens in all and 5e16 FLOPs. What it takes on a TPU slice, compiled without one:

    python train.py --config=configs/paper/llama2_7b.py:wavelet --compile_only --topology=v5e:16x16

and docs/launch.md has what that printed. Nobody has trained it here; the paper has a perplexity on CodeParrot to meet.

The paper's updates are of one window. That run is `--config.train.batch_size=1 --config.mesh.fsdp=1
--config.mesh.tensor=-1` on 8 chips with the memory for it. Llama's own SentencePiece vocabulary is not here: a BPE of
as many words is trained on the text.

Variants: any position method, and with `_32k` after it (`wavelet_32k`) windows of 32,768 tokens.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "wavelet") -> ConfigDict:
    config = default.get_config(variant.removesuffix("_32k"))
    config.data.update(source="jsonl", tokenizer="bpe", vocab_size=32000)
    config.model.update(num_layers=32, d_model=4096, num_heads=32, num_kv_heads=32, head_dim=128, d_ff=11008)
    config.model.update(tied_head=False, dtype="bfloat16", remat="block")
    config.position.update(first_exponent=2, theta=5e5, max_positions=4096)
    config.train.update(steps=30_000, length=4096, batch_size=256)
    config.train.logits_chunk = 256 * 512  # 512 tokens a chip
    config.optimizer.learning_rate = 3e-4  # with b1 0.9 and b2 0.95, the paper's; the schedule is ours
    config.mesh.update(data=1, fsdp=-1)
    if variant.endswith("_32k"):
        config.position.max_positions = 32768
        config.train.update(length=32768, batch_size=32)
        config.mesh.tensor = 8
    return config
