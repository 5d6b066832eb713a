"""How both commands start: flags are parsed, and what a user can mend is one line and exit code 2."""

import ctypes
import sys
from collections.abc import Callable

from absl import app, flags, logging

from wavelet_jax.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # A config flag runs the config's file and sets its keys, so nearly anything can come out of parsing.
        raise UserError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise UserError(f"unexpected arguments {' '.join(rest[1:])}: flags are written --name=value")
    return rest


def _keep_memory() -> None:
    """Lets glibc keep what XLA's CPU runtime frees at every step, which halves the time of a step on two cores.

    Above 32 MB malloc maps and unmaps fresh pages each time, and every page is zeroed on its first touch. Other C
    libraries have no `mallopt` and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1)):
            mallopt(option, value)


def run(main: Callable[[], None]) -> None:
    """Runs `main` with the flags parsed, ending with one line where the input was bad."""

    def start(_) -> None:
        if not flags.FLAGS["verbosity"].present:  # absl would show what libraries say at INFO
            logging.set_verbosity(logging.WARNING)
        main()

    _keep_memory()
    try:
        app.run(start, flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
