"""From captured arms to results on disk: frames, summary.json, figures, report.md; no engine needed.

Everything here is derived: it can be deleted and made again from the arms. A report is made only from an
analysis of the arms as they are now.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

import moediag.analysis  # noqa: F401 - declares the frames
from moediag.analysis.summary import PairAnalysis, analyze_pair, pair_summary
from moediag.errors import CorruptRunError, IncompleteRunError, RunError
from moediag.figures import draw_comparison_figures, draw_run_figures
from moediag.frames import declared_frames
from moediag.notation import INFER, SCHEMA_VERSION, TRAIN, pair_name
from moediag.report import comparison_report, run_report
from moediag.run.check import check_run
from moediag.run.directory import Run, check_schema_version, open_run
from moediag.run.files import canonical_json, digest_of, write_atomic

MAIN_PAIR = pair_name(TRAIN, INFER)
_RATIO_METRICS = ("abs_logp_diff.mean", "abs_logp_diff.p99", "abs_logp_diff.max", "kl_infer_train_k3")


def analyze_run(run: Run, force: bool = False) -> dict[str, Any]:
    """Analyse infer~train and infer~every further complete arm; write frames and summary.json, return the summary.

    Args:
        force: analyse also when validation finds errors.

    Raises:
        IncompleteRunError: an arm or shard is missing.
        RunError: validation found errors.
    """
    pairs = [run.pair(TRAIN, INFER), *(run.pair(arm, INFER) for arm in _further_arms(run))]
    errors = [finding for finding in check_run(run) if finding.level == "error"]
    if errors and not force:
        raise RunError(
            f"{run.path} has {len(errors)} validation errors, first: {errors[0].line()}; "
            f"see moediag validate {run.path}"
        )
    analyses = [analyze_pair(pair) for pair in pairs]
    for analysis in analyses:
        _write_frames(run.path / "analysis" / analysis.pair_name, analysis)
    summary = summarize(run, analyses)
    write_atomic(run.path / "summary.json", canonical_json(summary).encode())
    return summary


def summarize(run: Run, analyses: Sequence[PairAnalysis]) -> dict[str, Any]:
    """The content of summary.json."""
    model, routing = run.model, run.model["routing"] or {}
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "path": model["name"],
            **{key: model[key] for key in ("revision", "architecture", "model_type", "n_decoder_layers")},
            "n_moe_layers": len(run.decoder_layers),
            "n_experts": run.n_experts,
            "top_k": int(routing.get("top_k", 0)),
            "decoder_layers": list(run.decoder_layers),
        },
        "n_prompts": run.manifest["prompts"]["n"],
        "sampling": {**run.manifest["sampling"], "given_completions": run.manifest["completions"]},
        "arms": {arm: _arm_facts(run, arm) for arm in run.arms()},
        "provenance": {
            "moediag_version": run.manifest["moediag_version"],
            "configuration": run.configuration,
            "prompts": run.manifest["prompts"],
            "captures": _captures_digest(run),
        },
        "pairs": {analysis.pair_name: pair_summary(analysis) for analysis in analyses},
    }


def load_summary(run: Run) -> dict[str, Any]:
    """summary.json of the arms as they are now.

    Raises:
        IncompleteRunError: never analysed, or the arms have changed since.
        CorruptRunError: unreadable.
    """
    path = run.path / "summary.json"
    if not path.exists():
        raise IncompleteRunError(f"{run.path} has not been analysed; run: moediag analyze {run.path}")
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
        captures = summary["provenance"]["captures"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptRunError(f"{path} is not readable ({error}); run: moediag analyze {run.path}") from None
    check_schema_version(summary, path)
    if captures != _captures_digest(run):
        raise IncompleteRunError(
            f"{run.path}: its arms have changed since the analysis; run: moediag analyze {run.path}"
        )
    return summary


def load_frames(run: Run) -> dict[str, pd.DataFrame]:
    """The frames of the pair infer~train, checked against their declarations.

    Raises:
        CorruptRunError: a frame is unreadable.
    """
    folder = run.path / "analysis" / MAIN_PAIR
    frames = {}
    for spec in declared_frames():
        path = folder / f"{spec.name}.parquet"
        if path.exists():
            try:
                frames[spec.name] = spec.validate(pd.read_parquet(path))
            except (OSError, ValueError) as error:
                raise CorruptRunError(f"{path} is not readable ({error}); run: moediag analyze {run.path}") from None
    return frames


def report_run(run: Run, training_window: int | None = None) -> Path:
    """Draw the figures and write report.md; returns the report's path.

    Args:
        training_window: length the model was trained on [tokens], marked in the drift figure.
    """
    summary, frames = load_summary(run), load_frames(run)
    figures = draw_run_figures(
        frames,
        run.path / "figures",
        _label(run),
        training_window=training_window,
        prompt_length=_longest_prompt(run),
    )
    report = run.path / "report.md"
    commands = (f"moediag analyze {run.path.name}", f"moediag report {run.path.name}")
    write_atomic(report, run_report(summary, frames, figures, regenerate=commands).encode())
    return report


def compare_runs(paths: Sequence[Path], output: Path, training_window: int | None = None) -> dict[str, Any]:
    """Compare analysed runs side by side; writes summary.json, figures and report.md under ``output``.

    Raises:
        RunError: fewer than two runs, two of one name, or ``output`` holds something else.
    """
    runs = {_label(run): run for run in map(open_run, paths)}
    if len(runs) < 2 or len(runs) != len(paths):
        raise RunError(f"compare wants two or more runs with different folder names, found {[str(p) for p in paths]}")
    _refuse_foreign_output(output)
    summaries = {label: load_summary(run) for label, run in runs.items()}
    frames = {label: load_frames(run) for label, run in runs.items()}
    prompts = {run.manifest["prompts"]["source_sha256"] for run in runs.values()}
    summary = {
        "schema_version": SCHEMA_VERSION,
        "kind": "moediag comparison",
        "same_prompts": len(prompts) == 1,
        "runs": summaries,
        "ratios": _ratios(summaries),
    }
    figures = draw_comparison_figures(
        frames,
        output / "figures",
        training_window=training_window,
        prompt_length=max(_longest_prompt(run) for run in runs.values()),
    )
    commands = (f"moediag compare {' '.join(path.name for path in paths)} -o {output.name}",)
    write_atomic(output / "summary.json", canonical_json(summary).encode())
    write_atomic(output / "report.md", comparison_report(summary, frames, figures, regenerate=commands).encode())
    return summary


def _further_arms(run: Run) -> list[str]:
    """Complete arms beside infer and train, each compared with infer."""
    return [arm for arm in run.arms() if arm not in (INFER, TRAIN) and run.is_complete(arm)]


def _write_frames(folder: Path, analysis: PairAnalysis) -> None:
    for name, frame in analysis.frames().items():
        sink = io.BytesIO()
        frame.to_parquet(sink, index=False)
        write_atomic(folder / f"{name}.parquet", sink.getvalue())


def _arm_facts(run: Run, arm: str) -> dict[str, Any]:
    record = run.arm(arm)
    return {key: record.get(key) for key in ("engine", "versions", "path", "dtype", "loaded", "seeding", "environment")}


def _captures_digest(run: Run) -> dict[str, str]:
    return {
        arm: digest_of([run.capture_sidecar(arm, shard)["data_sha256"] for shard in run.shards])
        for arm in run.arms()
        if run.is_complete(arm)
    }


def _label(run: Run) -> str:
    return run.path.resolve().name


def _longest_prompt(run: Run) -> int:
    data = pq.read_table(io.BytesIO(run.prompts()), columns=["prompt_token_ids"]).to_pydict()
    return max(len(ids) for ids in data["prompt_token_ids"])


def _ratios(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """First MoE run over first dense run, metric by metric; empty without one of each."""
    pairs = {label: summary["pairs"][MAIN_PAIR] for label, summary in summaries.items()}
    moe = next((label for label, pair in pairs.items() if pair["routing"]), None)
    dense = next((label for label, pair in pairs.items() if not pair["routing"]), None)
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
    if not output.exists():
        return
    try:
        kind = json.loads((output / "summary.json").read_text()).get("kind")
    except (OSError, ValueError, AttributeError):
        kind = None
    if not output.is_dir() or (any(output.iterdir()) and kind != "moediag comparison"):
        raise RunError(f"{output} holds something that is not a comparison; give -o another folder")
