"""Analysed runs side by side: summary.json, figures and both pages in a folder of their own.

Invariants:
    - the folder appears whole, in place of a comparison that is there, which stays if anything fails;
    - a comparison of the same runs is replaced, one of other runs only with ``force``, anything else never.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moediag.errors import CorruptRunError, RunError
from moediag.figures import draw_comparison_figures
from moediag.figures.floors import summary_floors
from moediag.figures.style import first_of_each_kind
from moediag.notation import SCHEMA_VERSION
from moediag.report import comparison_page
from moediag.results.load import load_summary, read_frames, shell_command
from moediag.results.report import label_of, longest_prompt, window_option, write_pages
from moediag.run import environment
from moediag.run.files import read_sealed, write_error, write_sealed
from moediag.run.reader import open_run
from moediag.run.replace import made_whole

COMPARISON = "moediag comparison"
_RATIO_METRICS = ("abs_logp_diff.mean", "abs_logp_diff.p99", "abs_logp_diff.max", "kl_infer_train_k3")


def compare_runs(
    paths: Sequence[Path], output: Path, training_window: int | None = None, force: bool = False
) -> dict[str, Any]:
    """Compare analysed runs side by side; writes summary.json, figures and both pages under ``output``.

    Args:
        force: replace a comparison of other runs.

    Raises:
        RunError: fewer than two runs, two of one name, or ``output`` holds something else.
    """
    runs = {label_of(run): run for run in map(open_run, paths)}
    if len(runs) < 2 or len(runs) != len(paths):
        raise RunError(f"compare wants two or more runs with different folder names, found {[str(p) for p in paths]}")
    _refuse_foreign_output(output)
    summaries = {label: load_summary(run) for label, run in runs.items()}
    if not force:
        _refuse_other_runs(output, summaries)
    frames = {label: read_frames(run, summaries[label]) for label, run in runs.items()}
    # One prompts file cut by --limit to two lengths makes two sets of prompts.
    prompts = {run.record.prompts and (run.record.prompts.source_sha256, run.record.prompts.n) for run in runs.values()}
    summary = {
        "schema_version": SCHEMA_VERSION,
        "kind": COMPARISON,
        "same_prompts": len(prompts) == 1 and None not in prompts,
        "runs": summaries,
        "ratios": _ratios(summaries),
    }
    command = shell_command("compare", *paths, "-o", output, *window_option(training_window))
    first, *others = runs
    environments = {f"A = {first}, B = {b}": environment.compare_runs(runs[first], runs[b]) for b in others}
    with made_whole(output) as folder:
        write_sealed(folder / "summary.json", summary)
        figures = draw_comparison_figures(
            frames,
            folder / "figures",
            training_window=training_window,
            prompt_length=max(longest_prompt(run) for run in runs.values()),
            floors={label: summary_floors(one["floors"]) for label, one in summaries.items()},
        )
        write_pages(folder, comparison_page(summary, frames, figures, regenerate=(command,), environments=environments))
    return {**read_sealed(output / "summary.json"), "runs": summaries}  # in the order asked for: JSON sorts by label


def _ratios(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """First MoE run over first dense run, metric by metric; empty without one of each."""
    pairs = {label: summary["pairs"][summary["main_pair"]] for label, summary in summaries.items()}
    moe, dense = first_of_each_kind({label: bool(pair["routing"]) for label, pair in pairs.items()})
    if moe is None or dense is None:
        return {}
    ratios = {}
    for metric in _RATIO_METRICS:
        above, below = (_metric(pairs[label], metric) for label in (moe, dense))
        ratios[metric] = above / below if above is not None and below else None
    return {"of": f"{moe} over {dense}", **ratios}


def _metric(pair: dict[str, Any], dotted: str) -> float | None:
    value: Any = pair["logp"]
    for key in dotted.split("."):
        value = value[key]
    return None if value is None else float(value)


def _refuse_foreign_output(output: Path) -> None:
    """A comparison may replace a comparison, never anything else."""
    try:
        is_empty = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    except OSError as error:
        raise write_error(error, output) from error
    if not is_empty and _kind(output / "summary.json") != COMPARISON:
        raise RunError(f"{output} holds something that is not a comparison; give -o another folder")


def _refuse_other_runs(output: Path, summaries: dict[str, dict[str, Any]]) -> None:
    """The same command may make its comparison again; of other runs it would be lost without a word."""
    if not (output / "summary.json").exists():
        return
    try:
        there = _made_of(read_sealed(output / "summary.json")["runs"])
    except (CorruptRunError, KeyError, TypeError, AttributeError):
        there = {}
    if there != _made_of(summaries):
        raise RunError(
            f"{output} holds a comparison of other runs ({', '.join(there) or 'which cannot be read'}); "
            "give -o another folder, or --force to replace it"
        )


def _made_of(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By label, what makes two runs the same."""
    return {label: summary["provenance"]["configuration"] for label, summary in summaries.items()}


def _kind(path: Path) -> Any:
    try:
        return json.loads(path.read_text()).get("kind")
    except (OSError, ValueError, AttributeError):
        return None
