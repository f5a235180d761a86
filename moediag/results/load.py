"""What an analysis left on disk, read only while it is whole and of the arms as they are now."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pandas as pd

import moediag.analysis
import moediag.corrections  # noqa: F401 - both declare their frames
from moediag.errors import CorruptRunError, IncompleteRunError
from moediag.folder import SUMMARY, read_frames
from moediag.notation import SCHEMA_VERSION
from moediag.run.derived import ANALYSIS, captures_digest, settle_derived
from moediag.run.files import read_sealed
from moediag.run.reader import Run
from moediag.run.records import check_schema_version
from moediag.run.store import known_as


def load_summary(run: Run) -> dict[str, Any]:
    """summary.json as ``analyze`` wrote it, of the arms as they are now.

    Raises:
        IncompleteRunError: never analysed, or the arms have changed since.
        CorruptRunError: not what ``analyze`` wrote.
    """
    settle_derived(run.path)
    path = run.path / SUMMARY
    if not path.exists():
        raise IncompleteRunError(f"{run.path} has not been analysed; {analyze_again(run)}")
    try:
        summary = read_sealed(path)
        if (version := summary.get("schema_version")) in range(1, SCHEMA_VERSION):
            raise IncompleteRunError(
                f"{path} was written by an older moediag (schema {version}, this one writes {SCHEMA_VERSION}); "
                f"{analyze_again(run)}"
            )
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
    return main_frames(run, load_summary(run))


def main_frames(run: Run, summary: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """The frames of the main pair that a summary names; raises like :func:`load_frames`."""
    folder = run.path / ANALYSIS / summary["main_pair"]
    return read_frames(folder, _frame_digests(summary), analyze_again(run))


def analyze_again(run: Run) -> str:
    """What to do about results that cannot be used, as messages say it."""
    return f"run: {shell_command('analyze', run.path)}"


def shell_command(*words: object) -> str:
    """A moediag command as a shell takes it, paths as the user gave them."""
    return " ".join(
        ["moediag", *(shlex.quote(known_as(word) if isinstance(word, Path) else str(word)) for word in words)]
    )


def _frame_digests(summary: dict[str, Any]) -> dict[str, str]:
    return dict(summary["provenance"]["frames"][summary["main_pair"]])
