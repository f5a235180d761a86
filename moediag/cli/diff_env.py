"""``moediag diff-env``: what ran differently in two runs, or in two arms of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moediag.cli import options as o
from moediag.errors import RunError
from moediag.notation import INFER, TRAIN

if TYPE_CHECKING:
    from moediag.run.environment import ArmComparison, Difference

NAME = "diff-env"

_WIDTH = 100
_LONGEST = 110  # characters of a value: more is cut out of its middle
_MARK = "..."

OtherRun = Annotated[
    Path | None, typer.Argument(metavar="[RUN_B]", callback=o.there, help="Run to compare with; none: arms of one run.")
]
Arms = Annotated[
    str | None, typer.Option(metavar="A,B", help="Two arms of one run; default: the reference infer and train arms.")
]
Fail = Annotated[bool, typer.Option("--fail-on-difference", help="Exit code 3 when anything differs.")]


def command(
    run: o.RunPath, other: OtherRun = None, arms: Arms = None, fail_on_difference: Fail = False, as_json: o.Json = False
) -> None:
    """Print which versions, kernels, dtypes, threads and settings differ; numerics first."""
    from moediag.run.environment import DIFFERENT, compare_arms, compare_content, compare_runs
    from moediag.run.reader import open_run

    if other is not None and arms is not None:
        raise typer.BadParameter("--arms compares two arms of one run: give one run, or leave --arms out")
    run_a = open_run(run)
    content: dict[str, str] = {}
    if other is None:
        names = (run_a.reference(INFER), run_a.reference(TRAIN)) if arms is None else _two_arms(arms)
        comparisons = [compare_arms(run_a, *names)]
    else:
        run_b = open_run(other)
        comparisons, content = compare_runs(run_a, run_b), compare_content(run_a, run_b)
    _show(as_json, run, other, content, comparisons)
    differs = DIFFERENT in content.values() or any(c.differences or c.missing_in for c in comparisons)
    if differs and fail_on_difference:
        raise typer.Exit(o.NOT_SO)


def _two_arms(text: str) -> tuple[str, str]:
    names = text.split(",")
    if len(names) != 2 or not all(names):
        raise RunError(f"--arms {text}: expected two names of arms, e.g. --arms infer,train")
    return names[0], names[1]


def _show(
    as_json: bool, run: Path, other: Path | None, content: dict[str, str], comparisons: Sequence[ArmComparison]
) -> None:
    from moediag.cli.console import say, say_json

    if as_json:
        say_json(_record(run, other, content, comparisons))
        return
    if other is not None:
        say(f"A  {run}\nB  {other}\n")
        for name, verdict in content.items():
            say(f"{name:<10} {verdict}")
        say()
    for comparison in comparisons:
        _show_arm(comparison)
    if len(comparisons) > 1:
        n_facts, n_differences = _totals(comparisons)
        say(f"{n_differences} of {n_facts} facts differ" if n_differences else f"identical: {n_facts} facts compared")


def _totals(comparisons: Sequence[ArmComparison]) -> tuple[int, int]:
    return sum(c.n_facts for c in comparisons), sum(len(c.differences) for c in comparisons)


def _record(
    run: Path, other: Path | None, content: dict[str, str], comparisons: Sequence[ArmComparison]
) -> dict[str, Any]:
    from dataclasses import asdict

    n_facts, n_differences = _totals(comparisons)
    return {
        "a": str(run),
        "b": str(other or run),
        "content": content,
        "n_facts": n_facts,
        "n_differences": n_differences,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }


def _show_arm(comparison: ArmComparison) -> None:
    from moediag.cli.console import say, say_table

    what = "what was requested" if comparison.arm == "run" else f"arm {comparison.arm}"
    left_out = f"; {comparison.n_one_sided} that one engine alone has are left out" if comparison.n_one_sided else ""
    if comparison.missing_in:
        say(f"{what}: {comparison.missing_in} has no such arm")
    elif not comparison.differences:
        say(f"{what}: identical ({comparison.n_facts} facts compared{left_out})")
    else:
        say(f"{what}: {len(comparison.differences)} of {comparison.n_facts} facts differ{left_out}")
        say_table(differences_table(comparison.differences))
        say()


def differences_table(differences: Sequence[Difference]) -> str:
    """Section, name, value A, value B; long cells go on in the next line, very long ones are cut."""
    from moediag.cli.table import table_text

    rows = [(d.section, d.name, *excerpts(d.a, d.b, _LONGEST)) for d in differences]
    return table_text(("section", "name", "A", "B"), rows, width=_WIDTH)


def excerpts(a: str, b: str, longest: int) -> tuple[str, str]:
    """Two values short enough to print, and still different: the middle is cut, or all before the difference.

    Example:
        >>> excerpts("x" * 40 + "1", "x" * 40 + "2", 20)
        ('xxxxxxxx...xxxxxxxx1', 'xxxxxxxx...xxxxxxxx2')
    """
    short_a, short_b = _cut(a, longest), _cut(b, longest)
    if short_a != short_b or a == b:
        return short_a, short_b
    # head and tail are the same: show what follows the part that is equal
    n_equal = next((i for i, pair in enumerate(zip(a, b, strict=False)) if len(set(pair)) > 1), min(len(a), len(b)))
    rest = longest - len(_MARK) - 1  # one more character says where a value ended
    return tuple(f"{_MARK}{(text[n_equal:] + '|')[:rest]}" for text in (a, b))  # type: ignore[return-value]


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    head = (longest - len(_MARK)) // 2
    return f"{text[:head]}{_MARK}{text[len(text) - (longest - len(_MARK) - head) :]}"
