"""Making a run directory: it appears whole, and never in place of anything that is not a run.

Invariants:
    - of several processes that make the same run at the same instant one does, the others find it made;
    - a run that another process is filling is never removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moediag.errors import MoediagError, RunConflictError, RunError
from moediag.notation import SCHEMA_VERSION
from moediag.run import claims
from moediag.run.directory import Run, open_run
from moediag.run.files import host_tag, make_folder, process_tag, sha256_bytes, write_atomic, write_error, write_sealed
from moediag.run.manifest import KIND, MANIFEST, PROMPTS, refuse_other_configuration
from moediag.run.shards import split_into_shards

__all__ = ["create_run", "split_into_shards"]


def create_run(path: Path, manifest: dict[str, Any], prompts: bytes, force: bool = False) -> Run:
    """Create a run directory, or open the one of the same configuration that is there.

    Args:
        manifest: ``configuration``, ``model``, ``sampling``, ``prompts``, ``shards``, ``completions``.
        prompts: content of the prompts file.
        force: start anew: remove the run that is there first.

    Raises:
        RunConflictError: the folder holds a run of another configuration, or with ``force`` one that another
            process is filling.
        RunError: the folder holds something that is not a run.
    """
    if (path / MANIFEST).exists() and not force:
        return _open_same(path, manifest)
    _refuse_foreign_folder(path)
    given, path = path, path.resolve()  # "." and links have no name of their own to make a folder beside
    _remove_dead_attempts(path)
    fresh = _beside(path, "new")
    try:
        _fill(fresh, manifest, prompts)
        with _held_alone(path) if force else contextlib.nullcontext():
            if force and path.exists():
                _put_aside(path)
            fresh.rename(path)  # the folder appears whole: a kill leaves no half-made run behind
    except MoediagError:  # DiskFullError is an OSError too, and says already what happened
        raise
    except OSError as error:
        # Renaming onto a folder that is not empty fails: then another worker of the same command was first.
        if not force and (path / MANIFEST).exists():
            return _open_same(given, manifest)
        raise write_error(error, path) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(_beside(path, "old"), ignore_errors=True)
    return open_run(given)


def _open_same(path: Path, manifest: dict[str, Any]) -> Run:
    run = open_run(path)
    refuse_other_configuration(run.configuration, manifest["configuration"], str(path))
    return run


def _fill(fresh: Path, manifest: dict[str, Any], prompts: bytes) -> None:
    make_folder(fresh)
    write_atomic(fresh / PROMPTS, prompts)
    manifest = {**manifest, "prompts": {**manifest["prompts"], "data_sha256": sha256_bytes(prompts)}}
    write_sealed(fresh / MANIFEST, {"kind": KIND, "schema_version": SCHEMA_VERSION, **manifest})


def _beside(path: Path, kind: str) -> Path:
    """Where a run is made (``new``) or put aside (``old``): on the same file system, named after this process."""
    return path.with_name(f".{path.name}.{process_tag()}.{kind}")


def _put_aside(path: Path) -> None:
    """Out of the way in one step: a kill in the middle of removing must not leave half a run in place."""
    path.rename(_beside(path, "old"))


@contextmanager
def _held_alone(path: Path) -> Iterator[None]:
    """Keep workers out of a run that is about to be removed.

    Raises:
        RunConflictError: another process is filling it.
    """
    manifest = path / MANIFEST
    if not manifest.exists():
        yield
        return
    with manifest.open("r+b") as file:
        if not claims.lock(file, manifest):
            raise RunConflictError(
                f"{path} is being filled by another process, so --force would remove what it writes; "
                "wait for it or stop it first"
            )
        try:
            yield
        finally:
            claims.release(file)


def _refuse_foreign_folder(path: Path) -> None:
    """Only a run, or nothing, may stand where a run is made."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path} is a file; give -o a folder")
    if path.samefile(Path.cwd()):
        raise RunError(f"{path} is the current folder; give -o a folder of its own, e.g. -o run")
    if any(path.iterdir()) and not (path / MANIFEST).exists():
        raise RunError(f"{path} is not empty and holds no {MANIFEST}; give -o a new folder")


def _remove_dead_attempts(path: Path) -> None:
    """Remove what a killed process of this machine left half-made for this very run; living ones are left alone."""
    attempt = re.compile(rf"\.{re.escape(path.name)}\.{host_tag()}-(\d+)\.(new|old)")
    if not path.parent.is_dir():
        return
    for folder in path.parent.iterdir():
        match = attempt.fullmatch(folder.name)
        if match and folder.is_dir() and not _is_alive(int(match.group(1))):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
