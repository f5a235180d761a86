"""One engine, one process: how the parent starts it, follows it and hears its errors.

Invariants:
    - the engine's own chatter goes to a log file; progress and errors come as JSON lines over a pipe;
    - the child's standard input is its lifeline: when the parent goes, however it goes, the child ends at
      once, with the processes it started. Shards are atomic, so that is always safe.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from moediag import errors
from moediag.errors import EngineError, MoediagError
from moediag.run import logs

_CHANNEL = "MOEDIAG_CHANNEL_FD"
OnEvent = Callable[[dict[str, Any]], None]


def run_child(task: str, options: dict[str, Any], log: Path, on_event: OnEvent, env: dict[str, str]) -> None:
    """Run one engine task in a process of its own and wait for it.

    Args:
        task: name of a task in :mod:`moediag.engines.child`.
        options: JSON-ready arguments of the task.
        log: file that receives the engine's output.
        on_event: called with every progress event, ``{"done": n, "total": n, "unit": ...}`` or ``{"stage": ...}``.
        env: environment variables set for the child only, where the user has not set them.

    Raises:
        MoediagError: what the child raised, by its own type.
        EngineError: the child died without a word.
    """
    with logs.kept(log) as log_file:
        read_fd, write_fd = os.pipe()
        child = subprocess.Popen(
            [sys.executable, "-m", "moediag.engines.child", task],
            stdin=subprocess.PIPE,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            pass_fds=[write_fd],
            env={**env, **os.environ, _CHANNEL: str(write_fd)},
            start_new_session=True,  # Ctrl-C reaches the parent only, which then cuts the lifeline
        )
        os.close(write_fd)
        try:
            with os.fdopen(read_fd) as events:
                _start(child, options)
                failure = _follow(events, on_event)
            status = child.wait()
        finally:
            _kill(child)  # also after a good end: vLLM's workers and engine core outlive the process that started them
            with contextlib.suppress(OSError):  # a child that died early leaves nobody to flush to
                if child.stdin:
                    child.stdin.close()
    if failure is not None:
        raise failure
    if status:
        raise EngineError(f"the {task} engine died (exit status {status}) without a word; its output is in {log}")


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The engine and the processes it started: the child leads a group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _start(child: subprocess.Popen[bytes], options: dict[str, Any]) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # reported as an early death after the wait
        child.stdin.write(json.dumps(options).encode() + b"\n")
        child.stdin.flush()


def _follow(events: TextIO, on_event: OnEvent) -> MoediagError | None:
    failure = None
    for line in events:
        event = json.loads(line)
        if "error" in event:
            kind = getattr(errors, event["error"], EngineError)
            failure = kind(event["message"])
        else:
            on_event(event)
    return failure


class Reporter:
    """The child's end of the channel."""

    def __init__(self) -> None:
        self._out = os.fdopen(int(os.environ.pop(_CHANNEL)), "w", buffering=1)
        self._last = 0.0

    def progress(self, done: float, total: int, unit: str) -> None:
        """Tell how far the work is; more often than five times a second is not worth a write."""
        now = time.monotonic()
        if done >= total or now - self._last > 0.2:
            self._last = now
            self._send({"done": done, "total": total, "unit": unit})

    def stage(self, text: str) -> None:
        """Tell what is going on while nothing can be counted."""
        self._send({"stage": text})

    def error(self, error: MoediagError) -> None:
        """Tell what ended the work."""
        self._send({"error": type(error).__name__, "message": str(error)})

    def _send(self, event: dict[str, Any]) -> None:
        self._out.write(json.dumps(event) + "\n")


def hold_lifeline() -> dict[str, Any]:
    """Read the options from standard input, then end this process when that pipe closes."""
    options: dict[str, Any] = json.loads(sys.stdin.readline())

    def wait_for_parent() -> None:
        sys.stdin.read()
        if os.getpgrp() == os.getpid():  # started by run_child: end the engine's own processes as well
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(130)

    threading.Thread(target=wait_for_parent, daemon=True).start()
    return options
