"""Exclusive locks of open files and folders, which the kernel drops when their holder dies in any way."""

import fcntl
from typing import IO


def lock(file: IO | int, *, wait: bool = False) -> bool | None:
    """Locks an open file, or a folder by its descriptor, until it is closed.

    Returns:
      True: locked. False: another process holds the lock (never with `wait`). None: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
