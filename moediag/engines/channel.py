"""An engine process: how the parent starts it, gives it jobs, follows it and hears its errors.

Invariants:
    - the engine's own chatter goes to the log of the job; progress and errors come as JSON lines over a pipe;
    - jobs come as JSON lines over the child's standard input, which is its lifeline too: when the parent goes, however
      it goes, the child ends at once, with the processes it started. Shards are atomic, so that is always safe.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from moediag import errors
from moediag.errors import EngineError, MoediagError
from moediag.run.files import make_folder, write_error

_CHANNEL = "MOEDIAG_CHANNEL_FD"
OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """One thing for an engine process to do, JSON-ready.

    Args:
        engine: what messages call the engine.
        task: ``module:function`` to call, see :data:`moediag.engines.child.Task`.
        run: folder of the run, ``worker`` the slice of its shards.
        options: arguments of the task.
        log: file that receives the engine's output.
    """

    engine: str
    task: str
    run: str
    worker: dict[str, int]
    options: dict[str, Any]
    log: str


class Child:
    """An engine process that does one job after the other.

    Args:
        environment: all of its environment variables.
        output: receives what it says before its first job.
    """

    def __init__(self, environment: dict[str, str], output: IO[bytes]) -> None:
        read_fd, write_fd = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moediag.engines.child"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[write_fd],
            env={**environment, _CHANNEL: str(write_fd)},
            start_new_session=True,  # Ctrl-C reaches the parent only, which then cuts the lifeline
        )
        os.close(write_fd)
        self._events = os.fdopen(read_fd)

    def do(self, job: Job, on_event: OnEvent) -> None:
        """Give the process a job and wait for it; after an error the process is of no more use.

        Raises:
            MoediagError: what the child raised, by its own type.
            EngineError: the child died without a word.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # an early death, seen as the end of its events
            self._process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            self._process.stdin.flush()
        for line in self._events:
            event = json.loads(line)
            if "error" in event:
                raise getattr(errors, event["error"], EngineError)(event["message"])
            if "end" in event:
                return
            on_event(event)
        status = self._process.wait()
        raise EngineError(
            f"the {job.engine} engine died (exit status {status}) without a word; its output is in {job.log}"
        )

    def close(self) -> None:
        """End the engine and the processes it started, vLLM's workers too: the child leads a group of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._events.close()
        with contextlib.suppress(OSError):  # a child that died early leaves nobody to flush to
            if self._process.stdin:
                self._process.stdin.close()


class Engines:
    """The engine process of a command: at most one at a time, kept for the jobs whose environment it has."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._environment: dict[str, str] = {}

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def do(self, job: Job, env: dict[str, str], on_event: OnEvent) -> None:
        """Have a job done, by the process that is there or by a new one.

        Args:
            env: environment variables set for the process only, where the user has not set them.
            on_event: called with every progress event, ``{"done": n, "total": n, "unit": ...}`` or ``{"stage": ...}``.

        Raises:
            MoediagError: what the job raised, by its own type.
            EngineError: the process died without a word.
        """
        environment = {**env, **os.environ}
        if environment != self._environment:
            self.close()
        with _appended(Path(job.log)) as log:
            if self._child is None:
                self._child, self._environment = Child(environment, log), environment
            try:
                self._child.do(job, on_event)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the process, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.close()


def _appended(log: Path) -> IO[bytes]:
    """A log opened for appending: workers and repeated runs of one command do not destroy each other's.

    Raises:
        RunError: it cannot be written.
    """
    make_folder(log.parent)
    try:
        return log.open("ab")
    except OSError as error:
        raise write_error(error, log) from error


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

    def end(self) -> None:
        """Tell that the job is done."""
        self._send({"end": True})

    def _send(self, event: dict[str, Any]) -> None:
        self._out.write(json.dumps(event) + "\n")


def coming_jobs() -> Iterator[dict[str, Any]]:
    """Jobs from standard input as they come; this process ends when that pipe closes, whatever it is doing."""
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def listen_to_parent() -> None:
        for line in sys.stdin:
            jobs.put(json.loads(line))
        if os.getpgrp() == os.getpid():  # started as a Child: end the engine's own processes as well
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(130)

    threading.Thread(target=listen_to_parent, daemon=True).start()
    while True:
        yield jobs.get()


def write_output_to(log: Path) -> None:
    """Send what this process and those it starts say from now on to the log."""
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
