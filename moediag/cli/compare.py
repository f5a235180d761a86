"""``moediag compare``: runs side by side, dense against MoE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moediag.cli import options as o

NAME = "compare"


def command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN ...", help="Analysed run directories.", callback=o.there)
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the comparison.", callback=o.local)
    ],
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="NAME",
            help="What a run is called, once per run in their order; default: its folder's name, or what differs in "
            "the paths of folders of one name.",
        ),
    ] = None,
    training_window: o.TrainingWindow = None,
    pdf: o.Pdf = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a comparison of other runs.")] = False,
    as_json: o.Json = False,
) -> None:
    """Compare runs: Figure-1-style picture, table, report. Dense runs have no routing figures."""
    from moediag.cli.console import doing, note, say_json, wrote
    from moediag.cli.table import show_table
    from moediag.results import compare_runs

    with doing("drawing figures and pages of the comparison"):
        summary = compare_runs(runs, output, training_window, force, pdf, label or ())
    if not summary["same_prompts"]:
        note("Note: the runs were made from different prompts; their numbers differ for that reason too")
    if as_json:
        say_json(summary)
        return
    show_table(summary["runs"], runs)
    wrote(output / "report.html")
    wrote(output / "report.md")
