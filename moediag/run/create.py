"""Making a run directory: it appears whole, and never in place of anything that is not a run.

    PARENT/NAME              the run
    PARENT/.NAME.replaced    the run that was there before, as long as it may have to come back

Invariants:
    - of several processes that make the same run at the same instant one does, the others find it made;
    - a run that another process is filling is never replaced;
    - a run that ``force`` replaces is kept beside the new one until that is complete, and comes back if the new one
      ends before it holds a shard.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moediag.errors import MoediagError, RunConflictError, RunError
from moediag.folder import being_made, being_removed, refuse_current_folder
from moediag.run import claims
from moediag.run.files import make_folder, sha256_bytes, write_atomic, write_error
from moediag.run.reader import Run, open_run
from moediag.run.records import MANIFEST, PROMPTS, CheckpointRecord, RunRecord, write_record
from moediag.run.writer import differing

_OF_CHECKPOINTS = ("weights_sha256", "config_sha256")


def create_run(
    path: Path, record: RunRecord, prompts: bytes | None, checkpoint: CheckpointRecord | None, force: bool = False
) -> Run:
    """Create a run directory, or open the one of the same configuration that is there.

    A run of another configuration in which nothing was captured yet is made anew.

    Args:
        prompts: content of the prompts file, which ``record.prompts`` vouches for.
        checkpoint: the one that the run is begun with.
        force: start anew: the run that is there is kept beside the new one (:func:`replaced`).

    Raises:
        RunConflictError: the folder holds a run of another configuration, or with ``force`` one that another
            process is filling.
        RunError: the folder holds something that is not a run.
    """
    bring_back(path)  # what a command that was killed before it captured anything had set aside
    is_worthless = False
    if (path / MANIFEST).exists() and not force:
        if not _is_empty_of_another(path, record):
            return _open_same(path, record, checkpoint)
        force, is_worthless = True, True
    _refuse_foreign_folder(path)
    given, path = path, path.resolve()  # "." and links have no name of their own to make a folder beside
    fresh = being_made(path)
    try:
        _fill(fresh, record, prompts, checkpoint)
        if force:
            with _held_alone(path):
                _take_place(fresh, path)
            if is_worthless:
                drop_replaced(path)
        else:
            fresh.rename(path)  # the folder appears whole: a kill leaves no half-made run behind
    except MoediagError:  # DiskFullError is an OSError too, and its message is complete
        raise
    except OSError as error:
        # Renaming onto a folder that is not empty fails: then another worker of the same command was first.
        if not force and (path / MANIFEST).exists():
            return _open_same(given, record, checkpoint)
        raise write_error(error, path) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return open_run(given)


def bring_back(path: Path) -> Path | None:
    """Put the run that ``force`` set aside in its place again, if the new one never captured anything.

    Nothing happens where the new one holds a shard of an arm, or where a living process is about to fill it.

    Returns:
        Where the new one lies now, with its logs; None where nothing was brought back.
    """
    path = path.resolve()
    kept, failed = replaced(path), path.with_name(f".{path.name}.failed")
    if not (kept / MANIFEST).exists() or any(path.glob("arms/*/shard-*.json")):
        return None
    try:
        with _held_alone(path if path.exists() else kept):
            shutil.rmtree(failed, ignore_errors=True)
            if path.exists():
                path.rename(failed)
            kept.rename(path)
    except RunConflictError:
        return None
    except OSError as error:
        raise write_error(error, path) from error
    return failed


def replaced(path: Path) -> Path:
    """Where the run that was at ``path`` before is kept."""
    path = path.resolve()
    return path.with_name(f".{path.name}.replaced")


def drop_replaced(path: Path) -> None:
    """Remove the run that is kept: the new one is complete."""
    if replaced(path).exists():
        _remove(replaced(path), path.resolve())


def _take_place(made: Path, path: Path) -> None:
    """Rename ``made`` to ``path``; the run that is there is kept.

    Where one is kept already, the one that is there now never came to anything: it goes, and the older one is kept.
    """
    kept = replaced(path)
    if path.exists() and any(path.iterdir()):
        if kept.exists():
            _remove(path, path)
        else:
            path.rename(kept)
    try:
        made.rename(path)
    except OSError:
        if not path.exists() and kept.exists():
            kept.rename(path)
        raise


def _remove(folder: Path, path: Path) -> None:
    dying = being_removed(path)
    shutil.rmtree(dying, ignore_errors=True)
    folder.rename(dying)
    shutil.rmtree(dying, ignore_errors=True)


def _is_empty_of_another(path: Path, record: RunRecord) -> bool:
    """Whether a run of another configuration is there in which nothing was captured yet, and nobody is about to."""
    if any(path.glob("arms/*/shard-*")) or open_run(path).record.configuration == record.configuration:
        return False
    try:
        with _held_alone(path):
            return True
    except RunConflictError:
        return False


def _open_same(path: Path, given: RunRecord, checkpoint: CheckpointRecord | None) -> Run:
    run = open_run(path)
    there = run.record
    if there.configuration == given.configuration and there.schema_version == given.schema_version:
        return run
    differences = []
    if there.checkpoint is not None and checkpoint is not None and there.checkpoint != checkpoint.digest:
        differences.append(f"checkpoint: {run.checkpoint(there.checkpoint).words} there, {checkpoint.words} given")
    named = _OF_CHECKPOINTS if differences else ()
    before, now = (
        {key: value for key, value in record.configuration.items() if key not in named} for record in (there, given)
    )
    differences += differing(before, now)
    if there.schema_version != given.schema_version:
        differences = [f"schema_version: {there.schema_version} there, {given.schema_version} given"]
    raise RunConflictError(
        f"{path} was made with another configuration ({'; '.join(differences)}); use another -o or --force"
    )


def _fill(fresh: Path, record: RunRecord, prompts: bytes | None, checkpoint: CheckpointRecord | None) -> None:
    make_folder(fresh)
    if prompts is not None:
        assert record.prompts is not None
        assert record.prompts.data_sha256 == sha256_bytes(prompts)
        write_atomic(fresh / PROMPTS, prompts)
    if checkpoint is not None:
        write_record(fresh / "checkpoints" / f"{checkpoint.digest}.json", checkpoint)
    write_record(fresh / MANIFEST, record)


@contextmanager
def _held_alone(path: Path) -> Iterator[None]:
    """Keep workers out of a run that is about to be moved.

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
                f"{path} is being filled by another process, so --force would take it away from it; "
                "wait for it or stop it first"
            )
        try:
            yield
        finally:
            claims.release(file)


def _refuse_foreign_folder(path: Path) -> None:
    """A run is made where a run is, or nothing."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path} is a file; give -o a folder")
    refuse_current_folder(path)
    if any(path.iterdir()) and not (path / MANIFEST).exists():
        raise RunError(f"{path} is not empty and holds no {MANIFEST}; give -o a new folder")
