"""An engine process, from inside: it does the jobs that come in one after the other, and ends with the first to fail.

Started by :mod:`.launch`. Jobs come as JSON lines over standard input, which is its lifeline too: when the parent goes,
however it goes, this process ends at once, with the processes it started. Shards are atomic, so that is always safe.
Progress and errors go back as JSON lines over a pipe.

Invariant: a shard is captured only under its claim and only while it is not committed, so that workers who know nothing
of each other never capture one twice.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moediag.errors import DiskFullError, EngineError, MoediagError
from moediag.run.capture import Shard, Slice
from moediag.run.files import write_error
from moediag.run.reader import open_run
from moediag.run.writer import RunWriter

CHANNEL = "MOEDIAG_CHANNEL_FD"
"""Environment variable with the file descriptor of the pipe to the parent."""


class Reporter:
    """The end of the pipe to the parent."""

    def __init__(self) -> None:
        self._out = os.fdopen(int(os.environ.pop(CHANNEL)), "w", buffering=1)
        self._last = 0.0

    def progress(self, done: float, total: int, unit: str) -> None:
        """Report how far the work is; more often than five times a second is not worth a write."""
        now = time.monotonic()
        if done >= total or now - self._last > 0.2:
            self._last = now
            self._send({"done": done, "total": total, "unit": unit})

    def stage(self, text: str) -> None:
        """Report what is going on while nothing can be counted."""
        self._send({"stage": text})

    def note(self, text: str) -> None:
        """Report a fact that stays on the user's screen."""
        self._send({"note": text})

    def error(self, error: MoediagError) -> None:
        """Report what ended the work."""
        self._send({"error": type(error).__name__, "message": str(error)})

    def end(self, seconds: dict[str, float]) -> None:
        """Report that the job is done, and what it took, by stage [s]."""
        self._send({"end": True, "seconds": seconds})

    def _send(self, event: dict[str, Any]) -> None:
        self._out.write(json.dumps(event) + "\n")


OnDone = Callable[[float], None]
"""Receives how many of the shard's sequences are done; fractions while one is being sampled."""


class Held:
    """At most one model at a time: an accelerator has no room for two."""

    def __init__(self) -> None:
        self._key: Any = None
        self._model: Any = None
        self._let_go: Callable[[Any], None] | None = None
        self.seconds = 0.0
        """What loading took until now."""

    def get(self, key: Any, load: Callable[[], Any], let_go: Callable[[Any], None]) -> Any:
        """The requested model; loaded, after the one that is held was let go, unless that is it.

        Args:
            key: all that makes two loads the same.
            let_go: ends what the model holds beside memory.
        """
        if self._let_go is not None and key == self._key:
            return self._model
        started = time.monotonic()
        self._release()
        self._model = load()
        self._key, self._let_go = key, let_go
        self.seconds += time.monotonic() - started
        return self._model

    def _release(self) -> None:
        import torch

        if self._let_go is not None:
            self._let_go(self._model)
        self._model = self._let_go = None
        gc.collect()  # models are full of cycles
        torch.cuda.empty_cache()  # vLLM takes its share of what the device says is free


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """An engine is imported without looking for garbage, of which there is none: that takes a quarter of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def seed_of(name: str) -> int:
    """A seed from a name, the same everywhere: what is drawn does not depend on what was drawn before."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def fill_missing_shards(
    writer: RunWriter, arm: str, reporter: Reporter, capture_shard: Callable[[Shard, OnDone], None]
) -> None:
    """Call ``capture_shard`` for every shard of the worker's slice that is neither committed nor held by another.

    Passes are repeated until one finds nothing to do: what a worker that was killed meanwhile had held is free
    again. Shards that living workers still hold are left to them.
    """
    n_filled = 1
    while n_filled:
        n_filled = 0
        for shard in writer.own_missing_shards(arm):
            n_filled += _fill_shard(writer, arm, shard, reporter, capture_shard)
    writer.remove_dead_claims(arm)
    reporter.progress(_n_done(writer, arm), _n_all(writer, arm), "sequences")


def _fill_shard(
    writer: RunWriter, arm: str, shard: Shard, reporter: Reporter, capture_shard: Callable[[Shard, OnDone], None]
) -> bool:
    """Capture one shard; False when another worker holds it or has committed it meanwhile."""
    with writer.claim(arm, shard) as is_mine:
        if not is_mine or writer.run.has_capture(arm, shard):
            return False
        n_done, n_all = _n_done(writer, arm), _n_all(writer, arm)
        reporter.progress(n_done, n_all, "sequences")
        started, writing = time.monotonic(), writer.seconds["writing"]
        capture_shard(shard, lambda n_in_shard: reporter.progress(n_done + n_in_shard, n_all, "sequences"))
        writer.seconds["computing"] += time.monotonic() - started - (writer.seconds["writing"] - writing)
    return True


def _n_done(writer: RunWriter, arm: str) -> int:
    """Sequences of this worker's slice that are committed, whoever captured them."""
    return _n_all(writer, arm) - sum(shard.n_sequences for shard in writer.own_missing_shards(arm))


def _n_all(writer: RunWriter, arm: str) -> int:
    return sum(shard.n_sequences for shard in writer.run.shards_of(arm) if writer.worker.has(shard))


Task = Callable[[RunWriter, dict[str, Any], Reporter, Held], None]
"""What a job names as ``module:function``: imported in its process only, it may lie in a room above the engines."""


def main() -> None:
    """Be an engine process: what the interpreter that a parent starts calls."""
    status = _do_all()
    _flush()
    # Engines leave threads and atexit handlers behind that can hang for minutes; everything is on disk.
    os._exit(status)


def _do_all() -> int:
    """Do every job that comes; a failure reaches the parent as one line."""
    reporter, held = Reporter(), Held()
    for job in _coming_jobs():
        run_path = Path(job["run"])
        try:
            _write_output_to(Path(job["log"]))
            seconds = _do(job, reporter, held)
        except MoediagError as error:
            _fail(reporter, error)
            return 1
        except Exception as error:  # engines raise anything: the traceback is in the log, the parent gets one line
            _fail(reporter, _one_line(error, job["engine"], run_path))
            return 1
        _flush()
        reporter.end(seconds)
    return 0


def _do(job: dict[str, Any], reporter: Reporter, held: Held) -> dict[str, float]:
    """Do a job; what it took, by stage [s]: what is neither loading nor a shard's is showing the routers' rules."""
    module, _, function = job["task"].partition(":")
    writer = RunWriter(open_run(job["run"]), Slice(**job["worker"]))
    with writer.in_use():
        with importing():
            task: Task = getattr(importlib.import_module(module), function)
        started, loading = time.monotonic(), held.seconds
        task(writer, job["options"], reporter, held)
    seconds = {"loading": held.seconds - loading, **writer.seconds}
    return {**seconds, "proving": time.monotonic() - started - sum(seconds.values())}


def _fail(reporter: Reporter, error: MoediagError) -> None:
    """First to the log: once the parent knows, it ends this process."""
    traceback.print_exc()
    _flush()
    reporter.error(error)


def _one_line(error: Exception, engine: str, run_path: Path) -> MoediagError:
    """A full disk is reported as such, everything else an engine raises with where its output is."""
    if isinstance(error, OSError):
        failure = write_error(error, Path(error.filename or run_path))
        if isinstance(failure, DiskFullError):
            return failure
    reason = str(error).strip().splitlines()
    summary = f"{type(error).__name__}: {reason[0] if reason else ''}"
    return EngineError(f"the {engine} engine failed: {summary}; see {run_path / 'logs'}")


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _coming_jobs() -> Iterator[dict[str, Any]]:
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


def _write_output_to(log: Path) -> None:
    """Send what this process and those it starts print from now on to the log."""
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
