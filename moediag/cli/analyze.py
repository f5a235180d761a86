"""``moediag analyze``: frames and summary.json again, offline."""

from __future__ import annotations

from typing import Annotated

import typer

from moediag.cli import options as o

NAME = "analyze"


def command(
    run: o.RunPath,
    as_json: o.Json = False,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Keep token ids out of the frames, and text out of pages made from them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Analyse in spite of validation errors.")] = False,
) -> None:
    """Compute every frame and summary.json from the captured arms; needs no engine."""
    from moediag.cli.console import doing, say_json, wrote
    from moediag.cli.table import show_table
    from moediag.results import analyze_run
    from moediag.run.reader import open_run

    opened = open_run(run)
    with doing(f"analysing {run}"):
        summary = analyze_run(opened, force, no_text)
    if as_json:
        say_json(summary)
        return
    show_table({run.resolve().name: summary})
    wrote(run / "summary.json")
