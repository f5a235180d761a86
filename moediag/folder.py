"""The one kind of result folder: analysis, report, comparison, simulation, trend and gradient audit appear whole.

    FOLDER/summary.json               sealed: kind, the request that it answers, sha256 of every frame
    FOLDER/<frame>.parquet
    FOLDER/figures/*, report.md, .html    not sealed: drawn again from the frames at any time

    ROOT/.NAME.<process>.new          being made by that process; .old: being removed by it
    ROOT/.NAME.ready                  whole; what it holds takes the place of what has the same names in ROOT

Invariants:
    - killed before the rename to ``.ready``, everything is as it was; after it, :func:`settle` completes the new state:
      the next command that makes or reads the same results calls it, and may be killed as well;
    - what a killed process left of its own is removed by the next that makes the same, a living one's never;
    - a folder of anything else is never replaced, an earlier result of another request only with ``force``.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from moediag.errors import CorruptRunError, DiskFullError, IncompleteRunError, MoediagError, RunError
from moediag.frames import declared_frames
from moediag.run.files import (
    atomic,
    host_tag,
    make_folder,
    process_tag,
    read_checked,
    sha256_file,
    write_error,
)

SUMMARY: Final = "summary.json"
PAGES: Final = ("report.md", "report.html")
_OURS: Final = re.compile(r"summary\.json|report\.(md|html)|[^/]+\.parquet|figures/[^/]+\.(png|svg|pdf)")
"""Files of a result folder; hidden ones beside them are the file system's or a notebook's."""


@contextmanager
def result_folder(path: Path, kind: str, request: Mapping[str, Any], force: bool = False) -> Iterator[Path]:
    """Give a folder to fill, which takes the place of ``path`` when the body ends; if it raises, ``path`` stays.

    Args:
        kind, request, force: as for :func:`refuse_other`.

    Raises:
        RunError: as :func:`refuse_other`, or ``path`` cannot be written.
    """
    refuse_other(path, kind, request, force)
    with made_whole(path) as made:
        yield made


def refuse_other(path: Path, kind: str, request: Mapping[str, Any], force: bool = False) -> None:
    """Refuse a folder that holds anything but an earlier result of the same kind and request.

    Args:
        kind: entry ``kind`` of its summary.json, e.g. ``moediag trend``.
        request: entry ``request``, in plain types: what makes two results the same; entry ``of`` names it in messages.
        force: replace the result of another request, too.

    Raises:
        RunError: names what is there and what to do.
    """
    refuse_current_folder(path)
    near = next(parent for parent in path.resolve().parents if parent.exists())
    if near.is_dir() and not os.access(near, os.W_OK | os.X_OK):  # known now, not after everything is computed
        raise RunError(f"cannot write {path}: {near} is not writable; give -o a folder elsewhere")
    try:
        settle(path.resolve().parent, path.resolve().name)
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        there = _summary_in(path)
        strange = _strange(path, kind, there)
    except OSError as error:
        raise _as_error(error, path) from error
    if strange:
        raise RunError(f"{path}: expected a new folder or a {kind}, found {strange}; give -o another folder")
    if not force and there.get("request") != request:
        found = (there.get("request") or {}).get("of", "which cannot be read")
        raise RunError(
            f"{path} holds a {kind} of another request ({found}); give -o another folder, or --force to replace it"
        )


def refuse_read_only(run: Path) -> None:
    """Refuse a run that results cannot be written into: now, and not after everything is computed.

    Raises:
        RunError: names what works instead.
    """
    if not os.access(run, os.W_OK | os.X_OK):
        words = f"cp -r --no-preserve=mode {run} COPY"
        raise RunError(
            f"{run} is read-only and analyze, report and diagnose write into the run: make a copy of it ({words}) and "
            "give that; simulate, compare, trend and export read it as it is and write where -o says"
        )


def refuse_current_folder(path: Path) -> Path:
    """The path, unless it is the folder that the process is in, which cannot be replaced under it.

    Raises:
        RunError: it is.
    """
    if path.exists() and path.samefile(Path.cwd()):
        raise RunError(f"{path} is the current folder; give -o a folder of its own, e.g. -o run")
    return path


@contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes the place of whatever is at ``path`` when the body ends.

    Raises:
        RunError: it cannot be written.
    """
    path = path.resolve()
    with made_together(path.parent, path.name) as made:
        make_folder(made / path.name)
        yield made / path.name


@contextmanager
def made_together(root: Path, name: str) -> Iterator[Path]:
    """Give a folder to fill; all that it holds takes the place of what has the same names in ``root``, or nothing does.

    Args:
        name: of the folder among what is made; nothing else in ``root`` may be made under it.

    Raises:
        RunError: it cannot be written.
    """
    made = being_made(root / name)
    try:
        if (root / name).exists() and not (root / name).is_dir():
            raise RunError(f"cannot write {root / name}: expected a folder, found a file; move it elsewhere")
        made.mkdir(parents=True, exist_ok=True)
        yield made
        settle(root, name)  # what another process made meanwhile
        made.rename(_ready(root, name))
        settle(root, name)
    except OSError as error:
        raise _as_error(error, root / name) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def settle(root: Path, name: str) -> None:
    """Move what is ready into its place, which a killed process may have left to do.

    Raises:
        OSError: it cannot be moved.
    """
    ready = _ready(root, name)
    try:
        folder = os.open(ready, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        with contextlib.suppress(OSError):  # without locks two processes at the same instant are not kept apart
            fcntl.flock(folder, fcntl.LOCK_EX)
        if not os.path.samestat(os.fstat(folder), ready.stat()):
            return  # finished by another process, and of the next one already
        for path in sorted(ready.iterdir()):
            target = root / path.name
            dying = being_removed(target)
            if target.is_dir():
                shutil.rmtree(dying, ignore_errors=True)
                target.rename(dying)
            path.replace(target)
            shutil.rmtree(dying, ignore_errors=True)
        ready.rmdir()
    except FileNotFoundError:
        if ready.exists():
            raise
    finally:
        os.close(folder)


def being_made(path: Path) -> Path:
    """Where this process makes what will be ``path``; what dead processes left there is removed."""
    attempt = re.compile(rf"\.{re.escape(path.name)}\.{host_tag()}-(\d+)\.(new|old)")
    for folder in path.parent.iterdir() if path.parent.is_dir() else ():
        match = attempt.fullmatch(folder.name)
        if match and folder.is_dir() and not _is_alive(int(match.group(1))):
            shutil.rmtree(folder, ignore_errors=True)
    return path.with_name(f".{path.name}.{process_tag()}.new")


def being_removed(path: Path) -> Path:
    """Where this process renames a folder to before it removes it: half a folder is never seen in its place."""
    return path.with_name(f".{path.name}.{process_tag()}.old")


def write_frames(folder: Path, frames: Mapping[str, pd.DataFrame | Iterable[pd.DataFrame]]) -> dict[str, str]:
    """Write every frame as it is declared, ``<name>.parquet``; returns name -> sha256 of the file.

    Args:
        frames: by declared name; a large one as rows that follow each other.

    Raises:
        FrameError: a frame does not match its declaration.
        RunError: it cannot be written.
    """
    specs = {spec.name: spec for spec in declared_frames()}
    digests = {}
    for name, frame in frames.items():
        path, writer = folder / f"{name}.parquet", None
        make_folder(folder)
        with atomic(path) as file:
            for rows in [frame] if isinstance(frame, pd.DataFrame) else frame:
                table = pa.Table.from_pandas(specs[name].validate(rows), preserve_index=False)
                writer = writer or pq.ParquetWriter(file, table.schema)
                writer.write_table(table)
            assert writer is not None, name
            writer.close()
        digests[name] = sha256_file(path)
    return digests


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as strict JSON takes them: what is not known is null, infinity the word.

    Example:
        >>> records(pd.DataFrame({"k3": [0.5, float("nan"), float("inf")]}))
        [{'k3': 0.5}, {'k3': None}, {'k3': 'inf'}]
    """
    known = frame.astype(object).where(frame.notna(), None).replace({math.inf: "inf", -math.inf: "-inf"})
    return [{str(name): value for name, value in row.items()} for row in known.to_dict("records")]


def read_frames(folder: Path, digests: Mapping[str, str], again: str) -> dict[str, pd.DataFrame]:
    """The frames that a summary names, checked against digest and declaration.

    Args:
        digests: what :func:`write_frames` returned.
        again: the command that makes them again, as messages name it.

    Raises:
        IncompleteRunError: a frame is missing.
        CorruptRunError: a frame is not the one that was written.
    """
    specs = {spec.name: spec for spec in declared_frames()}
    frames = {}
    for name, digest in digests.items():
        path = folder / f"{name}.parquet"
        if not path.exists():
            raise IncompleteRunError(f"{path} is missing; {again}")
        try:
            frames[name] = specs[name].validate(pd.read_parquet(io.BytesIO(read_checked(path, digest))))
        except (KeyError, OSError, ValueError):
            raise CorruptRunError(
                f"{path} is not the frame that was written (damaged, edited, or of another version); {again}"
            ) from None
    return frames


def _ready(root: Path, name: str) -> Path:
    return root / f".{name}.ready"


def _summary_in(path: Path) -> dict[str, Any]:
    """Content of an earlier result's summary.json, sealed or not; empty = none."""
    try:
        content = json.loads((path / SUMMARY).read_text())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _strange(path: Path, kind: str, summary: Mapping[str, Any]) -> str:
    """What at the path belongs to no such result, for a message; empty = nothing."""
    if not path.is_dir():
        return "a file"
    if summary.get("kind") != kind:
        other = "moediag run" if (path / "run.json").exists() else summary.get("kind")
        return f"a {other}" if other else min(entry.name for entry in path.iterdir())
    files = (file.relative_to(path) for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    visible = (file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts))
    return min((name for name in visible if not _OURS.fullmatch(name)), default="")


def _as_error(error: OSError, path: Path) -> MoediagError:
    if isinstance(error, DiskFullError):  # of a file in the folder being made, whose name no user knows
        return DiskFullError(
            f"no space to write {path}; what was there is unchanged: free some space and run the same command again"
        )
    return error if isinstance(error, MoediagError) else write_error(error, path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
