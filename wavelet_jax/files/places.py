"""Where runs and results are: a folder, or below gs://BUCKET/. What differs between the two is here and nowhere else.

A place in a bucket is one of `etils.epath`'s paths, which has pathlib's names (`/`, `name`, `parent`, `exists`,
`is_dir`, `iterdir`, `read_bytes`), so what only asks these needs no help. In a bucket a write of one object is whole or
not done, and nothing else is: no rename, no lock of the kernel, nothing that is appended. There are no folders either;
one is there while an object's name begins with it.
"""

import contextlib
import errno
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import quote

from wavelet_jax.errors import UserError, check_local
from wavelet_jax.files import atomic
from wavelet_jax.files.reading import user_path

NO_OBJECT = "0"  # the generation of an object that is not there
_ADDRESS = re.compile(r"([A-Za-z][\w+.-]*):/+(.*)", re.DOTALL)
_BLOCK = 32 * 2**20  # bytes of an object that are asked for at a time


class Unreachable(OSError):
    """A bucket did not answer, or refused."""


def at(text: str, name: str, folder: str = "") -> Path:
    """The folder, or the place in a bucket, that a user means by `text`, the value of the flag or key `name`.

    A relative path starts in `folder`, or where that is empty, in the current folder.

    Raises:
      UserError: an address other than gs://BUCKET/PATH; gcsfs is not installed; what `user_path` raises.
    """
    address = _ADDRESS.fullmatch(text)
    if not address:
        return user_path(text, name, folder)
    scheme, path = address.groups()
    if scheme != "gs":
        raise UserError(f"{name} is {text!r}: {scheme}:// is not known; gs://BUCKET/PATH and folders are")
    parts = path.split("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+[a-z0-9]", parts[0]) or not path.isprintable() or {".", ".."} & {*parts}:
        raise UserError(f"{name} is {text!r}, which is not gs://BUCKET/PATH")
    return _in_bucket(f"gs://{path}")


def given(place: str | os.PathLike) -> Path:
    """The same for a place that a program gives; a `Path` of gs://bucket/run has lost a slash."""
    return at(str(place), "the run's directory") if _ADDRESS.fullmatch(str(place)) else Path(place)


def _in_bucket(address: str) -> Path:
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{address} needs gcsfs: pip install 'wavelet_jax[gcs]', or use a folder")
    from etils import epath
    from fsspec.config import conf

    # Other processes, and TensorStore in this one, write what a listing that was kept would not have.
    for protocol in ("gs", "gcs"):
        conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it says is in the error
    return cast(Path, epath.Path(address.rstrip("/")))


def in_bucket(place: Path) -> bool:
    """Whether a place is in a bucket; else it is a path of this machine."""
    return not isinstance(place, Path)


def check(place: Path) -> None:
    """Raises `UserError` for a `Path` that is an address, and for a bucket that is not there or not to be read."""
    if not in_bucket(place):
        check_local(place)
        return
    bucket, _ = _names(place)
    try:
        with _reached(place):
            _system().call("GET", "b/{}/o", bucket, maxResults=1)
    except FileNotFoundError as error:
        raise UserError(f"{place} cannot be used: there is no bucket {bucket}") from error
    except Unreachable as error:
        raise UserError(f"{place} cannot be used: {error.strerror}") from error


def make(folder: Path) -> None:
    """Makes a folder of a run; see `atomic.make_folder`."""
    if not in_bucket(folder):
        atomic.make_folder(folder)


def refuse_links(*paths: Path) -> None:
    """See `atomic.refuse_links`; there are no links in a bucket."""
    atomic.refuse_links(*(path for path in paths if not in_bucket(path)))


def names(folder: Path) -> list[str]:
    """The names of what is in a folder; empty where there is no folder."""
    if not in_bucket(folder):
        return os.listdir(folder) if folder.is_dir() else []
    with _reached(folder), contextlib.suppress(FileNotFoundError):
        return sorted({path.rstrip("/").rpartition("/")[2] for path in _system().ls(_full_name(folder), detail=False)})
    return []


def files(folder: Path) -> list[Path]:
    """All files below a folder, sorted."""
    if not in_bucket(folder):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    with _reached(folder):
        found = sorted(_system().find(_full_name(folder)))
    return [folder / path.removeprefix(f"{_full_name(folder)}/") for path in found]


def write(path: Path, data: bytes) -> None:
    """Writes a file, which is replaced whole or not at all; its folder is made."""
    if not in_bucket(path):
        with atomic.replaced(path) as partial:
            partial.write_bytes(data)
        return
    with _reached(path):
        _system().pipe_file(_full_name(path), data)


def write_through(path: Path, data: bytes) -> None:
    """Writes a file that nobody reads yet, in a folder that is there; it is on the disk when this returns."""
    if in_bucket(path):
        write(path, data)
        return
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def touch(path: Path) -> None:
    """Makes an empty file, where there is none."""
    if not in_bucket(path):
        path.touch()
    elif not path.exists():
        write(path, b"")


def size(path: Path) -> int:
    """Bytes of a file."""
    if not in_bucket(path):
        return path.stat().st_size
    with _reached(path):
        return _system().info(_full_name(path))["size"]


def read(path: Path) -> bytes:
    """All of a file. Raises FileNotFoundError, with its name, where there is none."""
    return b"".join(blocks(path)) if in_bucket(path) else path.read_bytes()


def blocks(path: Path) -> Iterator[bytes]:
    """A file in pieces, for what need not be in memory at once. Raises FileNotFoundError where there is none."""
    if not in_bucket(path):
        with open(path, "rb", buffering=0) as file:
            while block := file.read(2**20):
                yield block
        return
    start, length = 0, size(path)
    while start < length:
        with _reached(path):
            block = _system().cat_file(_full_name(path), start=start, end=min(start + _BLOCK, length))
        start += len(block)
        yield block


def remove(path: Path, first: str = "") -> None:
    """Removes a file or a folder and all in it, of which the file `first` goes first."""
    if not in_bucket(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    found = [_full_name(each) for each in ([path] if _is_object(path) else files(path))]
    if first:
        found.sort(key=lambda key: not key.endswith(f"/{first}"))
    with _reached(path):
        for key in found:
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                _system().rm_file(key)


def move(path: Path, to: Path, first: str) -> None:
    """Gives a folder another name, which is free.

    In a bucket all is copied first and removed after: a kill between leaves both, or of the old one a part without the
    file `first`.
    """
    if not in_bucket(path):
        path.rename(to)
        return
    with _reached(path):
        for each in files(path):
            relative = str(each).removeprefix(f"{path}/")
            _system().cp_file(_full_name(each), _full_name(to / relative))
    remove(path, first)


class BucketLog:
    """An object that grows, by being written whole with every write; a kill leaves it with what it had before.

    Its size is what a write costs, and a bucket takes one write a second of an object: lines should be seconds apart.
    """

    def __init__(self, path: Path, data: bytes):
        self._path, self._data = path, data
        write(path, data)

    def write(self, data: bytes) -> int:
        """Appends all of `data`; returns its length. Raises OSError where it could not, and has changed nothing."""
        write(self._path, self._data + data)
        self._data += data
        return len(data)

    def __enter__(self) -> "BucketLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is left to write."""


def open_log(path: Path, data: bytes) -> IO[bytes] | BucketLog:
    """A file that holds `data` and grows: what `write` has taken, and returned the length of, outlives a kill."""
    if in_bucket(path):
        return BucketLog(path, data)
    write(path, data)
    return atomic.open_kept(path, "ab")  # says how much it has written, on a full disk too


class Mirror:
    """A folder for what can only write to this machine: `local` is `place` itself, or a copy that is uploaded."""

    def __init__(self, place: Path):
        self._place = place
        self.local = Path(tempfile.mkdtemp(prefix="wavelet_jax-")) if in_bucket(place) else place

    def upload(self) -> None:
        """Uploads all that is there by now, what was written first first. Raises OSError where that fails."""
        if not in_bucket(self._place):
            return
        for path in sorted(files(self.local), key=lambda path: path.stat().st_mtime_ns):
            write(self._place / path.relative_to(self.local).as_posix(), path.read_bytes())

    def close(self) -> None:
        """Uploads, and removes the copy; one that could not be uploaded stays, and the error names it."""
        if not in_bucket(self._place):
            return
        try:
            self.upload()
        except OSError as error:
            reason = f"{error.strerror or error}; what could not be written there is in {self.local}"
            raise Unreachable(errno.EIO, reason, str(self._place)) from error
        shutil.rmtree(self.local, ignore_errors=True)


@contextlib.contextmanager
def written_together(out: Path) -> Iterator[Path]:
    """See `atomic.written_together`. In a bucket the files come one after another, in the order they were written."""
    if not in_bucket(out):
        with atomic.written_together(out) as partial:
            yield partial
        return
    mirror = Mirror(out)
    yield mirror.local
    mirror.close()


# -- conditional writes, of buckets alone -----------------------------------------------------------------------------


def generation(path: Path) -> str:
    """The generation of an object, which every write of it changes; `NO_OBJECT` where it is not there."""
    try:
        with _reached(path):
            return _system().call("GET", "b/{}/o/{}", *_names(path), json_out=True)["generation"]
    except FileNotFoundError:
        return NO_OBJECT


def write_if(path: Path, data: bytes, expected: str) -> str | None:
    """Writes an object if its generation is the expected one; the new generation, or None if it was another.

    Two writers that expect the same: one of them writes. An answer that was lost on its way may come as None.
    """
    bucket, key = _names(path)
    address = _system().base.replace("/storage/v1/", "/upload/storage/v1/") + f"b/{quote(bucket, safe='')}/o"
    options: dict[str, Any] = {"uploadType": "media", "name": key, "ifGenerationMatch": expected}
    try:
        with _reached(path):
            headers = {"Content-Type": "text/plain"}
            return _system().call("POST", address, data=data, headers=headers, json_out=True, **options)["generation"]
    except (FileExistsError, FileNotFoundError):
        return None


def remove_if(path: Path, expected: str) -> bool:
    """Removes an object if its generation is the expected one."""
    try:
        with _reached(path):
            _system().call("DELETE", "b/{}/o/{}", *_names(path), ifGenerationMatch=expected)
    except (FileExistsError, FileNotFoundError):
        return False
    return True


def _is_object(path: Path) -> bool:
    return generation(path) != NO_OBJECT


def _names(place: Path) -> tuple[str, str]:
    """The bucket, and the name in it."""
    bucket, _, key = _full_name(place).partition("/")
    return bucket, key


def _full_name(place: Path) -> str:
    """A place as gcsfs names it: bucket/name."""
    return str(place).removeprefix("gs://")


def _system() -> Any:
    """The file system that epath uses too; one for the process."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)


@contextlib.contextmanager
def _reached(place: Path) -> Iterator[None]:
    """Errors of the network, of permissions and of gcsfs itself as `Unreachable`, which names the place."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place)) from error
    except (FileExistsError, Unreachable):
        raise
    except Exception as error:  # of aiohttp, requests, google.auth and gcsfs, which share no class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Unreachable(errno.EIO, reason, str(place)) from error
