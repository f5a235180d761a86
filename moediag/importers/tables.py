"""Tables on disk and in memory, read into columns: parquet, csv, JSON lines, frames.

Invariants:
    - numbers arrive correctly rounded: a float64 that was written with 17 digits (or by Python's repr) is the same
      float64 again, so the kind of file changes no weight;
    - only the columns requested are read;
    - whatever cannot be read is one line that names the file and the column.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moediag.errors import DumpError
from moediag.importers.columns import Kind
from moediag.prompts import separator_in

KINDS: Final = (".parquet", ".csv", ".jsonl")
OnProgress = Callable[[int, int, str], None]
"""Called with what is done, of how much, and its unit."""


def silent(_done: int, _total: int, _unit: str) -> None:
    """No progress is shown."""


_ROWS_AT_ONCE: Final = 1 << 20
_BYTES_AT_ONCE: Final = 16 << 20
_LARGEST_WHOLE: Final = 2**53
"""Beyond it a float64 does not tell neighbouring whole numbers apart."""
_N_PEEKED: Final = 1000
"""Lines of JSON whose keys are taken for the table's columns."""


@dataclass(frozen=True)
class Ids:
    """A column of names: ``values_N[row_T]``, the values ascending."""

    row_T: NDArray[np.intp]
    values_N: NDArray[Any]

    @classmethod
    def of(cls, values_T: Any) -> Ids:
        """Names of rows, whatever their order."""
        row_T, values_N = pd.factorize(values_T, sort=True)
        return cls(row_T, np.asarray(values_N))

    def __len__(self) -> int:
        return len(self.row_T)

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        return np.asarray(self.values_N[self.row_T[rows]])


Columns = dict[str, Any]
"""Name -> :class:`Ids` or an array, one entry per row of the table."""


@dataclass(frozen=True)
class TableFile:
    """A table that exists, with the types of its columns.

    Args:
        types: column -> arrow type, as far as it is known before everything is read.
    """

    path: Path
    types: dict[str, pa.DataType]

    def read(self, kinds: Mapping[str, Kind], on_progress: OnProgress | None = None) -> Columns:
        """The columns named, in the order of the file.

        Raises:
            DumpError: a column is of another kind, or has a gap where none may be; the file is damaged or empty.
        """
        for name, kind in kinds.items():
            _refuse_type(self.path, name, kind, self.types[name])
        with readable(self.path):
            batches = list(_READERS[self.path.suffix](self, kinds, on_progress or silent))
            table = pa.Table.from_batches(batches) if batches else None
            if table is None or not len(table):
                raise DumpError(f"{self.path} holds no row")
            return {name: _column(self.path, name, kind, table[name]) for name, kind in kinds.items()}


def open_table(path: Path) -> TableFile:
    """A table by the ending of its name.

    Raises:
        DumpError: no file, no such ending, or nothing that can be read as such a table.
    """
    if not path.is_file():
        raise DumpError(f"{path} is {'not a file' if path.exists() else 'missing'}; give a run directory or a table")
    if path.suffix not in KINDS:
        raise DumpError(f"{path} is no table by its name; expected a run directory, or {', '.join(KINDS)}")
    with readable(path):
        names, types = _SCHEMAS[path.suffix](path)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DumpError(f"{path} has the column {twice[0]} twice; keep one of them")
    return TableFile(path, types)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What the body cannot read of a file is one line that names it.

    Raises:
        DumpError: as the body raises it, or for what the file's format, the disk or the encoding gives.
    """
    try:
        yield
    except DumpError:
        raise
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        reason = str(error).split(". Detail:")[0]
        raise DumpError(f"{path} cannot be read as {path.suffix[1:] or 'a table'}: {reason}; write it again") from None


def _parquet_schema(path: Path) -> tuple[list[str], dict[str, pa.DataType]]:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        return list(schema.names), dict(zip(schema.names, schema.types, strict=True))


def _separated(path: Path) -> pyarrow.csv.ParseOptions:
    """How the cells of a csv are separated, as its header shows."""
    with path.open("rb") as file:
        return pyarrow.csv.ParseOptions(delimiter=separator_in(file.readline(1 << 16).decode("latin-1")))


def _csv_schema(path: Path) -> tuple[list[str], dict[str, pa.DataType]]:
    with pyarrow.csv.open_csv(path, parse_options=_separated(path)) as reader:
        schema = reader.schema
        return list(schema.names), dict(zip(schema.names, schema.types, strict=True))


def _jsonl_schema(path: Path) -> tuple[list[str], dict[str, pa.DataType]]:
    """Columns of the first lines; a column's type is that of its first value."""
    first: dict[str, Any] = {}
    for record in islice(json_records(path), _N_PEEKED):
        for name, value in record.items():
            if first.get(name) is None:
                first[name] = value
    types = {name: pa.null() if value is None else pa.infer_type([value]) for name, value in first.items()}
    return list(types), types


def json_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, empty lines left out.

    Raises:
        DumpError: a line that is no JSON object; names it.
    """
    return (record for _, record in json_lines([path]))


def json_lines(paths: Sequence[Path], on_progress: OnProgress = silent) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of the JSON lines of some files, each with its place in words; lines end with a line feed alone.

    Raises:
        DumpError: a line that is no JSON object; names it.
    """
    total, done = sum(path.stat().st_size for path in paths if path.exists()), 0
    for path in paths:
        with readable(path), path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                done += len(line)
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DumpError(f"{where}: no JSON ({error})") from None
                if not isinstance(record, dict):
                    raise DumpError(f"{where}: expected a JSON object, found {type(record).__name__}")
                yield where, record
                on_progress(done, total, "bytes read")


def first_record(path: Path) -> dict[str, Any]:
    """The first object of JSON lines; empty where a file holds none."""
    if path.suffix not in (".jsonl", ".json"):
        return {}
    try:
        return next(json_records(path), {})
    except DumpError:
        return {}


def _read_parquet(table: TableFile, kinds: Mapping[str, Kind], on_progress: OnProgress) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(table.path) as file:
        n_rows, done = file.metadata.num_rows, 0
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(kinds)):
            done += len(batch)
            on_progress(done, n_rows, "rows read")
            yield batch


def _read_csv(table: TableFile, kinds: Mapping[str, Kind], on_progress: OnProgress) -> Iterator[pa.RecordBatch]:
    options = {
        "read_options": pyarrow.csv.ReadOptions(block_size=_BYTES_AT_ONCE),
        "parse_options": _separated(table.path),
        "convert_options": pyarrow.csv.ConvertOptions(
            include_columns=list(kinds), column_types=_types_of(table, kinds)
        ),
    }
    yield from _read_text(table.path, pyarrow.csv.open_csv, options, on_progress)


def _read_jsonl(table: TableFile, kinds: Mapping[str, Kind], on_progress: OnProgress) -> Iterator[pa.RecordBatch]:
    schema = pa.schema(list(_types_of(table, kinds).items()))
    options = {
        "read_options": pyarrow.json.ReadOptions(block_size=_BYTES_AT_ONCE),
        "parse_options": pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    }
    yield from _read_text(table.path, pyarrow.json.open_json, options, on_progress)


def _read_text(
    path: Path, opener: Callable[..., Any], options: dict[str, Any], on_progress: OnProgress
) -> Iterator[pa.RecordBatch]:
    size = path.stat().st_size
    with path.open("rb") as file, opener(file, **options) as reader:
        for batch in reader:
            on_progress(file.tell(), size, "bytes read")
            yield batch


def _types_of(table: TableFile, kinds: Mapping[str, Kind]) -> dict[str, pa.DataType]:
    """The type that text is parsed as."""
    return {name: _parsed_as(kind, table.types[name]) for name, kind in kinds.items()}


def _parsed_as(kind: Kind, found: pa.DataType) -> pa.DataType:
    if kind in ("number", "whole"):  # other tools write 42.0, pandas where a cell of the column is empty
        return pa.float64()
    if kind == "text":
        return pa.string()
    if kind == "flag":
        return found if pa.types.is_boolean(found) or pa.types.is_floating(found) else pa.int64()
    return pa.int64() if pa.types.is_integer(found) else pa.string()


_SCHEMAS: Final[dict[str, Callable[[Path], tuple[list[str], dict[str, pa.DataType]]]]] = {
    ".parquet": _parquet_schema,
    ".csv": _csv_schema,
    ".jsonl": _jsonl_schema,
}
_READERS: Final[dict[str, Callable[..., Iterator[pa.RecordBatch]]]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
}

_ACCEPTED: Final[dict[Kind, tuple[str, Callable[[pa.DataType], bool]]]] = {
    "id": ("whole numbers or words", lambda kind: pa.types.is_integer(kind) or _is_words(kind)),
    "whole": ("whole numbers", lambda kind: _is_number(kind)),
    "number": ("numbers", lambda kind: _is_number(kind)),
    "text": ("words", lambda kind: pa.types.is_integer(kind) or _is_words(kind)),
    "flag": ("true/false or 1/0", lambda kind: pa.types.is_boolean(kind) or _is_number(kind)),
}


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _is_words(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind))


def _refuse_type(path: Path, name: str, kind: Kind, found: pa.DataType) -> None:
    needed, is_accepted = _ACCEPTED[kind]
    if pa.types.is_list(found) or pa.types.is_large_list(found):
        raise DumpError(f"{path}: column {name} holds lists, not a value a row (pandas: explode)")
    # a csv that starts with a thousand empty cells has no type yet; parsing decides
    if not (is_accepted(found) or pa.types.is_null(found)):
        raise DumpError(f"{path}: column {name} needs {needed}, found {found}")


def _column(path: Path, name: str, kind: Kind, column: pa.ChunkedArray) -> Any:
    if kind == "text":
        return np.asarray(column.cast(pa.string()).fill_null("").to_numpy(zero_copy_only=False), dtype=object)
    if column.null_count and kind != "number":
        raise DumpError(f"{path}: column {name} is empty in {column.null_count:,} rows; every row needs one")
    if kind == "number":
        return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)
    if kind == "whole":
        return _as_whole(column.to_numpy(), f"{path}: column {name}")
    if kind == "flag":
        return as_flags(column.to_numpy(), f"{path}: column {name}")
    if pa.types.is_integer(column.type):
        return Ids.of(column.cast(pa.int64()).to_numpy())
    return _words(column)


def _words(column: pa.ChunkedArray) -> Ids:
    encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    words_N = encoded.dictionary.to_numpy(zero_copy_only=False)
    order_N = np.argsort(words_N)
    rank_N = np.empty(len(order_N), np.intp)
    rank_N[order_N] = np.arange(len(order_N))
    return Ids(rank_N[encoded.indices.to_numpy()], words_N[order_N])


def frame_column(frame: pd.DataFrame, name: str, kind: Kind) -> Any:
    """A column of a frame, as :meth:`TableFile.read` gives a file's.

    Raises:
        DumpError: it is of another kind.
    """
    values_T = frame[name].to_numpy()
    try:
        if kind == "id":
            return Ids.of(values_T)
        if kind == "flag":
            return as_flags(values_T, f"column {name}")
        if kind == "text":
            return frame[name].fillna("").astype(str).to_numpy(object)
        if kind == "whole":
            return _as_whole(values_T, f"column {name}")
        return frame[name].to_numpy(np.float64)
    except DumpError:
        raise
    except (TypeError, ValueError):
        raise DumpError(f"column {name} needs {_ACCEPTED[kind][0]}, found {frame[name].dtype}") from None


def _as_whole(values_T: NDArray[Any], where: str) -> NDArray[np.int64]:
    """Whole numbers, also where they were written as floats (42.0).

    Raises:
        DumpError: a fraction, or nothing.
    """
    if values_T.dtype.kind not in "iu":
        values_T = np.asarray(values_T, dtype=np.float64)
        is_bad_T = ~(np.abs(values_T) <= _LARGEST_WHOLE) | (values_T != np.round(values_T))
        if is_bad_T.any():
            row = int(np.argmax(is_bad_T))
            raise DumpError(f"{where} needs whole numbers, found {values_T[row]:g} in row {row}")
    return values_T.astype(np.int64)


def as_flags(values_T: NDArray[Any], where: str) -> NDArray[np.bool_]:
    """Flags from booleans or from numbers 1 and 0.

    Raises:
        DumpError: any other value.
    """
    if values_T.dtype != bool and not np.isin(values_T, (0, 1)).all():
        raise DumpError(f"{where} needs true/false or 1/0, found {values_T[~np.isin(values_T, (0, 1))][0]}")
    return np.asarray(values_T, dtype=bool)
