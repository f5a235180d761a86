"""A run as a plain table with a row per token, which :mod:`~moediag.importers.plain` reads again: the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from moediag.errors import RunError
from moediag.importers.tables import OnProgress, silent
from moediag.notation import NO_TOKEN
from moediag.run.capture import TOKEN_COLUMNS, Shard
from moediag.run.files import atomic, make_folder
from moediag.run.reader import Run

_SCHEMA: Final = pa.schema(
    {
        "step": pa.int64(),
        **TOKEN_COLUMNS,
        "logp_train": pa.float32(),
        "logp_infer": pa.float32(),
        "entropy": pa.float32(),
        "entropy_train": pa.float32(),
    }
)
"""Every column that a table may have; one that no run has is left out."""

_WRITERS: Final[dict[str, Any]] = {
    ".parquet": partial(pq.ParquetWriter, compression="zstd"),
    ".arrow": pa.ipc.new_file,
    ".csv": pc.CSVWriter,
}


def export_table(
    runs: Sequence[Run], path: Path, force: bool = False, on_progress: OnProgress = silent, suffix: str = ".parquet"
) -> tuple[str, ...]:
    """Write the main pair of some runs as one table; routes and further arms are not in it.

    Args:
        runs: one, or those of a series, each with its step.
        force: write over a file.
        suffix: ``.parquet``, ``.arrow`` (Arrow's IPC file) or ``.csv``, which the name has to have, too.

    Returns:
        Names of its columns.

    Raises:
        RunError: the file is there, or cannot be written, or a run has not both sides.
    """
    if path.suffix != suffix:
        raise RunError(f"{path}: expected a name that ends in {suffix}; give -o such a file, or another --format")
    if path.exists() and not force:
        raise RunError(f"{path} exists; give -o another file, or --force to write over it")
    names = _present(runs)
    schema = pa.schema([field for field in _SCHEMA if field.name in names])
    n_shards, done = sum(len(run.shards) for run in runs), 0
    make_folder(path.parent)
    with atomic(path) as file, _WRITERS[suffix](file, schema) as writer:
        for run in runs:
            for shard in run.shards:
                writer.write_table(_rows(run, shard).select(schema.names))
                on_progress(done := done + 1, n_shards, "shards")
    return tuple(schema.names)


def _present(runs: Sequence[Run]) -> set[str]:
    """Columns that a run has a value in."""
    names = {"seq_id", "prompt_id", "sample_index", "position", "is_response", "is_trained", "logp_train", "logp_infer"}
    if all(run.record.step is not None for run in runs):
        names.add("step")
    elif len(runs) > 1:
        raise RunError(f"{runs[0].path} and others do not say their steps, so they are no one table; export them apart")
    for table in (_rows(run, shard) for run in runs for shard in run.shards):
        names |= {name for name in table.column_names if table[name].null_count < len(table)}
    return names


def _rows(run: Run, shard: Shard) -> pa.Table:
    """A shard's rows; what is not known is null.

    Raises:
        IncompleteRunError: an arm of the main pair is not there.
    """
    tokens = run.tokens(shard)
    train, infer = (run.capture(arm, shard) for arm in run.main_arms)
    columns = {
        "step": None if run.record.step is None else np.full(len(tokens), run.record.step),
        **{name: getattr(tokens, f"{name}_T", None) for name in TOKEN_COLUMNS},
        "is_trained": tokens.is_scored_T,
        "logp_train": train.logp_T,
        "logp_infer": infer.logp_T,
        "entropy": infer.entropy_T,
        "entropy_train": train.entropy_T,
    }
    absent = {"token_id": NO_TOKEN, "turn": -1}
    arrays = {
        name: pa.nulls(len(tokens), _SCHEMA.field(name).type)
        if values_T is None
        else pa.array(
            values_T,
            _SCHEMA.field(name).type,
            mask=values_T == absent[name] if name in absent else None,
            from_pandas=True,
        )
        for name, values_T in columns.items()
    }
    return pa.table(arrays)
