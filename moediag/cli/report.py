"""``moediag report``: figures, report.md and report.html of an analysed run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moediag.cli import options as o

NAME = "report"

Tokenizer = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="tokenizer.json, or its folder, to show tokens as text; default: the checkpoint's, if it is at its place.",
    ),
]
Sequences = Annotated[
    list[int] | None,
    typer.Option(
        "--sequence",
        metavar="SEQ_ID",
        help="A response to show token by token, before those that differ most; may be given several times.",
    ),
]


def command(
    run: o.RunPath,
    training_window: o.TrainingWindow = None,
    tokenizer: Tokenizer = None,
    no_text: o.NoText = False,
    pdf: o.Pdf = False,
    sequence: Sequences = None,
) -> None:
    """Draw the figures and write report.md and report.html; needs no engine."""
    from moediag.cli.console import doing, wrote
    from moediag.results import report_run
    from moediag.run.reader import open_run

    if tokenizer is not None and no_text:
        raise typer.BadParameter("--tokenizer shows text and --no-text leaves it out: give one of the two")
    opened = open_run(run)
    with doing(f"drawing figures and pages of {run}"):
        report = report_run(opened, training_window, tokenizer, no_text, pdf, sequence or [])
    wrote(report)
    wrote(report.with_suffix(".html"))
