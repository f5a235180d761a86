"""``moediag export RUN|SERIES|STEPS``: a plain table that any tool reads, moediag among them, or a logger's files."""

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
    arrow = "arrow"
    csv = "csv"
    tensorboard = "tensorboard"
    wandb = "wandb"


Target = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|SERIES|STEPS",
        help="Run directory, or a series; for tensorboard and wandb also a table of steps, or the folder of a Watch.",
        callback=o.there,
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", metavar="PATH", help="File to write, or folder for tensorboard and wandb.", callback=o.local
    ),
]
FormatOption = Annotated[
    ExportFormat,
    typer.Option(
        "--format",
        help="table (.parquet), arrow (.arrow), csv (.csv): a row per token of the main pair, without routes "
        "(moediag import table reads .parquet and .csv again); "
        "tensorboard, wandb: every metric of trend at every step (wandb: offline files, for wandb sync).",
    ),
]
Replace = Annotated[bool, typer.Option("--force", help="Write over a file, or add to a folder.")]


def command(target: Target, output: Output, format_: FormatOption = ExportFormat.table, force: Replace = False) -> None:
    """Write a table of tokens, or metrics by step for TensorBoard or Weights & Biases."""
    from moediag.cli.console import bar, say, wrote
    from moediag.importers.export import export_table
    from moediag.importers.write import runs_of
    from moediag.results import scalars

    if format_ not in (ExportFormat.tensorboard, ExportFormat.wandb):
        suffix = ".parquet" if format_ is ExportFormat.table else f".{format_.value}"
        with bar(f"exporting {format_.value}") as progress:
            names = export_table(runs_of(target), output, force, progress.show, suffix)
        say(f"columns: {', '.join(names)}")
        wrote(output)
        return
    scalars.refuse_used(output, force)
    with bar(f"exporting {format_.value}") as progress:
        found = scalars.read_scalars(target, progress.show)
    names = tuple(dict.fromkeys(name for _, values in found for name in values))
    say(f"{len(names)} scalars at {len(found)} steps: {', '.join(names)}")
    if format_ is ExportFormat.tensorboard:
        wrote(scalars.write_tensorboard(found, output))
        say(f"Shown by: tensorboard --logdir {output}")
    else:
        written = scalars.write_wandb(found, output, target.resolve().name)
        wrote(written)
        say(f"Nothing was sent; to upload: wandb sync {written}")
