"""Weights on disk: the rows they came from in their order, one column of weights per correction.

Invariants:
    - every row of the input stands in the output, in the same order; a row that gets no update has 0;
    - numbers are written so that reading gives the same float64 back;
    - one correction's weights are in memory at a time, whatever their number; the file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moediag.corrections.correction import Correction
from moediag.corrections.sources import Source
from moediag.errors import DumpError
from moediag.importers.tables import KINDS, OnProgress
from moediag.run.files import atomic

Float64 = NDArray[np.float64]

_ROWS_AT_ONCE: Final = 1 << 18


def refuse_weights_path(path: Path, force: bool = False) -> None:
    """Refuse a path that weights cannot be written to, before anything is computed.

    Raises:
        DumpError: another ending, no folder, or a file that is there already.
    """
    if path.suffix not in KINDS:
        raise DumpError(f"weights are written as {', '.join(KINDS)}, found {path}; choose one of these endings")
    if path.is_dir() or (path.exists() and not force):
        raise DumpError(f"{path} exists already; give --weights-out another name, or --force")
    if not path.absolute().parent.is_dir():
        raise DumpError(f"{path.absolute().parent} is no folder; make it, or give --weights-out another path")


def write_weights(
    source: Source, corrections: Mapping[str, Correction], path: Path, on_progress: OnProgress | None = None
) -> None:
    """Write the keys of every row and its weight under every correction.

    Args:
        source: rows as they were read.
        corrections: column of weights -> correction.
        path: ``.parquet``, ``.csv`` or ``.jsonl``.
        on_progress: called with tokens done, of how many.

    Raises:
        DiskFullError: no space; nothing is left behind.
        RunError: the folder cannot be written.
    """
    with atomic(path) as file, tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        parts = _computed(source, corrections, Path(folder), on_progress)
        with _WRITERS[path.suffix](file, _schema(source, parts)) as writer:
            for start in range(0, source.n_rows, _ROWS_AT_ONCE):
                writer.write(_rows(source, parts, start, min(start + _ROWS_AT_ONCE, source.n_rows)))


def _computed(
    source: Source, corrections: Mapping[str, Correction], folder: Path, on_progress: OnProgress | None
) -> dict[str, Path]:
    """One file of float64 per correction, in the order of the rows; the terms of a chunk serve all corrections."""
    paths = {name: folder / f"{nth}.f64" for nth, name in enumerate(corrections)}
    done = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(path.open("wb")) for name, path in paths.items()}
        for x in source.tokens.chunks():
            for name, correction in corrections.items():
                x.at_rows(correction.of_terms(x)).tofile(files[name])
            done += len(x.frame)
            if on_progress:
                on_progress(done, len(source.input_row_T), "tokens weighted")
    if not source.is_in_order:
        for path in paths.values():
            source.to_rows(np.fromfile(path)).tofile(path)
    return paths


def _rows(source: Source, parts: Mapping[str, Path], start: int, end: int) -> pa.RecordBatch:
    keys = {name: column[start:end] for name, column in source.keys.items()}
    weights = {name: np.fromfile(path, count=end - start, offset=8 * start) for name, path in parts.items()}
    return pa.record_batch({**keys, **weights}, schema=_schema(source, parts))


def _schema(source: Source, parts: Mapping[str, Path]) -> pa.Schema:
    keys = [(name, pa.array(column[0:1]).type) for name, column in source.keys.items()]
    return pa.schema([*keys, *((name, pa.float64()) for name in parts)])


class _Writer(Protocol):
    def write(self, batch: pa.RecordBatch) -> None: ...


class _JsonLines:
    """Writes batches as JSON lines; Python's repr of a float reads back as the same float."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, batch: pa.RecordBatch) -> None:
        names, columns = batch.schema.names, [column.to_pylist() for column in batch.columns]
        lines = (json.dumps(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True))
        self._file.write("".join(f"{line}\n" for line in lines).encode())


@contextmanager
def _jsonl(file: Any, _schema: pa.Schema) -> Iterator[_Writer]:
    yield _JsonLines(file)


_WRITERS: Final[dict[str, Callable[[Any, pa.Schema], Any]]] = {
    ".parquet": pq.ParquetWriter,
    ".csv": pyarrow.csv.CSVWriter,
    ".jsonl": _jsonl,
}
