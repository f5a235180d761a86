"""Logs of engine processes: kept beside the data, sealed so that changed bytes are found.

Invariants:
    - a log is only ever appended to, so workers and repeated runs of one command do not destroy each other's;
    - its seal, ``<log>.json``, covers what had been written when an engine process began or ended. It is there
      before the log is: copied from another machine, a log and a seal of different origin never meet.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from moediag.errors import MoediagError, RunError
from moediag.run.files import make_folder, read_sealed, write_error, write_sealed


@contextmanager
def kept(log: Path) -> Iterator[IO[bytes]]:
    """Open a log for appending while an engine writes to it; seals what is there before and afterwards.

    Raises:
        RunError: the log cannot be written.
    """
    make_folder(log.parent)
    _seal(log)
    try:
        file = log.open("ab")
    except OSError as error:
        raise write_error(error, log) from error
    try:
        with file:
            yield file
    finally:
        with contextlib.suppress(MoediagError):  # a disk that is full: what filled it is the error to tell
            _seal(log)


def log_damage(log: Path) -> str | None:
    """What is wrong with a log; None when its sealed bytes are those that were written."""
    try:
        seal = read_sealed(_seal_file(log))
    except RunError as error:
        return str(error)
    n_bytes = seal.get("n_bytes")
    if type(n_bytes) is not int or _digest(log, n_bytes) != (seal.get("log_sha256"), n_bytes):
        return f"{log} was changed after it was written (sha256 differs); delete it and {_seal_file(log).name}"
    return None


def _seal_file(log: Path) -> Path:
    return log.with_name(f"{log.name}.json")


def _seal(log: Path) -> None:
    digest, n_bytes = _digest(log, None)
    write_sealed(_seal_file(log), {"kind": "moediag log seal", "n_bytes": n_bytes, "log_sha256": digest})


def _digest(log: Path, n_bytes: int | None) -> tuple[Any, int]:
    """sha256 of the first bytes (None = of all), and how many there were."""
    try:
        data = log.read_bytes()[:n_bytes]
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise write_error(error, log) from error
    return hashlib.sha256(data).hexdigest(), len(data)
