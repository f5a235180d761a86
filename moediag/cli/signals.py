"""Ctrl-C and SIGTERM: one line, no traceback, and a run that the same command resumes.

Invariants:
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
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"


class Interrupted(BaseException):
    """A signal asked the command to end; not a KeyboardInterrupt, which typer would turn into silence."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum
        how = "interrupted" if signum == signal.SIGINT else f"ended by {signal.Signals(signum).name}"
        self.line = f"moediag: {how}; what was captured is kept, run the same command again to resume"


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise :class:`Interrupted` on the first SIGINT or SIGTERM, exit at once on the next.

    Handlers belong to the main thread; elsewhere the caller's own stay in place.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    try:
        _handle(dict.fromkeys(_SIGNALS, _raise))
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


def _raise(signum: int, frame: FrameType | None) -> None:
    _handle(dict.fromkeys(_SIGNALS, _exit))
    raise Interrupted(signum)


def _exit(signum: int, frame: FrameType | None) -> None:
    shown = _SHOW_CURSOR if sys.stderr.isatty() else ""  # the progress bar had hidden it
    os.write(2, f"{shown}{Interrupted(signum).line}\n".encode())
    os._exit(128 + signum)
