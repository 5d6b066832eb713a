"""Builds a corpus and stays in the middle of its tokenizing: build_slowly.py CONFIG, of config.data as JSON."""

import json
import sys
import time

from ml_collections import ConfigDict

from wavelet_jax.data import load_corpus, tokenizers

encode, seen = tokenizers.Byte.encode, []


def slow(self, text):
    seen.append(text)
    if len(seen) == 5:
        print("in the middle", flush=True)
        time.sleep(600)
    return encode(self, text)


tokenizers.Byte.encode = slow
load_corpus(ConfigDict(json.loads(sys.argv[1])))
