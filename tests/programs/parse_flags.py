"""Parses the command lines on standard input (JSON) as `train.py` does; prints the error of each, or null."""

import json
import sys

from absl import flags

import train  # noqa: F401  # defines the flags
from wavelet_jax.commands import cli
from wavelet_jax.errors import UserError, one_line

for arguments in json.load(sys.stdin):
    sys.argv = ["train.py", *arguments]
    flags.FLAGS.unparse_flags()
    try:
        cli._parse(sys.argv)
        print(json.dumps(None))
    except UserError as error:
        print(json.dumps(one_line(error)))
