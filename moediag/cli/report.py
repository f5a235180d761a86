"""``moediag report``: figures and report.md of an analysed run."""

from __future__ import annotations

from moediag.cli import options as o

NAME = "report"


def command(run: o.RunPath, training_window: o.TrainingWindow = None) -> None:
    """Draw the figures and write report.md; needs no engine."""
    from moediag.cli.console import wrote
    from moediag.results import report_run
    from moediag.run.directory import open_run

    wrote(report_run(open_run(run), training_window))
