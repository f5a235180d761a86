"""``moediag validate``: is everything there, whole and possible, and is nothing silently wrong?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moediag.cli import options as o
from moediag.errors import RunError

if TYPE_CHECKING:
    from moediag.hygiene import Finding, Inspection
    from moediag.run.pieces import Pool

NAME = "validate"

Target = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="RUN|SERIES|FILE...",
        callback=o.there,
        help="Run directory, a series, a table of tokens, a dump with vLLM's own names, or files or folders of a "
        "framework's dump (moediag import --list-formats).",
    ),
]
NumExperts = Annotated[
    int | None, typer.Option("--num-experts", min=1, help="FILE: experts per layer; default: largest id + 1.")
]
ZeroExperts = Annotated[
    int,
    typer.Option("--zero-experts", min=0, help="FILE: experts behind these that compute nothing."),
]
FirstRow = Annotated[
    int, typer.Option("--first-row", min=0, help="FILE: position of the first routing row in its sequence.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Exit code 3 for warnings too.")]
ListRules = Annotated[bool, typer.Option("--list-rules", help="Print the table of rules and exit.")]


def command(
    targets: Target = None,
    num_experts: NumExperts = None,
    zero_experts: ZeroExperts = 0,
    first_row: FirstRow = 0,
    tokens: o.TokensTable = None,
    trust_pickle: o.TrustPickle = False,
    strict: Strict = False,
    list_rules: ListRules = False,
    workers: o.Workers = None,
    ray: o.RayTasks = False,
    ray_address: o.RayAddress = None,
    num_workers: o.NumTasks = None,
    as_json: o.Json = False,
) -> None:
    """Check every file and every row of a run, or a file of another tool; exit code 3 when something is wrong.

    Exit code 1 is kept for what cannot be read.

    A table (.parquet, .csv, .jsonl) has one row per token: seq_id, position, logp_train, logp_infer, as simulate and
    trend read it. A dump (JSON lines or .parquet) has one row per sequence: prompt_token_ids, token_ids, and of
    logprobs, routed_experts ([rows][layers][K]), train_logprobs, train_routed_experts what is there.
    """
    from moediag.cli.console import doing

    if list_rules:
        _show_rules(as_json)
        return
    if not targets:
        raise typer.BadParameter("give a run directory or a file, or --list-rules", param_hint="RUN|SERIES|FILE...")
    cluster = o.cluster_options(ray, 0, address=ray_address, num_workers=num_workers)
    if cluster is not None:
        targets = [target.resolve() for target in targets]  # other nodes start elsewhere
    with o.pool(targets[0], cluster, workers) as pool, doing(f"checking {targets[0]}"):
        inspection = _inspect(
            targets,
            num_experts,
            first_row,
            zero_experts,
            pool,
            tokens=tokens,
            trust_pickle=trust_pickle,
        )
    _show(targets[0], inspection, as_json)
    if inspection.n_errors or (strict and inspection.n_warnings):
        raise typer.Exit(o.NOT_SO)


def _inspect(
    targets: list[Path],
    num_experts: int | None,
    first_row: int,
    n_zero_experts: int,
    workers: int | Pool,
    **of_dump: Any,
) -> Inspection:
    from moediag.hygiene import inspect_run
    from moediag.hygiene.check import inspect_runs
    from moediag.hygiene.foreign import check_file
    from moediag.importers.registry import foreign_format
    from moediag.importers.rollouts import Options
    from moediag.importers.write import imported_for_now, runs_of
    from moediag.run.reader import open_run
    from moediag.run.series import is_series

    is_foreign = foreign_format(targets) is not None
    if not isinstance(workers, int) and (is_foreign or targets[0].is_file()):
        raise RunError(f"--ray with {targets[0]}: a cluster checks runs and series; import it, or leave --ray out")
    if is_foreign:
        options = Options(n_experts=num_experts, n_zero_experts=n_zero_experts, first_row=first_row, **of_dump)
        with imported_for_now(targets, options) as runs:
            return inspect_runs(runs, workers)
    if len(targets) > 1:
        raise typer.BadParameter(f"takes one run, series or table, found {len(targets)}", param_hint="RUN|SERIES|FILE")
    target = targets[0]
    if target.is_file():
        return check_file(target, num_experts, first_row, n_zero_experts)
    if is_series(target):
        return inspect_runs(runs_of(target), workers)
    return inspect_run(open_run(target), workers=workers)


def _show(target: Path, inspection: Inspection, as_json: bool) -> None:
    from moediag.cli.console import say, say_json

    findings = inspection.findings
    if as_json:
        say_json(
            {
                "n_errors": inspection.n_errors,
                "n_rules": inspection.n_rules,
                "n_applied": inspection.n_applied,
                "left_out": inspection.left_out,
                "n_rows": inspection.n_rows,
                "findings": [finding.record() for finding in findings],
            }
        )
        return
    for finding in findings:
        for line in _lines(finding):
            say(line)
    counts = ", ".join(
        f"{sum(finding.level == level for finding in findings)} {level}s" for level in ("error", "warning", "note")
    )
    applied = f"{inspection.n_applied} of {inspection.n_rules} rules applied to {inspection.n_rows:,} token rows"
    without = "; ".join(f"{', '.join(names)} because no {what}" for what, names in inspection.left_out.items())
    say(f"{target}: {counts}; {applied}{f'; left out: {without}' if without else ''}")


def _lines(finding: Finding) -> list[str]:
    """The finding, then where, how often by chance, why and what next."""
    lines = [f"{finding.level}: {finding.rule}: {finding.where}: {finding.message}"]
    if finding.places:
        lines.append(f"    first: {'; '.join(place.text() for place in finding.places)}")
    if finding.base_rate is not None:
        lines.append(f"    by chance: at most {finding.base_rate:.2g}")
    lines.append(f"    likely: {finding.cause}; next: {finding.next_check}")
    return lines


def _show_rules(as_json: bool) -> None:
    from moediag.cli.console import say, say_json
    from moediag.hygiene.rules import RULES

    if as_json:
        say_json([vars(rule) for rule in RULES.values()])
        return
    say("(1e-6) is the chance that a rule fires on a healthy capture, at most.")
    for rule in RULES.values():
        say(f"{rule.name}  [{rule.level}]")
        for what, words in (
            ("", rule.symptom),
            ("measured; limit: ", rule.threshold),
            ("likely: ", rule.cause),
            ("next: ", rule.next_check),
        ):
            say(f"    {what}{words}")
