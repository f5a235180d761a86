"""``moediag trend``: the mismatch over training steps, and whether it compounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moediag.cli import options as o

NAME = "trend"


def _named(target: Path) -> tuple[str, Path]:
    """``NAME=PATH`` apart; a path that is there is one, whatever its name.

    Example:
        >>> _named(Path("TIS=runs/tis")), _named(Path("runs/tis"))
        (('TIS', PosixPath('runs/tis')), ('', PosixPath('runs/tis')))
    """
    name, is_named, path = str(target).partition("=")
    is_path = target.exists() or ":/" in name  # a URL, too, may hold the sign
    return (name, Path(path)) if is_named and name and path and not is_path else ("", target)


def _there(targets: list[Path]) -> list[Path]:
    there = []
    for target in targets:
        name, path = _named(target)
        path = o.there(path)
        there.append(Path(f"{name}={path}") if name else path)
    return there


Targets = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN RUN ...|SERIES|TABLE|DUMP|NAME=PATH ...",
        callback=_there,
        help="One training: run directories, one per step, a folder of them (series.json), files or folders of a "
        "framework's dump (moediag import --list-formats), the folder of a Watch, or one table (.parquet, .csv, "
        ".jsonl) with a column step: a row per token (seq_id, position, logp_train, logp_infer, ...) or per "
        "step (a column per metric, <metric>_se beside it). Several side by side: NAME=PATH for each, or "
        "several tables, folders of a Watch or series.",
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
    Path | None,
    typer.Option("-o", "--output", metavar="DIR", help="Folder for the table, page and figures.", callback=o.local),
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
    from moediag.results import trend as results
    from moediag.results.load import shell_command

    numbers = _numbers(steps)
    given = results.Given(lr, None if restarts is None else frozenset(_numbers(restarts) or ()))
    runs = _side_by_side(targets, steps)
    paths = [path for _, path in map(_named, targets)]
    request = None if output is None else results.trend_request(paths, numbers, fit, output, given)
    if request is not None and runs:
        request["names"] = list(runs)
    named = {"--steps": steps, "--fit": fit, "--lr": lr, "--restarts": restarts, "--tokens": tokens}
    options = [word for name, value in named.items() if value is not None for word in (name, value)]
    again = [shell_command("trend", *targets, *options, "-o", output)]
    if output is not None and request is not None:
        refuse_other(output, results.RUNS_KIND if runs else results.KIND, request, force)
    of_dump = Options(tokens=tokens, trust_pickle=trust_pickle)
    written: list[Path] = []
    with bar("trend") as progress:
        if runs:
            trends = results.measure_trends(runs, fit, progress.show, of_dump, given)
            summary: dict[str, Any] = {label: trend.summary() for label, trend in trends.items()}
            lines = results.trends_lines(trends)
        else:
            trend = results.measure_trend(paths, numbers, fit, progress.show, of_dump, given)
            trends, summary, lines = {"": trend}, trend.summary(), results.outcome_lines(trend)
        if output is not None and request is not None:
            how = (output, request, force, pdf, again)
            written = results.write_trends(trends, *how) if runs else results.write_trend(trend, *how)
    if as_json:
        say_json(summary)
    else:
        for line in lines:
            say(line)
        for path in written:
            wrote(path)
    if strict:
        o.refuse_errors([found for trend in trends.values() for found in trend.findings])


def _side_by_side(targets: list[Path], steps: str | None) -> dict[str, Path]:
    """Name -> path of trainings to show side by side; none where the arguments are one series.

    Raises:
        DumpError: some have a name and others not, a name twice, or --steps, which is for the runs of one series.
    """
    from moediag.errors import DumpError
    from moediag.importers.tables import KINDS
    from moediag.results.compare import run_labels
    from moediag.run.series import is_series
    from moediag.watch import STEPS

    names, paths = zip(*map(_named, targets), strict=True)
    each_is_whole = all(path.suffix in KINDS or (path / STEPS).is_file() or is_series(path) for path in paths)
    if not any(names) and (len(targets) == 1 or not each_is_whole):
        return {}
    if any(names) and (not all(names) or len(set(names)) < len(names)):
        raise DumpError(f"expected NAME=PATH for every training, each name once; found {', '.join(map(str, targets))}")
    if steps is not None:
        raise DumpError(f"--steps numbers the runs of one series, found {len(targets)} trainings, which know theirs")
    return dict(zip(names if any(names) else run_labels(paths), paths, strict=True))


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
