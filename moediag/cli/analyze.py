"""``moediag analyze``: frames and summary.json again, offline."""

from __future__ import annotations

import sys
from typing import Annotated, Any

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
    workers: o.Workers = None,
    ray: o.RayTasks = False,
    ray_address: o.RayAddress = None,
    num_workers: o.NumTasks = None,
) -> None:
    """Compute every frame and summary.json from the captured arms; needs no engine.

    What has not changed since the last analysis is not computed again: an arm that was added costs its own pairs.
    """
    from moediag.cli.console import bar, doing, say, say_json, wrote
    from moediag.cli.table import show_table
    from moediag.results import analyze_run
    from moediag.run.reader import open_run

    cluster = o.cluster_options(ray, 0, address=ray_address, num_workers=num_workers)
    opened = open_run(run if cluster is None else run.resolve())  # other nodes start elsewhere
    # in a log a quick analysis says nothing
    with (
        o.pool(run, cluster, workers) as pool,
        bar("analysis") if sys.stderr.isatty() else doing(f"analysing {run}") as progress,
    ):
        seen: list[dict[str, Any]] = []

        def on_event(event: dict[str, Any]) -> None:
            seen.append(event)
            if progress is not None:
                progress.on_event(event)

        summary = analyze_run(opened, force, no_text, pool, on_event)
    if as_json:
        say_json(summary)
        return
    show_table({run.resolve().name: summary}, [run])
    if seen:
        wrote(run / "summary.json")
    else:
        say(f"Unchanged since the last analysis: {run / 'summary.json'}")
