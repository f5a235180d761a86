"""Analysed runs side by side: summary.json, figures and both pages in a folder of their own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
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
from moediag.results.report import longest_prompt, pdf_option, window_option, write_pages
from moediag.run import environment
from moediag.run.files import digest_of, read_sealed, write_sealed
from moediag.run.reader import open_run
from moediag.run.store import known_as

COMPARISON = "moediag comparison"
_RATIO_METRICS = ("abs_logp_diff.mean", "abs_logp_diff.p99", "abs_logp_diff.max", "kl_infer_train_k3")


def run_labels(paths: Sequence[Path], given: Sequence[str] = ()) -> list[str]:
    """What the runs of a comparison are called: as given, else by their folders, else by what differs in their paths.

    Args:
        given: a label for each run, in their order; empty = none.

    Raises:
        RunError: fewer than two runs, one of them twice, or labels that are not one for each, or not distinct.

    Example:
        >>> run_labels([Path("a/moe"), Path("b/moe")]), run_labels([Path("x/moe"), Path("x/dense")])
        (['a', 'b'], ['moe', 'dense'])
    """
    real = [path.resolve() for path in paths]
    if len(set(real)) < max(2, len(real)):
        raise RunError(f"compare takes two or more runs, each once; found {', '.join(map(str, paths)) or 'none'}")
    if given:
        if len(given) != len(paths) or len(set(given)) < len(given) or not all(label.strip() for label in given):
            raise RunError(
                f"--label takes a different name for each of the {len(paths)} runs, in their order; found "
                f"{', '.join(given)}"
            )
        return list(given)
    parts = [path.parts for path in real]
    n_before = next(n for n, some in enumerate(zip_longest(*parts)) if len(set(some)) > 1)
    n_after = next(n for n, some in enumerate(zip_longest(*map(reversed, parts))) if len(set(some)) > 1)
    between = ["/".join(one[n_before : len(one) - n_after]) for one in parts]
    choices = ([path.name for path in real], between, list(map(str, real)))
    return next(labels for labels in choices if all(labels) and len(set(labels)) == len(labels))


def compare_runs(
    paths: Sequence[Path],
    output: Path,
    training_window: int | None = None,
    force: bool = False,
    pdf: bool = False,
    labels: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare analysed runs side by side; writes summary.json, figures and both pages under ``output``.

    Args:
        labels: what the runs are called; empty = as :func:`run_labels` calls them.
        force: replace a comparison of other runs.
        pdf: figures as PDF, too.

    Raises:
        RunError: as :func:`run_labels`, or ``output`` holds something else, or a comparison of other runs and not
            ``force``.
    """
    runs = dict(zip(run_labels(paths, labels), map(open_run, paths), strict=True))
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
    named = [word for label in labels for word in ("--label", label)]
    options = [*named, *window_option(training_window), *pdf_option(pdf)]
    command = shell_command("compare", *paths, "-o", output, *options)
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
            folders={label: known_as(run.path) for label, run in runs.items()},
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
