"""Writes half of the file FOLDER/a, and the rest when its standard input ends: holding_a_partial_file.py FOLDER."""

import pathlib
import sys

from wavelet_jax.files import atomic

with atomic.replaced(pathlib.Path(sys.argv[1]) / "a") as partial:
    partial.write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
