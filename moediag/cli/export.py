"""``moediag export RUN|SERIES``: a plain table that any tool reads, moediag among them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moediag.cli import options as o

NAME = "export"


class ExportFormat(StrEnum):
    """What a run can be written as."""

    table = "table"


Target = Annotated[Path, typer.Argument(metavar="RUN|SERIES", help="Run directory, or a series.", callback=o.there)]
OutputFile = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Table to write (.parquet).")]
FormatOption = Annotated[
    ExportFormat, typer.Option("--format", help="table: a row per token of the main pair, without routes.")
]
Replace = Annotated[bool, typer.Option("--force", help="Write over a file.")]


def command(
    target: Target, output: OutputFile, format_: FormatOption = ExportFormat.table, force: Replace = False
) -> None:
    """Write tokens, masks, advantages and both log-probabilities as a table; moediag import table reads it again."""
    from moediag.cli.console import bar, say, wrote
    from moediag.importers.export import export_table
    from moediag.importers.write import runs_of

    with bar(f"exporting {format_.value}") as progress:
        names = export_table(runs_of(target), output, force, progress.show)
    say(f"columns: {', '.join(names)}")
    wrote(output)
