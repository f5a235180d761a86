"""Claims: who may write what, among processes on one file system.

Invariants:
    - a claim is a flock, so the kernel ends it with its holder, however that ends: nothing ever has to be
      unlocked by hand;
    - a lock counts only while the file locked is still the one of that name. So a claim's file can be removed
      by its holder, and a finished run keeps none of them;
    - claims are about living processes only. They are kept apart from the data (``RUN/.claims``): copying them
      along means nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from moediag.errors import RunError
from moediag.run.files import write_error

_BLINK = 0.02  # seconds; a look at a claim (is_claimed) holds it for microseconds


@contextmanager
def claim(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the claim file ``path``; gives False when another process holds it.

    Args:
        path: the claim's file, made for it and removed with it.
        wait: wait for the other process instead.

    Raises:
        RunError: the file system has no locks, or cannot be written.
    """
    file = _take(path, wait)
    if file is None:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):  # what cannot be removed is taken over by the next holder
            path.unlink(missing_ok=True)
        release(file)
        with contextlib.suppress(OSError):  # the last claim takes the folder with it
            path.parent.rmdir()


def is_claimed(path: Path) -> bool:
    """True while a living process holds the claim; makes no file."""
    try:
        file = path.open("rb")
    except OSError:
        return False
    try:
        return not lock(file, path, exclusive=False, wait=False)
    finally:
        release(file)


def _take(path: Path, wait: bool) -> IO[str] | None:
    """The claim's file, locked; None when another process has it."""
    while True:
        file = _open(path)
        if file is None:
            continue
        is_mine = lock(file, path, wait=wait)
        if not is_mine:  # held, or only looked at by is_claimed
            time.sleep(_BLINK)
            is_mine = lock(file, path)
        if is_mine and is_at(file, path):
            return file
        release(file)
        if not is_mine:
            return None


def _open(path: Path) -> IO[str] | None:
    """The claim's file in its folder; None when another worker has just removed the folder."""
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path.parent)  # noqa: PTH102 - Path.mkdir(exist_ok=True) fails if it is removed meanwhile
        try:
            return path.open("a")
        except FileNotFoundError:
            return None
    except OSError as error:
        raise write_error(error, path) from error


def lock(file: IO[str] | IO[bytes], path: Path, *, exclusive: bool = True, wait: bool = False) -> bool:
    """Lock an open file against other processes; False when one of them is in the way.

    Raises:
        RunError: the file system has no locks.
    """
    how = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise RunError(
            f"cannot lock {path} ({error.strerror}): its file system has no locks (flock), which keep workers apart; "
            "capture to another file system and copy the run"
        ) from None
    return True


def release(file: IO[str] | IO[bytes]) -> None:
    """Unlock and close; unlocking by name also frees copies that forked processes inherited."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def is_at(file: IO[str] | IO[bytes], path: Path) -> bool:
    """True while ``path`` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
