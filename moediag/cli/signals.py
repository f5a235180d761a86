"""Ctrl-C and SIGTERM: one line, no traceback, and whether the same command goes on or starts over.

Invariants:
    - a resume is promised by the commands that capture, and by no other;
    - the first signal unwinds the command, so that engine processes are ended before it returns;
    - a second one, while that happens, ends the process at once: an engine process ends with its parent, and
      shards are atomic, so nothing is lost by it;
    - either way the exit code is 128 + the signal's number, as shells expect.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"


class Interrupted(BaseException):
    """A signal that ends the command; not a KeyboardInterrupt, which typer would turn into silence."""

    def __init__(self, signum: int, resumes: bool = False) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum
        how = "interrupted" if signum == signal.SIGINT else f"ended by {signal.Signals(signum).name}"
        then = (
            "what was captured is kept, run the same command again (without --force) to resume"
            if resumes
            else "the same command starts over, nothing of this one is resumed"
        )
        self.line = f"moediag: {how}; {then}"


@contextmanager
def interruptible(resumes: bool = False) -> Iterator[None]:
    """Raise :class:`Interrupted` on the first SIGINT or SIGTERM, exit at once on the next.

    Handlers belong to the main thread; elsewhere the caller's own stay in place.

    Args:
        resumes: whether the command, given again, goes on where it was.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    try:
        _handle(dict.fromkeys(_SIGNALS, partial(_raise, resumes)))
        yield
    except Interrupted:
        raise  # the handlers stay: the process is about to end, which another Ctrl-C may only hasten
    except BaseException:
        _handle(before)
        raise
    _handle(before)


def _handle(handlers: Mapping[signal.Signals, Any]) -> None:
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def _raise(resumes: bool, signum: int, frame: FrameType | None) -> None:
    _handle(dict.fromkeys(_SIGNALS, partial(_exit, resumes)))
    raise Interrupted(signum, resumes)


def _exit(resumes: bool, signum: int, frame: FrameType | None) -> None:
    shown = _SHOW_CURSOR if sys.stderr.isatty() else ""  # the progress bar had hidden it
    os.write(2, f"{shown}{Interrupted(signum, resumes).line}\n".encode())
    os._exit(128 + signum)
