"""``moediag trend``: the mismatch over training steps, and whether it compounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moediag.cli import options as o

NAME = "trend"

Targets = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN RUN ...|SERIES|TABLE|DUMP",
        callback=o.there,
        help="Run directories, one per step, a folder of them (series.json), files or folders of a framework's dump "
        "(moediag import --list-formats), or one table (.parquet, .csv, .jsonl) "
        "with a column step: a row per token "
        "(seq_id, position, logp_train, logp_infer, ...) or per step (a column per metric, <metric>_se beside it).",
    ),
]
Steps = Annotated[
    str | None,
    typer.Option(metavar="0,50,...", help="Steps of the runs, in order; default: numbers at the ends of their names."),
]
Fit = Annotated[
    str | None,
    typer.Option("--fit", metavar="METRIC", help="Metric to fit; default: the best estimate of the KL that is there."),
]
LearningRate = Annotated[
    float | None,
    typer.Option("--lr", min=0.0, help="Learning rate of every step, 0 for a control; default: the table's column lr."),
]
Restarts = Annotated[
    str | None,
    typer.Option(
        metavar="40,80,...",
        help="Steps that are the first after a restart of the rollout engine; default: the table's column restart.",
    ),
]
OutputFolder = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder for the table, page and figures.")
]
Replace = Annotated[bool, typer.Option("--force", help="Replace the trend of another request.")]


def command(
    targets: Targets,
    steps: Steps = None,
    fit: Fit = None,
    lr: LearningRate = None,
    restarts: Restarts = None,
    output: OutputFolder = None,
    tokens: o.TokensTable = None,
    trust_pickle: o.TrustPickle = False,
    strict: o.Strict = False,
    pdf: o.Pdf = False,
    force: Replace = False,
    as_json: o.Json = False,
) -> None:
    """Show every metric by training step, and fit delta' = (1 + a) delta - b, or say why the steps cannot tell."""
    from moediag.cli.console import bar, say, say_json, wrote
    from moediag.folder import refuse_other
    from moediag.importers.rollouts import Options
    from moediag.results.load import shell_command
    from moediag.results.trend import KIND, Given, measure_trend, outcome_lines, trend_request, write_trend

    numbers = _numbers(steps)
    given = Given(lr, None if restarts is None else frozenset(_numbers(restarts) or ()))
    request = None if output is None else trend_request(targets, numbers, fit, output, given)
    named = {"--steps": steps, "--fit": fit, "--lr": lr, "--restarts": restarts, "--tokens": tokens}
    options = [word for name, value in named.items() if value is not None for word in (name, value)]
    again = [shell_command("trend", *targets, *options, "-o", output)]
    if output is not None and request is not None:
        refuse_other(output, KIND, request, force)
    with bar("trend") as progress:
        of_dump = Options(tokens=tokens, trust_pickle=trust_pickle)
        trend = measure_trend(targets, numbers, fit, progress.show, of_dump, given)
    written = [] if output is None or request is None else write_trend(trend, output, request, force, pdf, again)
    if as_json:
        say_json(trend.summary())
    else:
        for line in outcome_lines(trend):
            say(line)
        for path in written:
            wrote(path)
    if strict:
        o.refuse_errors(trend.findings)


def _numbers(text: str | None) -> list[int] | None:
    """``0,50,100`` as numbers.

    Example:
        >>> _numbers("0, 50"), _numbers(None)
        ([0, 50], None)
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise typer.BadParameter(f"expected whole numbers with commas between, e.g. 0,50,100, found {text}")
    return [int(part) for part in parts]
