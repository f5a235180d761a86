"""A series: runs of one training, one per step, and a table of what was logged at every step.

Layout::

    SERIES/series.json            sealed: what the series is of, the digest of the step table
    SERIES/steps.parquet          a row per step; a series may have this alone
    SERIES/step-000120/           a run

Invariant: a run's step is what its run.json says, and its folder is named after it: a copied folder is never another
step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from moediag.errors import CorruptRunError, RunConflictError, RunError
from moediag.notation import SCHEMA_VERSION
from moediag.run.files import make_folder, read_checked, read_sealed, sha256_bytes, write_atomic
from moediag.run.reader import Run, open_run
from moediag.run.records import MANIFEST, Record, as_record, check_schema_version, write_record

SERIES: Final = "series.json"
STEPS: Final = "steps.parquet"


class SeriesRecord(Record):
    """series.json.

    Args:
        source: what the steps are of, in words.
        steps_sha256: digest of the step table; None without one.
    """

    kind: Literal["moediag series"] = "moediag series"
    schema_version: int = SCHEMA_VERSION
    moediag_version: str
    source: str = ""
    steps_sha256: str | None = None


class Series:
    """A series on disk; :func:`open_series` gives one."""

    def __init__(self, path: Path, record: SeriesRecord) -> None:
        self.path = path
        self.record = record

    def __repr__(self) -> str:
        return f"<moediag series {self.path}: {len(self.steps)} runs>"

    @property
    def steps(self) -> list[int]:
        """Steps that have a run, in order."""
        return sorted(int(path.parent.name.removeprefix("step-")) for path in self.path.glob(f"step-*/{MANIFEST}"))

    def run_path(self, step: int) -> Path:
        """Where the run of a step is, or is to be made."""
        return self.path / f"step-{step:06d}"

    def runs(self) -> Iterator[Run]:
        """The runs, by step.

        Raises:
            CorruptRunError: a run of another step than its folder says.
        """
        for step in self.steps:
            run = open_run(self.run_path(step))
            if run.record.step != step:
                raise CorruptRunError(
                    f"{run.path / MANIFEST} is of step {run.record.step}, its folder says {step}; restore the folder"
                )
            yield run

    @property
    def step_table(self) -> Path | None:
        """The table of what was logged at every step, checked; None without one.

        Raises:
            CorruptRunError: missing or changed.
        """
        if self.record.steps_sha256 is None:
            return None
        read_checked(self.path / STEPS, self.record.steps_sha256)
        return self.path / STEPS


def create_series(path: Path, moediag_version: str, source: str = "", steps: bytes | None = None) -> Series:
    """Make a series, or open the one of the same source and step table that is there; runs are made in it.

    Args:
        steps: content of the step table, parquet with a column ``step``.

    Raises:
        RunConflictError: a series of something else is there.
        RunError: the folder holds something that is not a series.
    """
    record = SeriesRecord(
        moediag_version=moediag_version, source=source, steps_sha256=None if steps is None else sha256_bytes(steps)
    )
    if (path / SERIES).exists():
        series = open_series(path)
        if (series.record.source, series.record.steps_sha256) != (record.source, record.steps_sha256):
            raise RunConflictError(
                f"{path} is a series of {series.record.source or 'something else'}, asked {source!r}; use another -o"
            )
        return series
    if path.exists() and any(path.iterdir()):
        raise RunError(f"{path} is not empty and holds no {SERIES}; give -o a new folder")
    make_folder(path)
    if steps is not None:
        write_atomic(path / STEPS, steps)
    write_record(path / SERIES, record)  # last: a folder without it is no series yet
    return Series(path, record)


def is_series(path: Path) -> bool:
    """Whether a folder is a series."""
    return (path / SERIES).is_file()


def open_series(path: str | Path) -> Series:
    """Open a series for reading.

    Raises:
        RunError: not a series.
        CorruptRunError: its record was changed, or makes no sense.
        SchemaVersionError: written by another schema version.
    """
    folder = Path(path)
    if not is_series(folder):
        raise RunError(f"{folder} is not a moediag series (no {SERIES}); give a folder of runs made by moediag import")
    content = read_sealed(folder / SERIES)
    check_schema_version(content, folder / SERIES)
    content.pop("sha256")
    return Series(folder, as_record(content, SeriesRecord, str(folder / SERIES)))
