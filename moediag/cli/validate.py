"""``moediag validate``: is everything there, whole and possible?"""

from __future__ import annotations

from dataclasses import asdict

import typer

from moediag.cli import options as o

NAME = "validate"


def command(run: o.RunPath, as_json: o.Json = False) -> None:
    """Check every file and every row of a run; exit code 1 when something is wrong."""
    from moediag.cli.console import say, say_json
    from moediag.run.check import check_run
    from moediag.run.directory import open_run

    opened = open_run(run)
    findings = check_run(opened)
    n_errors = sum(finding.level == "error" for finding in findings)
    if as_json:
        say_json({"n_errors": n_errors, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            say(finding.line())
        say(f"{run}: {n_errors} errors; arms {', '.join(opened.arms()) or 'none'}, {len(opened.shards)} shards")
    if n_errors:
        raise typer.Exit(1)
