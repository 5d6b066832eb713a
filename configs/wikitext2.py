"""WikiText-2, word level, on two cores: which position method keeps its perplexity past the training length?

    python train.py --config=configs/wikitext2.py:METHOD --workdir=DIR \
        --config.data.train_files=wiki.train.tokens --config.data.validation_files=wiki.valid.tokens

The files are those of the WikiText-2 word-level archive (plain, .gz or .xz): 2,088,628 and 217,646 tokens, a vocabulary
of 33,278. 400 updates take about ten minutes per method on two cores; expected perplexity per word at 128 and at 2,048:
wavelet 358 and 372, RoPE 358 and 479, ALiBi 336 and 334.

Variants: any position method. With no variant, wavelet, RoPE and ALiBi one after another, then the figures.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(method: str = "") -> ConfigDict:
    config = default.get_config(method or "wavelet")
    config.data.update(source="text", tokenizer="word")
    config.model.dropout = 0.1
    config.train.update(steps=400, batch_size=16)
    config.optimizer.update(learning_rate=4e-3, warmup_steps=40)
    config.compare.variants = () if method else ("wavelet", "rope", "alibi")
    config.compare.lengths = (128, 256, 512, 1024, 2048)
    return config
