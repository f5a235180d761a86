"""Analysed runs side by side: summary.json, figures and both pages in a folder of their own.

Invariant: summary.json is written before anything else in the folder: it marks the folder as one that the same
command may fill again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moediag.errors import RunError
from moediag.figures import draw_comparison_figures, first_of_each_kind
from moediag.figures.floors import summary_floors
from moediag.notation import SCHEMA_VERSION
from moediag.report import comparison_page, main_pair_name
from moediag.results.load import load_summary, read_frames, shell_command
from moediag.results.report import label_of, longest_prompt, window_option, write_pages
from moediag.run import environment
from moediag.run.directory import open_run
from moediag.run.files import read_sealed, write_error, write_sealed

COMPARISON = "moediag comparison"
_RATIO_METRICS = ("abs_logp_diff.mean", "abs_logp_diff.p99", "abs_logp_diff.max", "kl_infer_train_k3")


def compare_runs(paths: Sequence[Path], output: Path, training_window: int | None = None) -> dict[str, Any]:
    """Compare analysed runs side by side; writes summary.json, figures and both pages under ``output``.

    Raises:
        RunError: fewer than two runs, two of one name, or ``output`` holds something else.
    """
    runs = {label_of(run): run for run in map(open_run, paths)}
    if len(runs) < 2 or len(runs) != len(paths):
        raise RunError(f"compare wants two or more runs with different folder names, found {[str(p) for p in paths]}")
    _refuse_foreign_output(output)
    summaries = {label: load_summary(run) for label, run in runs.items()}
    frames = {label: read_frames(run, summaries[label]) for label, run in runs.items()}
    # One prompts file cut by --limit to two lengths makes two sets of prompts.
    prompts = {(run.manifest["prompts"]["source_sha256"], run.manifest["prompts"]["n"]) for run in runs.values()}
    summary = {
        "schema_version": SCHEMA_VERSION,
        "kind": COMPARISON,
        "same_prompts": len(prompts) == 1,
        "runs": summaries,
        "ratios": _ratios(summaries),
    }
    write_sealed(output / "summary.json", summary)
    figures = draw_comparison_figures(
        frames,
        output / "figures",
        training_window=training_window,
        prompt_length=max(longest_prompt(run) for run in runs.values()),
        floors={label: summary_floors(one["floors"]) for label, one in summaries.items()},
    )
    command = shell_command("compare", *paths, "-o", output, *window_option(training_window))
    first, *others = runs
    environments = {f"A = {first}, B = {b}": environment.compare_runs(runs[first], runs[b]) for b in others}
    write_pages(output, comparison_page(summary, frames, figures, regenerate=(command,), environments=environments))
    return {**read_sealed(output / "summary.json"), "runs": summaries}  # in the order asked for: JSON sorts by label


def _ratios(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """First MoE run over first dense run, metric by metric; empty without one of each."""
    pairs = {label: summary["pairs"][main_pair_name(summary)] for label, summary in summaries.items()}
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
    """A comparison may replace a comparison, never anything else.

    What a kill left of the very first write counts as nothing.
    """
    try:
        if not output.exists():
            return
        is_folder = output.is_dir()
        there = {path.name for path in output.iterdir()} if is_folder else set()
        there -= {path.name for path in output.glob(".summary.json.*.tmp")}
    except OSError as error:
        raise write_error(error, output) from error
    if not is_folder or (there and _kind(output / "summary.json") != COMPARISON):
        raise RunError(f"{output} holds something that is not a comparison; give -o another folder")


def _kind(path: Path) -> Any:
    try:
        return json.loads(path.read_text()).get("kind")
    except (OSError, ValueError, AttributeError):
        return None
