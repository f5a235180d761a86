"""Analysed runs side by side: summary.json, figures and both pages in a folder of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moediag.errors import RunError
from moediag.figures import draw_comparison_figures
from moediag.figures.floors import summary_floors
from moediag.figures.style import first_of_each_kind, formats
from moediag.folder import SUMMARY, refuse_other, result_folder
from moediag.notation import SCHEMA_VERSION
from moediag.report import comparison_page
from moediag.report.measures import lookup
from moediag.results.load import load_summary, main_frames, shell_command
from moediag.results.report import label_of, longest_prompt, pdf_option, window_option, write_pages
from moediag.run import environment
from moediag.run.files import digest_of, read_sealed, write_sealed
from moediag.run.reader import open_run

COMPARISON = "moediag comparison"
_RATIO_METRICS = ("abs_logp_diff.mean", "abs_logp_diff.p99", "abs_logp_diff.max", "kl_infer_train_k3")


def compare_runs(
    paths: Sequence[Path], output: Path, training_window: int | None = None, force: bool = False, pdf: bool = False
) -> dict[str, Any]:
    """Compare analysed runs side by side; writes summary.json, figures and both pages under ``output``.

    Args:
        force: replace a comparison of other runs.
        pdf: figures as PDF, too.

    Raises:
        RunError: fewer than two runs, two of one name, or ``output`` holds something else, or a comparison of other
            runs and not ``force``.
    """
    runs = {label_of(run): run for run in map(open_run, paths)}
    if len(runs) < 2 or len(runs) != len(paths):
        raise RunError(f"compare needs two or more runs with different folder names, found {[str(p) for p in paths]}")
    summaries = {label: load_summary(run) for label, run in runs.items()}
    same = {label: digest_of(summary["provenance"]["configuration"]) for label, summary in summaries.items()}
    request = {"of": ", ".join(sorted(runs)), "runs": same}
    refuse_other(output, COMPARISON, request, force)
    frames = {label: main_frames(run, summaries[label]) for label, run in runs.items()}
    # One prompts file cut by --limit to two lengths makes two sets of prompts.
    prompts = {run.record.prompts and (run.record.prompts.source_sha256, run.record.prompts.n) for run in runs.values()}
    summary = {
        "schema_version": SCHEMA_VERSION,
        "kind": COMPARISON,
        "request": request,
        "same_prompts": len(prompts) == 1 and None not in prompts,
        "runs": summaries,
        "ratios": _ratios(summaries),
    }
    command = shell_command("compare", *paths, "-o", output, *window_option(training_window), *pdf_option(pdf))
    first, *others = runs
    environments = {f"A = {first}, B = {b}": environment.compare_runs(runs[first], runs[b]) for b in others}
    with result_folder(output, COMPARISON, request, force) as folder:
        write_sealed(folder / SUMMARY, summary)
        figures = draw_comparison_figures(
            frames,
            folder / "figures",
            training_window=training_window,
            prompt_length=max(longest_prompt(run) for run in runs.values()),
            floors={label: summary_floors(one["floors"]) for label, one in summaries.items()},
            kinds=formats(pdf),
        )
        page = comparison_page(
            summary, frames, figures, regenerate=(command,), environments=environments,
            folders={label: str(run.path) for label, run in runs.items()},
        )  # fmt: skip
        write_pages(folder, page)
    return {**read_sealed(output / SUMMARY), "runs": summaries}  # in the order given: JSON sorts by label


def _ratios(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """First MoE run over first dense run, metric by metric; empty without one of each."""
    pairs = {label: summary["pairs"][summary["main_pair"]] for label, summary in summaries.items()}
    moe, dense = first_of_each_kind({label: bool(pair["routing"]) for label, pair in pairs.items()})
    if moe is None or dense is None:
        return {}
    ratios = {}
    for metric in _RATIO_METRICS:
        above, below = (lookup(pairs[label]["logp"], metric) for label in (moe, dense))
        ratios[metric] = above / below if above is not None and below else None
    return {"of": f"{moe} over {dense}", **ratios}
