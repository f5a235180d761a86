"""Making a run directory: it appears whole, and never in place of anything that is not a run."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from moediag.errors import RunError
from moediag.notation import SCHEMA_VERSION
from moediag.run.directory import (
    KIND,
    MANIFEST,
    PROMPTS,
    Run,
    Shard,
    make_folder,
    open_run,
    refuse_other_configuration,
)
from moediag.run.files import sha256_bytes, write_atomic, write_error, write_sealed


def split_into_shards(n_sequences: int, shard_size: int) -> list[Shard]:
    """Shards of ``shard_size`` whole sequences; the last may be smaller."""
    starts = range(0, n_sequences, shard_size)
    return [Shard(i, start, min(shard_size, n_sequences - start)) for i, start in enumerate(starts)]


def create_run(path: Path, manifest: dict[str, Any], prompts: bytes, force: bool = False) -> Run:
    """Create a run directory, or open the one of the same configuration that is there.

    Args:
        manifest: ``configuration``, ``model``, ``sampling``, ``prompts``, ``shards``, ``completions``.
        prompts: content of the prompts file.
        force: start anew: remove the run that is there first.

    Raises:
        RunConflictError: the folder holds a run of another configuration.
        RunError: the folder holds something that is not a run.
    """
    if (path / MANIFEST).exists() and not force:
        run = open_run(path)
        refuse_other_configuration(run.configuration, manifest["configuration"], str(path))
        return run
    _refuse_foreign_folder(path)
    given, path = path, path.resolve()  # "." and links have no name of their own to make a folder beside
    _remove_dead_attempts(path)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    make_folder(fresh)
    write_atomic(fresh / PROMPTS, prompts)
    manifest = {**manifest, "prompts": {**manifest["prompts"], "data_sha256": sha256_bytes(prompts)}}
    write_sealed(fresh / MANIFEST, {"kind": KIND, "schema_version": SCHEMA_VERSION, **manifest})
    try:
        if path.exists():
            shutil.rmtree(path)
        fresh.replace(path)  # the folder appears whole: a kill leaves no half-made run behind
    except OSError as error:
        raise write_error(error, path) from error
    return open_run(given)


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
    """Remove what a killed process left half-made for this very run; a live process's attempt is left alone."""
    attempt = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.new")
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
