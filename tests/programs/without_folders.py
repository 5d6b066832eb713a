"""Runs a script as the main program where orbax can make no folders, as over a quota: SCRIPT ARGUMENTS."""

import errno
import os
import runpy
import sys

make = os.mkdir


def mkdir(path, *arguments, **named):
    if "orbax-checkpoint-tmp" in os.fspath(path):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), os.fspath(path))
    make(path, *arguments, **named)


os.mkdir = mkdir
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
