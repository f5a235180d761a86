"""Work on a run in pieces: groups of whole shards, each read by any process, then joined in order.

Invariants:
    - where a group ends is decided by the run alone, never by the number of processes: what is summed is summed in the
      same order, and has the same bits, whoever does it;
    - a piece goes to a file, not through the process that hands out the work, and whoever joins holds one at a time:
      memory does not grow with the run where a piece does not.
"""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from moediag.errors import RunError
from moediag.run.capture import Shard
from moediag.run.reader import Run, open_run
from moediag.run.records import Sidecar, read_record

LEAST_ROWS: Final = 1 << 17
"""Rows of a group, at most or those of one shard: seconds of work, so that starting it and joining it do not count."""
MOST_GROUPS: Final = 64
"""Groups of a run, about: what is joined grows with them, and no machine that shares a run has many more cores."""

_PIECE: Final = "piece"


@dataclass(frozen=True)
class Work:
    """Something to be made of a run, by functions of a module, so that another process can call them.

    Args:
        read: of the run, a group of shards and an empty folder that stays until the work is joined: what :attr:`join`
            needs of them, picklable; None = nothing is read by groups, ``join`` does it all.
        join: of the run and all pieces, in the order of the shards, each loaded when it is asked for: the result.
    """

    read: Callable[[Run, tuple[Shard, ...], Path], Any] | None
    join: Callable[[Run, Iterator[Any]], Any]


def groups_of(run: Run) -> list[tuple[Shard, ...]]:
    """The run's shards in order, as many together as make up :data:`LEAST_ROWS` or a :data:`MOST_GROUPS` th of all."""
    rows = [_n_rows(run, shard) for shard in run.shards]
    most = max(LEAST_ROWS, -(-sum(rows) // MOST_GROUPS))
    groups: list[list[Shard]] = []
    room = 0
    for shard, n_rows in zip(run.shards, rows, strict=True):
        if not groups or n_rows > room:
            groups.append([])
            room = most
        groups[-1].append(shard)
        room -= n_rows
    return [tuple(group) for group in groups]


def _n_rows(run: Run, shard: Shard) -> int:
    try:
        return read_record(run.sidecar_path("tokens", shard), Sidecar).n_rows
    except RunError:  # missing or damaged: found by whoever reads the shard
        return 0


def in_pieces(
    run: Run,
    works: Sequence[Work],
    workers: int,
    folder: Path | None = None,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> Generator[tuple[int, Any]]:
    """Do some work, earlier work first; close what is returned and the rest is not done.

    Args:
        workers: processes; 1 = this one alone.
        folder: where a folder for pieces is made, and removed again; None = among temporary files.
        on_done: is called with how many steps of how many are done.

    Yields:
        (index of the work, its result), in the order in which they are done.

    Raises:
        RunError: a process was killed.
    """
    groups = groups_of(run)
    left = [len(groups) if work.read is not None else 0 for work in works]
    # None joins what lies there
    steps = deque((at, group) for at, n in enumerate(left) for group in (range(n) if n else (None,)))
    n_done, total = 0, sum(n + 1 for n in left)
    on_done(n_done, total)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as name, _executor(min(workers, total), works) as executor:
            folders = [[Path(name) / f"{at}-{group}" for group in range(n)] for at, n in enumerate(left)]
            running: dict[Future[Any], tuple[int, int | None]] = {}
            while steps or running:
                while steps and len(running) < workers:
                    at, group = steps.popleft()
                    if group is None:
                        job = executor.submit(_join, run.path, works[at], folders[at])
                    else:
                        job = executor.submit(_read, run.path, works[at], groups[group], folders[at][group])
                    running[job] = at, group
                for job in wait(running, return_when=FIRST_COMPLETED).done:
                    at, group = running.pop(job)
                    result, n_done = job.result(), n_done + 1
                    on_done(n_done, total)
                    if group is None:
                        yield at, result
                        continue
                    left[at] -= 1
                    if not left[at]:
                        steps.appendleft((at, None))
    except BrokenProcessPool:
        raise RunError("a process was killed, most often for want of memory; run it again with --workers 1") from None


def _read(path: Path, work: Work, shards: tuple[Shard, ...], folder: Path) -> None:
    folder.mkdir()
    assert work.read is not None
    piece = work.read(open_run(path), shards, folder)
    with (folder / _PIECE).open("wb") as file:
        pickle.dump(piece, file, pickle.HIGHEST_PROTOCOL)


def _join(path: Path, work: Work, folders: Sequence[Path]) -> Any:
    result = work.join(open_run(path), map(_load, folders))
    for folder in folders:
        shutil.rmtree(folder)
    return result


def _load(folder: Path) -> Any:
    with (folder / _PIECE).open("rb") as file:
        return pickle.load(file)  # written by this program a moment ago


class _Here(Executor):
    """This process, at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextmanager
def _executor(workers: int, works: Sequence[Work]) -> Iterator[Executor]:
    if workers <= 1:
        yield _Here()
        return
    context = multiprocessing.get_context("forkserver")  # a fork of a process with threads may hang
    context.set_forkserver_preload(sorted({_module_of(work.join) for work in works}))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _module_of(function: Callable[..., Any]) -> str:
    return _module_of(function.func) if isinstance(function, partial) else function.__module__
