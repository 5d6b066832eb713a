"""One clear line for whatever is wrong with a command line: absl and ml_collections answer with lines of many kinds.

`explain` is called after parsing has failed. It looks for the fault itself, in the config file and in its keys, and
uses what the libraries said only where it finds none.
"""

import re
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import tuple_parser
from ml_collections.config_flags.config_flags import is_config_flag

from wavelet_jax import positions
from wavelet_jax.config.keys import flatten
from wavelet_jax.errors import UserError, nearest

# Keys that cannot be set, and what is set instead.
NOT_SET = {
    "config_version": "it is that of this code, and the same for all runs",
    "train.seed": "there are two seeds, train.model_seed (parameters, dropout) and data.seed (order of windows)",
    "position.d_model": "it is always model.d_model: set that",
    "position.method": "the method is chosen by the variant: --config=FILE.py:METHOD",
}
_TAKES = {"int": "a whole number", "float": "a number", "bool": "true or false", "tuple": "a tuple, such as (64, 128)"}


def explain(argv: Sequence[str], error: Exception) -> UserError:
    """The fault of a command line that could not be parsed.

    Args:
      argv: as `sys.argv`.
      error: what absl or ml_collections raised.
    """
    try:
        for name in [name for name in flags.FLAGS if is_config_flag(flags.FLAGS[name])]:
            _check_config_flag(name, argv)
        _check_names(error)
    except UserError as found:
        return found
    if match := re.match(r"flag --([\w.]+)=(.*?): ", str(error), re.DOTALL):
        name, value = match.groups()
        if takes := _TAKES.get(flags.FLAGS[name].flag_type() if name in flags.FLAGS else ""):
            return UserError(f"--{name}={value}: it takes {takes}")
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    return UserError(" ".join(str(said).split()) or type(error).__name__)


def load_config(source: str) -> ConfigDict:
    """The config of "FILE.py" or "FILE.py:VARIANT". Raises `UserError` where the file gives none, and its own."""
    file, *arguments = source.split(":", 1)
    if not file:
        raise UserError("--config is empty: it takes FILE.py or FILE.py:VARIANT")
    if not Path(file).is_file():
        raise UserError(f"there is no config file {file}" + (": it is a folder" if Path(file).is_dir() else ""))
    try:
        config = runpy.run_path(file)["get_config"](*arguments)
    except UserError:
        raise
    except KeyError as error:
        if error.args == ("get_config",):
            raise UserError(f"the config file {file} defines no function get_config") from error
        raise _in_config(file, error) from error
    except Exception as error:
        raise _in_config(file, error) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of the config file {file} returned {type(config).__name__}, not a ConfigDict")
    return config


def check_key(config: ConfigDict, key: str, value: str | None, flag: str = "config") -> None:
    """Raises `UserError` where a config has no such key, or one that does not take this value.

    Args:
      key: with its sections, "train.steps".
      value: as written on the command line; None where it is only asked for the key.
    """
    if key in NOT_SET:
        raise UserError(f"--{flag}.{key}: {NOT_SET[key]}")
    keys = list(flatten(config))
    there = flatten(config, sections=True)
    section, _, option = key.rpartition(".")
    if key not in there and section == "position" and option_of_another(config, option):
        raise positions.unknown_option(config.position.method, option)
    if key not in there:
        near = nearest(key, keys)
        hint = f": did you mean {near!r}?" if near else ""
        if isinstance(there.get(section), ConfigDict):
            hint += f"{'' if hint else ':'} {section} has {', '.join(there[section])}"
        raise UserError(f"unknown config key {key!r}{hint or ': its sections are ' + ', '.join(config)}")
    if isinstance(there[key], ConfigDict):
        raise UserError(f"--{flag}.{key} is a section, not a key: set {', '.join(f'{key}.{x}' for x in there[key])}")
    kind = type(there[key]).__name__
    if value is not None and not _parses(kind, value):
        raise UserError(f"--{flag}.{key}={value}: it takes {_TAKES[kind]}")


def option_of_another(config: ConfigDict, option: str) -> bool:
    """Whether a name is an option of position methods other than the config's."""
    return option not in config.position and any(option in positions.config(name) for name in positions.METHODS)


def _check_config_flag(name: str, argv: Sequence[str]) -> None:
    """Raises `UserError` for what is wrong with a config flag and the keys that are set below it."""
    given, settings = None, []
    for i, argument in enumerate(argv[1:], 1):
        if argument == "--":
            break
        if match := re.fullmatch(rf"--?{name}(?:=(.*))?", argument, re.DOTALL):
            if settings:
                raise UserError(f"{argument} must come before {settings[0][2]}")
            given = match[1] if match[1] is not None else argv[i + 1] if i + 1 < len(argv) else ""
        elif match := re.fullmatch(rf"--?(no)?{name}\.([^=]+)(?:=(.*))?", argument, re.DOTALL):
            negated, key, value = match.groups()
            following = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else None
            settings.append((key, value, argument, following, negated))
    config = load_config(str(flags.FLAGS[name].default) if given is None else given)
    for key, value, argument, following, negated in settings:
        check_key(config, key, value, name)
        if type(flatten(config)[key]) is bool:
            continue
        if negated:
            raise UserError(f"{argument}: only a switch can be negated, and {key} takes a value")
        if value is None and following is None:
            raise UserError(f"{argument} has no value: flags are written --name=value")
        check_key(config, key, value if value is not None else following, name)


def _check_names(error: Exception) -> None:
    """Raises `UserError` where the error is that of a flag that does not exist."""
    if isinstance(error, flags.UnrecognizedFlagError):
        name = nearest(error.flagname, flags.FLAGS)
        near = f": did you mean --{name}?" if name else ""
        raise UserError(f"unknown flag --{error.flagname}{near or ': --help lists those that there are'}") from error


def _in_config(file: str, error: Exception) -> UserError:
    """For what the code of a config file has raised: where, and what."""
    if isinstance(error, SyntaxError):
        return UserError(f"the config file {error.filename or file} is not Python: {error.msg} (line {error.lineno})")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = f", line {frames[-1].lineno}" if frames else ""
    said = " ".join(str(error).split())
    option = re.search(r"[Kk]ey [\"'](\w+)[\"'] does not exist", said)
    if option and (owners := [name for name in positions.METHODS if option[1] in positions.config(name)]):
        said += f" ({option[1]} is an option of {', '.join(owners)})"
    return UserError(f"the config file {file}{line}: {type(error).__name__}{': ' * bool(said)}{said}")


def _parses(kind: str, value: str) -> bool:
    """Whether ml_collections takes a value for a key of this kind; kinds that are not of `_TAKES` are not judged."""
    try:
        match kind:
            case "int":
                flags.IntegerParser().parse(value)
            case "float":
                flags.FloatParser().parse(value)
            case "bool":
                flags.BooleanParser().parse(value)
            case "tuple":
                tuple_parser.TupleParser().parse(value)
    except (ValueError, TypeError):
        return False
    return True
