"""What an analysis left on disk, read only while it is whole and of the arms as they are now."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import Any

import pandas as pd

import moediag.analysis  # noqa: F401 - declares the frames
from moediag.errors import CorruptRunError, IncompleteRunError
from moediag.frames import declared_frames
from moediag.results.summary import captures_digest
from moediag.run.files import read_checked, read_sealed
from moediag.run.reader import Run
from moediag.run.records import check_schema_version


def load_summary(run: Run) -> dict[str, Any]:
    """summary.json as ``analyze`` wrote it, of the arms as they are now.

    Raises:
        IncompleteRunError: never analysed, or the arms have changed since.
        CorruptRunError: not what ``analyze`` wrote.
    """
    path = run.path / "summary.json"
    if not path.exists():
        raise IncompleteRunError(f"{run.path} has not been analysed; {analyze_again(run)}")
    try:
        summary = read_sealed(path)
        check_schema_version(summary, path)
        captures, _, _ = (
            summary["provenance"]["captures"],
            summary["pairs"][summary["main_pair"]],
            _frame_digests(summary),
        )
    except (CorruptRunError, KeyError, TypeError, AttributeError):
        raise CorruptRunError(
            f"{path} is not what this moediag writes (damaged, edited, or of another version); {analyze_again(run)}"
        ) from None
    if captures != captures_digest(run):
        raise IncompleteRunError(f"{run.path}: its arms have changed since the analysis; {analyze_again(run)}")
    return summary


def load_frames(run: Run) -> dict[str, pd.DataFrame]:
    """The frames of the main pair that summary.json names, checked against digest and declaration.

    Raises:
        IncompleteRunError: never analysed, the arms have changed since, or a frame is missing.
        CorruptRunError: a frame is not the one that was written.
    """
    return read_frames(run, load_summary(run))


def read_frames(run: Run, summary: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """The frames that a summary names; raises like :func:`load_frames`."""
    specs = {spec.name: spec for spec in declared_frames()}
    frames = {}
    for name, digest in _frame_digests(summary).items():
        path = frames_folder(run, summary["main_pair"]) / f"{name}.parquet"
        if not path.exists():
            raise IncompleteRunError(f"{path} is missing; {analyze_again(run)}")
        try:
            frames[name] = specs[name].validate(pd.read_parquet(io.BytesIO(read_checked(path, digest))))
        except (KeyError, OSError, ValueError):
            raise CorruptRunError(
                f"{path} is not the frame that the analysis wrote (damaged, edited, or of another version); "
                f"{analyze_again(run)}"
            ) from None
    return frames


def frames_folder(run: Run, pair: str) -> Path:
    """Where the frames of a pair are."""
    return run.path / "analysis" / pair


def analyze_again(run: Run) -> str:
    """What to do about results that cannot be used, as messages say it."""
    return f"run: {shell_command('analyze', run.path)}"


def shell_command(*words: object) -> str:
    """A moediag command as a shell takes it, paths as the user gave them."""
    return " ".join(["moediag", *(shlex.quote(str(word)) for word in words)])


def _frame_digests(summary: dict[str, Any]) -> dict[str, str]:
    return dict(summary["provenance"]["frames"][summary["main_pair"]])
