"""Files that are replaced whole or not at all, and that never lead out of their folder by a symbolic link.

What is written goes into a temporary folder beside its place, and from there to its place by one rename. A rename
replaces a symbolic link instead of following it. A process that is killed leaves its temporary folder behind; the next
one that writes to the same place removes it: the kernel lets go of a dead process's lock.
"""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from wavelet_jax.errors import UserError
from wavelet_jax.files import locks

_TEMPORARY = ".partial-"  # a temporary folder's name begins so


@contextlib.contextmanager
def written_together(out: Path) -> Iterator[Path]:
    """A folder to write files into: at the end all of them go to `out`, after an error none.

    `out` is made where it is missing, and what killed processes have left in it is removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _temporary(out) as partial:
        yield partial
        for path in sorted(partial.iterdir()):
            os.replace(path, out / path.name)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to: at the end the file there becomes `path`, after an error `path` is as it was."""
    with written_together(path.parent) as partial:
        yield partial / path.name


def open_kept(path: Path, mode: str) -> IO:
    """Opens a file that stays where it is: a lock, or a log that grows. Buffered as by `open`; "ab" is unbuffered.

    Raises:
      UserError: a symbolic link, a second name of another file, or no file at all is in its place.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe would wait for its reader
    try:
        descriptor = os.open(path, flags | (os.O_APPEND if "a" in mode else 0), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            refuse_links(path)
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        what = "is another name of a file elsewhere (a hard link)" if stat.S_ISREG(found.st_mode) else "is not a file"
        raise UserError(f"{path} {what}: remove it, or use another folder")
    if "b" in mode:
        return os.fdopen(descriptor, mode, buffering=0)
    return os.fdopen(descriptor, mode, errors="replace")  # whatever somebody has put there


def make_folder(folder: Path) -> None:
    """Makes a folder in a run's directory. Raises `UserError` where a link or anything else is in its place."""
    refuse_links(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder: move it away, or use another one")
    folder.mkdir(parents=True, exist_ok=True)


def refuse_links(*paths: Path) -> None:
    """Raises `UserError` where one of these paths, or anything below it, is a symbolic link."""
    for path in paths:
        below = (Path(folder) / name for folder, *names in os.walk(path) for name in names[0] + names[1])
        for each in (path, *below) if not path.is_symlink() else (path,):
            if each.is_symlink():
                raise UserError(
                    f"{each} is a symbolic link, to {os.readlink(each)}: what is written there would go elsewhere; "
                    "remove it, or use another folder (which may itself be a link)"
                )


@contextlib.contextmanager
def _temporary(place: Path) -> Iterator[Path]:
    """A folder of this process in `place`, which is removed at the end; those of dead processes are removed first."""
    for left in place.glob(f"{_TEMPORARY}*"):
        with _locked(left, wait=False) as held:
            if held:
                shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        while True:  # another process may take the new folder for a dead one's before it is locked
            folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=place))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(_locked(folder, wait=True))
            if folder.exists():
                break
        yield folder


@contextlib.contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Holds the lock of a folder; False where another process does, or the file system has no such locks (NFS)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # gone, or not a folder of ours
        yield False
        return
    try:
        yield locks.lock(descriptor, wait=wait) is True
    finally:
        os.close(descriptor)
