"""Digests of a checkpoint's files, so that no damaged one is ever loaded: one more file, written last, read first.

`b2sum --length=256 --check checksums.b2` in a checkpoint's folder does by hand what `damage` does.
"""

import concurrent.futures
import hashlib
from pathlib import Path

from wavelet_jax.files import places

NAME = "checksums.b2"
THREADS = 8  # hashing lets go of the interpreter's lock; enough of them to keep a disk busy
# Written between the checksums and the rename that commits a checkpoint; nothing of ours reads them.
_NOT_READ = ("_CHECKPOINT_METADATA", "commit_success.txt")


def write(folder: Path) -> None:
    """Writes `folder/checksums.b2`: a line "DIGEST  PATH" for every file below, and above them a digest of the lines.

    A checkpoint that was saved before there were checksums cannot be told from a damaged one: calling this for
    `Path("runs/x/checkpoints/500")` vouches for it as it is.
    """
    names = [str(path).removeprefix(f"{folder}/") for path in places.files(folder)]
    names = [name for name in names if name not in (NAME, *_NOT_READ)]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(_digest, (folder / name for name in names))
        lines = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    places.write_through(folder / NAME, f"# {_digest_of(lines.encode())}\n{lines}".encode())


def damage(folder: Path) -> str | None:
    """The fault of a checkpoint in a few words; None if all its files are as they were written.

    Reads every file once. A difference goes unseen with probability 2^-256 (BLAKE2b).
    """
    try:
        if not folder.is_dir():
            return "it is not a folder"
        if not any(folder.iterdir()):
            return "it is empty"
        heading, _, lines = places.read(folder / NAME).partition(b"\n")
        if heading != b"# " + _digest_of(lines).encode():
            return f"{NAME} is not as it was written"
        written = dict(line.split("  ", 1)[::-1] for line in lines.decode().splitlines())
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(_digest, (folder / name for name in written))
            for (name, digest), digest_now in zip(written.items(), found, strict=True):
                if digest_now != digest:
                    return f"{name} is {'not as it was written' if places.size(folder / name) else 'empty'}"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{str(error.filename).removeprefix(f'{folder}/')} is missing"
    except places.Unreachable:  # says nothing of the checkpoint
        raise
    except OSError as error:
        return f"it cannot be read: {error}"
    return None


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for block in places.blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()
