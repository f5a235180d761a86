"""Entry of an engine process: ``python -m moediag.engines.child TASK`` (started by :mod:`.channel`)."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Final

from moediag.engines.channel import Reporter, hold_lifeline
from moediag.errors import DiskFullError, EngineError, MoediagError
from moediag.run.files import write_error
from moediag.run.reader import Run, open_run
from moediag.run.shards import Slice

_TASKS: Final = {
    "infer": ("moediag.engines.vllm_engine", "capture_infer"),
    "train": ("moediag.engines.hf_engine", "capture_train"),
    "gradients": ("moediag.audit.gradients", "audit"),
}
"""Where a task lives: each is imported in its own process only, and one may lie in a room above the engines."""


def _run_task(name: str, run: Run, options: dict[str, Any], reporter: Reporter) -> None:
    module, function = _TASKS[name]
    getattr(importlib.import_module(module), function)(run, options, reporter)


def main() -> int:
    """Run the task named on the command line; every failure reaches the parent as one line."""
    reporter = Reporter()
    options = hold_lifeline()
    run_path = Path(options.pop("run"))
    try:
        run = open_run(run_path, Slice(**options.pop("worker", {})))
        with run.in_use():
            _run_task(sys.argv[1], run, options, reporter)
    except MoediagError as error:
        traceback.print_exc()
        reporter.error(error)
        return 1
    except Exception as error:  # engines raise anything: the traceback is in the log, the parent gets one line
        traceback.print_exc()
        reporter.error(_one_line(error, sys.argv[1], run_path))
        return 1
    return 0


def _one_line(error: Exception, task: str, run_path: Path) -> MoediagError:
    """A full disk is told as such; everything else an engine raises is told with where its output is."""
    if isinstance(error, OSError):
        failure = write_error(error, Path(error.filename or run_path))
        if isinstance(failure, DiskFullError):
            return failure
    reason = str(error).strip().splitlines()
    summary = f"{type(error).__name__}: {reason[0] if reason else ''}"
    return EngineError(f"the {task} engine failed: {summary}; see {run_path / 'logs'}")


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Engines leave threads and atexit handlers behind that can hang for minutes; everything is on disk.
    os._exit(status)
