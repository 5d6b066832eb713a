"""Start of the commands: flags and config files are parsed; a fault of the input is one line and exit code 2."""

import ctypes
import logging as std_logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import is_config_flag
from tqdm import tqdm

from wavelet_jax.commands import flag_errors, terminal
from wavelet_jax.config.keys import flatten
from wavelet_jax.errors import UserError, one_line
from wavelet_jax.files.reading import user_path
from wavelet_jax.hardware import devices
from wavelet_jax.parallel import processes

COORDINATOR = flags.DEFINE_string("coordinator", None, "of several processes: HOST:PORT of process 0")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "of several processes: how many")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "of several processes: which of them this is, from 0")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", None, "join the cluster that JAX finds; left out: where the environment counts several processes"
)
JOIN_TIMEOUT = flags.DEFINE_float(
    "join_timeout", processes.JOIN_TIMEOUT, "of several processes: seconds within which all must have come"
)
PEER_TIMEOUT = flags.DEFINE_float(
    "peer_timeout", processes.PEER_TIMEOUT, "seconds without a sign of life after which a process is taken for gone"
)

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h


def _parse(argv: list[str]) -> list[str]:
    defined = [
        (flag, flag.present)  # how often it was given before, to a program that parses more than one command line
        for module, its_flags in flags.FLAGS.flags_by_module_dict().items()
        if module.split(".")[0] != "absl"
        for flag in its_flags
    ]
    std_logging.disable(std_logging.WARNING)  # what the libraries have to say is in the error
    try:
        argv = [_at_home(argument) for argument in argv]
        rest = flags.FLAGS(argv)
        for name in flags.FLAGS:
            # A file that cannot be read, or that gives None, is reported only when the config is first used.
            if not is_config_flag(flags.FLAGS[name]):
                continue
            if not isinstance(flags.FLAGS[name].value, ConfigDict):
                raise UserError(f"--{name} gives no config")
            for key in config_flags.get_override_values(flags.FLAGS[name]):
                if key in flag_errors.NOT_SET:
                    raise UserError(f"--{name}.{key}: {flag_errors.NOT_SET[key]}")
    except Exception as error:
        raise flag_errors.explain(argv, error) from error
    finally:
        std_logging.disable(std_logging.NOTSET)
    for flag, before in defined:
        if not _takes_several(flag) and (times := flag.present - before) > 1:
            how = f"give one, as --{flag.name}=A,B" if isinstance(flag.value, list) else "give one"
            raise UserError(f"--{flag.name} is given {times} times, and only the last would count: {how}")
    if len(rest) > 1:
        raise UserError(f"unexpected arguments {' '.join(rest[1:])}: flags are written --name=value")
    return rest


def _at_home(argument: str) -> str:
    """A command line's argument, with the home folder for the ~ of --config=~/FILE.py."""
    name, equals, value = argument.partition("=")
    if name.lstrip("-") != "config" or not value.startswith("~"):
        return argument
    return name + equals + str(user_path(value, "--config"))


def _takes_several(flag: flags.Flag) -> bool:
    """Whether a flag may be given more than once. Of switches and of changes to a config, the last one counts."""
    return isinstance(flag, flags.MultiFlag | flags.BooleanFlag) or flag.name.startswith("config.")


def config_file(flag: str) -> Path:
    """The file of a config flag, without the variant."""
    return Path(config_flags.get_config_filename(flags.FLAGS[flag]).partition(":")[0])


def variants(config: ConfigDict, flag: str) -> dict[str, ConfigDict]:
    """The configs of `config.compare.variants`, by name: variants of the flag's file, with the command line's changes.

    Raises:
      UserError: an unknown name, or one that is named twice; also what the file raises, where it knows no such variant.
    """
    names = config.compare.variants
    if not names:
        return {}
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"compare.variants must be names of variants, not {names}")
    if len(set(names)) < len(names):
        raise UserError(f"compare.variants names a variant twice: {', '.join(names)}")
    changes = config_flags.get_override_values(flags.FLAGS[flag])
    configs = {name: flag_errors.load_config(f"{config_file(flag)}:{name}") for name in names}
    for key in changes:
        without = [name for name, each in configs.items() if key not in flatten(each)]
        if without and len(without) < len(configs):
            raise UserError(f"--{flag}.{key} is set for all variants, but {', '.join(without)} have no such key")
    for each in configs.values():
        for key in changes:
            flag_errors.check_key(each, key, None)
        each.update_from_flattened_dict({**changes, "compare.variants": ()})
    return configs


def _keep_memory() -> None:
    """Lets glibc keep what XLA's CPU runtime frees at every step, which halves the time of a step on two cores.

    Above 32 MB malloc maps and unmaps fresh pages each time, and every page is zeroed on its first touch. Other C
    libraries have no `mallopt` and are left alone, and so are machines with an accelerator: there the host's many
    threads, which read and tokenize, would wait for the one arena.
    """
    if devices.has_accelerator():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1)):
            mallopt(option, value)


def _keep_programs() -> None:
    """Keeps compiled programs in the user's cache, where programs are for accelerators and take minutes.

    A cache that the user has chosen (`JAX_COMPILATION_CACHE_DIR`) stays. Programs for CPUs are compiled in seconds, and
    only run on CPUs like the one that they were compiled on: a home folder may be shared by several kinds.
    """
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is None and devices.has_accelerator():
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "wavelet_jax" / "programs"))


class _Shown(std_logging.Handler):
    """Prints what the first process logs as it is, above a progress bar."""

    def emit(self, record: std_logging.LogRecord) -> None:
        if processes.is_first():
            tqdm.write(record.getMessage(), file=sys.stderr)


def run(main: Callable[[], None]) -> None:
    """Runs `main` with the flags parsed, ending with one line where the input was bad."""

    choice = std_logging.getLogger("wavelet_jax.attention")  # says once which backend "auto" takes, and why
    choice.addHandler(_Shown())
    choice.propagate = False

    def start(_) -> None:
        if not flags.FLAGS["verbosity"].present:  # absl would show what libraries say at INFO
            logging.set_verbosity(logging.WARNING)
            choice.setLevel(std_logging.INFO)
        processes.start(
            COORDINATOR.value,
            NUM_PROCESSES.value,
            PROCESS_ID.value,
            DISTRIBUTED.value,
            JOIN_TIMEOUT.value,
            PEER_TIMEOUT.value,
        )
        main()

    terminal.protect()
    _keep_memory()
    _keep_programs()
    try:
        app.run(start, flags_parser=_parse)
    except SystemExit as ended:  # also an ordinary end
        processes.leave(ended.code)
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        processes.end(2)
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            processes.wait_for_verdict()  # a collective fails when another process is gone
        traceback.print_exc()
        processes.end(1)
