"""One folder in place of another: it appears whole, and what it replaces is lost only when that is settled.

    PARENT/NAME                    the folder
    PARENT/.NAME.<process>.new     being made by that process; .old: being removed by it
    PARENT/.NAME.replaced          what stood at NAME before, as long as it may have to come back

Invariants:
    - NAME is only ever the result of a rename of a whole folder;
    - killed at any moment, what stood there is whole under one of two names, NAME or .NAME.replaced;
    - what a killed process left of its own is removed by the next that makes the same folder, a living one's never.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moediag.errors import RunError
from moediag.run.files import host_tag, make_folder, process_tag, write_error


@contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes the place of ``path`` when the body ends; if it raises, ``path`` stays.

    Raises:
        RunError: ``path`` is the current folder, or cannot be written.
    """
    path = refuse_current_folder(path).resolve()
    made = being_made(path)
    try:
        if path.exists():
            drop_replaced(path)  # killed after the new one was in place
        put_back(path)  # killed before
        make_folder(made)
        yield made
        take_place(made, path)
        drop_replaced(path)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def refuse_current_folder(path: Path) -> Path:
    """The path, unless it is the folder that the process stands in, which cannot be replaced under it.

    Raises:
        RunError: it is.
    """
    if path.exists() and path.samefile(Path.cwd()):
        raise RunError(f"{path} is the current folder; give -o a folder of its own, e.g. -o run")
    return path


def being_made(path: Path) -> Path:
    """Where this process makes the folder that will be ``path``; what dead processes left there is removed."""
    attempt = re.compile(rf"\.{re.escape(path.name)}\.{host_tag()}-(\d+)\.(new|old)")
    for folder in path.parent.iterdir() if path.parent.is_dir() else ():
        match = attempt.fullmatch(folder.name)
        if match and folder.is_dir() and not _is_alive(int(match.group(1))):
            shutil.rmtree(folder, ignore_errors=True)
    return path.with_name(f".{path.name}.{process_tag()}.new")


def replaced(path: Path) -> Path:
    """Where what stood at ``path`` is kept."""
    path = path.resolve()
    return path.with_name(f".{path.name}.replaced")


def take_place(made: Path, path: Path) -> None:
    """Rename ``made`` to ``path``; what is there is kept as :func:`replaced`.

    Where something is kept already, what is there now never came to anything: it goes, and the older one is kept.
    """
    kept = replaced(path)
    if path.exists() and any(path.iterdir()):
        if kept.exists():
            _remove(path, path)
        else:
            path.rename(kept)
    try:
        made.rename(path)
    except OSError:
        put_back(path)
        raise


def put_back(path: Path) -> None:
    """Rename what is kept to ``path`` again, if anything is kept and nothing is there."""
    if not path.exists() and replaced(path).exists():
        replaced(path).rename(path)


def drop_replaced(path: Path) -> None:
    """Remove what is kept: its place is taken for good."""
    if replaced(path).exists():
        _remove(replaced(path), path.resolve())


def _remove(folder: Path, path: Path) -> None:
    """Out of the way in one step first: a kill in the middle of removing must not leave half a folder in place."""
    dying = path.with_name(f".{path.name}.{process_tag()}.old")
    shutil.rmtree(dying, ignore_errors=True)
    folder.rename(dying)
    shutil.rmtree(dying, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
