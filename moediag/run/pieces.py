"""Work on a run in pieces: groups of whole shards, each read by any process, then joined in order; and other steps that
processes of this machine or of a cluster do (:class:`Pool`).

Invariants:
    - where a group ends is decided by the run alone, never by the number of processes: what is summed is summed in the
      same order, and has the same bits, whoever does it;
    - a shard is decoded once for all works that are read together, and held while they read it, not longer;
    - a piece goes to a file, not through the process that hands out the work, and whoever joins holds one at a time:
      memory does not grow with the run where a piece does not;
    - a step may be begun anew where its process was lost: every attempt has a folder of its own, and what is joined is
      removed by the process that hands out the work.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import pickle
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from moediag.errors import MoediagError, RunError
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
        read: of the run, a group of shards and an empty folder that stays until the work is joined: yields after each
            shard, and returns what the others need of them, picklable; None = nothing is read by groups.
        join: of the run, all pieces in the order of the shards, each loaded when it is asked for, and what every
            section made: the result.
        sections: each makes something of the run and all pieces, picklable, beside the others.
        arms: whose captures are read.
    """

    read: Callable[[Run, tuple[Shard, ...], Path], Generator[None, None, Any]] | None
    join: Callable[..., Any]
    sections: tuple[Callable[[Run, Iterator[Any]], Any], ...] = ()
    arms: tuple[str, ...] = ()


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
        """Have a step done; its error is raised by the future, or at once where it is done at once."""

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
        self.n_workers = n_workers
        self._pool = ProcessPoolExecutor(n_workers, mp_context=context, initializer=_use_memory_again)

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Have one of them do it."""
        return self._pool.submit(function, *arguments)

    def stop(self) -> None:
        """End them, after what they are doing."""
        self._pool.shutdown(cancel_futures=True)


def _use_memory_again() -> None:
    """Have glibc keep the memory of large arrays for the next ones: otherwise it goes back to the system, which clears
    every page before it gives it out again, a tenth of the time of an analysis."""
    with suppress(OSError, AttributeError):  # another C library
        c = ctypes.CDLL(None)
        c.mallopt(_M_MMAP_MAX, 0)
        c.mallopt(_M_TRIM_THRESHOLD, 1 << 28)


_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_MAX: Final = -4

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
    groups, together = groups_of(run), _together(works)
    n_done, total = 0, len(groups) * len(together) + sum(len(work.sections) + 1 for work in works)
    pool = workers if isinstance(workers, Pool) else _pool(min(workers, total), works)
    on_done(n_done, total)
    with tempfile.TemporaryDirectory(dir=folder or pool.folder, ignore_cleanup_errors=True) as name:
        makings = [_Making(run.path, work, len(groups), Path(name)) for work in works]
        steps: deque[_Step] = deque()
        for at, making in enumerate(makings):
            some = together.get(at, [])  # of works that are read together the first begins
            of, reads = [makings[one] for one in some], [works[one].read for one in some]
            for nth, group in enumerate(groups if some else ()):
                steps.append((partial(_share, of, nth), partial(_read, run.path, reads, group, Path(name))))
            steps += making.go_on() if making.work.read is None else []
        left = dict(enumerate(makings))
        with closing(finished(pool, steps)) as results:
            for then, result in results:
                n_done += 1
                on_done(n_done, total)
                steps.extendleft(reversed(then(result)))
                for at, making in list(left.items()):
                    if making.is_done:
                        del left[at]
                        yield at, making.result
                    elif making.error is not None and at == min(left):  # what earlier work says of it comes first
                        raise making.error


_Step = tuple[Callable[[Any], list[Any]], Callable[[], Any]]
"""What to do with a result, which gives the steps that follow it, and what makes the result."""


def _together(works: Sequence[Work]) -> dict[int, list[int]]:
    """Works that are read together, by the first of them.

    Arms are numbered as the works name them; works whose highest arm is the same are read together.

    Example:
        >>> join = print
        >>> some = [("a", "b"), ("a", "c"), ("a", "b"), ("b", "c")]
        >>> _together([Work(lambda *of: iter(()), join, (), arms) for arms in some])
        {0: [0, 2], 1: [1, 3]}
    """
    nth = {arm: at for at, arm in enumerate(dict.fromkeys(arm for work in works for arm in work.arms))}
    found: dict[int, list[int]] = {}
    for at, work in enumerate(works):
        if work.read is not None:
            found.setdefault(max((nth[arm] for arm in work.arms), default=-1), []).append(at)
    return {some[0]: some for some in found.values()}


class _Making:
    """A work on its way: its pieces, its sections, its result."""

    def __init__(self, run: Path, work: Work, n_groups: int, scratch: Path) -> None:
        self.run, self.work, self.scratch = run, work, scratch
        self.pieces: list[Path | None] = [None] * (n_groups if work.read is not None else 0)
        self.made: list[Path | None] = [None] * len(work.sections)
        self.result: Any = None
        self.is_done = False
        self.error: MoediagError | None = None

    def go_on(self) -> list[_Step]:
        """What may be done once everything that goes before it is there."""
        if None in self.pieces:
            return []
        if None not in self.made:
            return [(self._join, partial(_tried, _join, self.run, self.work, self.pieces, self.made))]
        if any(self.made):  # the other sections are being made
            return []
        of = self.run, self.work, self.pieces, self.scratch
        return [(partial(self._section, nth), partial(_tried, _section, *of, nth)) for nth in range(len(self.made))]

    def _section(self, nth: int, result: Path | MoediagError) -> list[_Step]:
        if isinstance(result, MoediagError):
            self.error = result
            return []
        self.made[nth] = result
        return self.go_on()

    def _join(self, result: Any) -> list[_Step]:
        if isinstance(result, MoediagError):
            self.error = result
            return []
        self.result, self.is_done = result, True
        for folder in filter(None, (*self.pieces, *self.made)):
            shutil.rmtree(folder, ignore_errors=True)  # a network file system may keep it until a mapped file is closed
        return []


def _share(of: Sequence[_Making], nth: int, folders: Sequence[Path]) -> list[_Step]:
    for making, folder in zip(of, folders, strict=True):
        making.pieces[nth] = folder
    return [step for making in of for step in making.go_on()]


def _read(path: Path, reads: Sequence[Any], shards: tuple[Shard, ...], scratch: Path) -> list[Path]:
    """Read a group for several works, shard by shard, each shard once."""
    run, folders = open_run(path), [Path(tempfile.mkdtemp(dir=scratch)) for _ in reads]
    reading = {at: read(run, shards, folders[at]) for at, read in enumerate(reads)}
    while reading:
        with run.holding():
            for at, steps in list(reading.items()):
                try:
                    next(steps)
                    continue
                except StopIteration as end:
                    piece = end.value
                except MoediagError as error:  # raised where the piece is asked for
                    piece = error
                del reading[at]
                _dump(piece, folders[at])
    return folders


def _section(path: Path, work: Work, pieces: Sequence[Path], scratch: Path, nth: int) -> Path:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    _dump(work.sections[nth](open_run(path), map(_load, pieces)), folder)
    return folder


def _join(path: Path, work: Work, pieces: Sequence[Path], made: Sequence[Path]) -> Any:
    return work.join(open_run(path), map(_load, pieces), *map(_load, made))


def _tried(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, or the error of this program that it raises."""
    try:
        return function(*arguments)
    except MoediagError as error:
        return error


def _dump(piece: Any, folder: Path) -> None:
    with (folder / _PIECE).open("wb") as file:
        pickle.dump(piece, file, pickle.HIGHEST_PROTOCOL)


def _load(folder: Path) -> Any:
    with (folder / _PIECE).open("rb") as file:
        piece = pickle.load(file)  # written by this program a moment ago
    if isinstance(piece, MoediagError):
        raise piece
    return piece


def _pool(workers: int, works: Sequence[Work]) -> Pool:
    return Processes(workers, (_module_of(work.join) for work in works)) if workers > 1 else Here()


def _module_of(function: Callable[..., Any]) -> str:
    return _module_of(function.func) if isinstance(function, partial) else function.__module__
