"""Entry of an engine process: ``python -m moediag.engines.child`` (started by :mod:`.channel`).

It does the jobs that come in on its standard input, one after the other, and ends with the first that fails.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moediag.engines.channel import Reporter, coming_jobs, write_output_to
from moediag.engines.fill import Held
from moediag.errors import DiskFullError, EngineError, MoediagError
from moediag.run.capture import Slice
from moediag.run.files import write_error
from moediag.run.reader import open_run
from moediag.run.writer import RunWriter

Task = Callable[[RunWriter, dict[str, Any], Reporter, Held], None]
"""What a job names as ``module:function``: imported in its process only, it may lie in a room above the engines."""


def main() -> int:
    """Do every job that comes; a failure reaches the parent as one line."""
    reporter, held = Reporter(), Held()
    for job in coming_jobs():
        run_path = Path(job["run"])
        try:
            write_output_to(Path(job["log"]))
            _do(job, reporter, held)
        except MoediagError as error:
            _tell(reporter, error)
            return 1
        except Exception as error:  # engines raise anything: the traceback is in the log, the parent gets one line
            _tell(reporter, _one_line(error, job["engine"], run_path))
            return 1
        _flush()
        reporter.end()
    return 0


def _do(job: dict[str, Any], reporter: Reporter, held: Held) -> None:
    module, _, function = job["task"].partition(":")
    writer = RunWriter(open_run(job["run"]), Slice(**job["worker"]))
    with writer.in_use():
        task: Task = getattr(importlib.import_module(module), function)
        task(writer, job["options"], reporter, held)


def _tell(reporter: Reporter, error: MoediagError) -> None:
    """First to the log: once the parent is told, it ends this process."""
    traceback.print_exc()
    _flush()
    reporter.error(error)


def _one_line(error: Exception, engine: str, run_path: Path) -> MoediagError:
    """A full disk is told as such; everything else an engine raises is told with where its output is."""
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


if __name__ == "__main__":
    status = main()
    _flush()
    # Engines leave threads and atexit handlers behind that can hang for minutes; everything is on disk.
    os._exit(status)
