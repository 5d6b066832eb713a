"""WikiText-2 and WikiText-103 at word level, a TFDS data set that needs no TensorFlow.

    python -m wavelet_jax.data.wikitext --name=wikitext103 --tfds_dir=DIR

prepares it once (`__main__.py`), and `--config.data.source=tfds:wikitext/wikitext103 --config.data.tfds_dir=DIR
--config.data.tokenizer=word` reads it: articles in their order, the splits train, validation and test.
"""
