"""``moediag gate``: conditions on an analysed run, for a CI job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moediag.cli import options as o
from moediag.errors import ConditionError

NAME = "gate"

Target = Annotated[Path | None, typer.Argument(metavar="RUN", help="Analysed run directory.", callback=o.there)]
Require = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="CONDITION",
        help="E.g. 'logp.kl_infer_train_k3 < 1e-3', 'logp.abs_logp_diff.mean.high < 3 * rounding_scale', "
        "'no findings', \"verdict in ('same function, rounding only')\", 'not significantly worse'; may be repeated.",
    ),
]
Baseline = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Analysed run that conditions name as baseline.NAME.", callback=o.there),
]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="RULE", help="Findings of this rule do not count; may be repeated."),
]
MaxSkipped = Annotated[
    float, typer.Option(metavar="SHARE", help="Share of response tokens that may be without a log-probability.")
]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write a summary for a CI job.")]
JUnit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML: a test per condition.")]
List = Annotated[bool, typer.Option("--list", help="Print what conditions may name (with RUN: its values) and exit.")]


def command(
    run: Target = None,
    require: Require = None,
    baseline: Baseline = None,
    allow: Allow = None,
    max_skipped: MaxSkipped = 0.0,
    markdown: MarkdownFile = None,
    junit: JUnit = None,
    list_names: List = False,
    as_json: o.Json = False,
) -> None:
    """Hold conditions against a run; exit code 3 when one is not met, with a line for each.

    Error findings and tokens without a log-probability fail every gate unless --allow and --max-skipped say otherwise.
    """
    from moediag.cli.console import note, say, say_json
    from moediag.results.gate import gate_run

    if list_names:
        _list(run, as_json)
        return
    if run is None:
        raise typer.BadParameter("give a run directory, or --list", param_hint="RUN")
    try:
        gate = gate_run(
            run,
            require or [],
            baseline,
            allowed=allow or [],
            max_skipped=max_skipped,
            markdown=markdown,
            junit=junit,
        )
    except ConditionError as error:
        note(f"    {error.text}\n    {' ' * error.at}^")
        raise
    if as_json:
        say_json(gate.record())
    else:
        for outcome in gate.outcomes:
            say(outcome.line)
        say(gate.line)
    if not gate.is_passed:
        raise typer.Exit(o.NOT_SO)


def _list(run: Path | None, as_json: bool) -> None:
    from moediag.cli.console import say, say_json
    from moediag.diagnosis.conditions import BASELINE, PARTS, nameable
    from moediag.numbers import NONE, in_unit
    from moediag.results import load_summary
    from moediag.run.reader import open_run

    summary = None if run is None else load_summary(open_run(run))
    values = {name: None if summary is None else one.value(summary) for name, one in nameable().items()}
    if as_json:
        records = [
            {
                "name": name,
                "unit": one.unit,
                "meaning": one.meaning,
                **({} if summary is None else {"value": values[name]}),
            }
            for name, one in nameable().items()
        ]
        say_json({"names": records, "parts": PARTS})
        return
    width = max(map(len, nameable()))
    for name, one in nameable().items():
        value = "" if summary is None else f"{NONE if values[name] is None else in_unit(values[name], one.unit):>10}  "
        say(f"{name:<{width}}  {value}[{one.unit}] {one.meaning}")
    say()
    for part, meaning in PARTS.items():
        say(f"METRIC.{part:<{width - 7}}  {meaning}")
    say(f"{f'{BASELINE}.NAME':<{width}}  any of these, of the run given as --baseline")
