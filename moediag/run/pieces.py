"""Work on a run in pieces: groups of whole shards, each read by any process, then joined in order; and other steps that
processes of this machine or of a cluster do (:class:`Pool`).

Invariants:
    - where a group ends is decided by the run alone, never by the number of processes: what is summed is summed in the
      same order, and has the same bits, whoever does it;
    - a piece goes to a file, not through the process that hands out the work, and whoever joins holds one at a time:
      memory does not grow with the run where a piece does not;
    - a step may be begun anew where its process was lost: every attempt has a folder of its own, and what is joined is
      removed by the process that hands out the work.
"""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

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


class Pool(ABC):
    """Processes that do steps: functions of modules, with arguments and results that can be pickled."""

    @property
    def folder(self) -> Path | None:
        """Where what passes between the processes lies, seen by all of them; None = among temporary files."""
        return None

    @property
    @abstractmethod
    def n_workers(self) -> int:
        """Steps at a time."""

    @abstractmethod
    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Have a step done; its error is raised from the future."""

    @abstractmethod
    def stop(self) -> None:
        """End what is still being done: what it uses goes."""


class Here(Pool):
    """This process, at once."""

    n_workers = 1

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Do it."""
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future

    def stop(self) -> None:
        """Nothing is being done."""


class Processes(Pool):
    """Processes of this machine, for one lot of steps.

    Args:
        n_workers: how many.
        modules: imported once, for all.
    """

    n_workers = 0

    def __init__(self, n_workers: int, modules: Iterable[str] = ()) -> None:
        context = multiprocessing.get_context("forkserver")  # a fork of a process with threads may hang
        context.set_forkserver_preload(sorted(set(modules)))
        self.n_workers, self._pool = n_workers, ProcessPoolExecutor(n_workers, mp_context=context)

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Have one of them do it."""
        return self._pool.submit(function, *arguments)

    def stop(self) -> None:
        """End them, after what they are doing."""
        self._pool.shutdown(cancel_futures=True)


Key = TypeVar("Key")
Result = TypeVar("Result")
Case = TypeVar("Case")


def finished(pool: Pool, steps: deque[tuple[Key, Callable[[], Result]]]) -> Generator[tuple[Key, Result]]:
    """Do steps, the first first; close what is returned and the rest is not done.

    Args:
        steps: (what names it, what does it); steps may be added while others are being done.

    Yields:
        (what names it, its result), in the order in which they are done.

    Raises:
        RunError: a process of this machine was killed.
    """
    running: dict[Future[Result], Key] = {}
    try:
        while steps or running:
            while steps and len(running) < pool.n_workers:
                key, step = steps.popleft()
                running[pool.submit(step)] = key
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise RunError("a process was killed, most often for want of memory; run it again with --workers 1") from None
    finally:
        pool.stop()


def each(
    cases: Iterable[Case],
    do: Callable[[Case], Result],
    pool: Pool,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> Generator[tuple[Case, Result]]:
    """Do the same to every case, each a step: for jobs whose cases lie in folders of their own.

    Args:
        do: a module's function, or a partial of one.
        on_done: is called with how many cases of how many are done.

    Yields:
        (case, what came of it), in the order in which they are done.

    Raises:
        RunError: a process of this machine was killed.
    """
    steps: deque[tuple[Case, Callable[[], Result]]] = deque((case, partial(do, case)) for case in cases)
    n_done, total = 0, len(steps)
    on_done(n_done, total)
    with closing(finished(pool, steps)) as results:
        for case, result in results:
            n_done += 1
            on_done(n_done, total)
            yield case, result


def in_pieces(
    run: Run,
    works: Sequence[Work],
    workers: int | Pool,
    folder: Path | None = None,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> Generator[tuple[int, Any]]:
    """Do some work, earlier work first; close what is returned and the rest is not done.

    Args:
        workers: processes of this machine, 1 = this one alone; or other ones.
        folder: where a folder for pieces is made, and removed again; None = the pool's.
        on_done: is called with how many steps of how many are done.

    Yields:
        (index of the work, its result), in the order in which they are done.

    Raises:
        RunError: a process was killed.
    """
    groups = groups_of(run)
    left = [len(groups) if work.read is not None else 0 for work in works]
    n_done, total = 0, sum(n + 1 for n in left)
    pool = workers if isinstance(workers, Pool) else _pool(min(workers, total), works)
    on_done(n_done, total)
    with tempfile.TemporaryDirectory(dir=folder or pool.folder) as scratch:
        pieces = [[Path()] * n for n in left]
        steps: deque[tuple[tuple[int, int | None], Callable[[], Any]]] = deque()

        def join(at: int) -> tuple[tuple[int, None], Callable[[], Any]]:
            return (at, None), partial(_join, run.path, works[at], pieces[at])

        for at, n in enumerate(left):
            steps += [((at, nth), partial(_read, run.path, works[at], groups[nth], Path(scratch))) for nth in range(n)]
            steps += [] if n else [join(at)]
        with closing(finished(pool, steps)) as results:
            for (at, group), result in results:
                n_done += 1
                on_done(n_done, total)
                if group is None:
                    for piece in pieces[at]:
                        shutil.rmtree(piece)
                    yield at, result
                    continue
                pieces[at][group] = result
                left[at] -= 1
                if not left[at]:
                    steps.appendleft(join(at))


def _read(path: Path, work: Work, shards: tuple[Shard, ...], scratch: Path) -> Path:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    assert work.read is not None
    piece = work.read(open_run(path), shards, folder)
    with (folder / _PIECE).open("wb") as file:
        pickle.dump(piece, file, pickle.HIGHEST_PROTOCOL)
    return folder


def _join(path: Path, work: Work, pieces: Sequence[Path]) -> Any:
    return work.join(open_run(path), map(_load, pieces))


def _load(folder: Path) -> Any:
    with (folder / _PIECE).open("rb") as file:
        return pickle.load(file)  # written by this program a moment ago


def _pool(workers: int, works: Sequence[Work]) -> Pool:
    return Processes(workers, (_module_of(work.join) for work in works)) if workers > 1 else Here()


def _module_of(function: Callable[..., Any]) -> str:
    return _module_of(function.func) if isinstance(function, partial) else function.__module__
