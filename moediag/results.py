"""From captured arms to results on disk: frames, summary.json, figures, report.md; no engine needed.

Invariants:
    - everything here is derived: it can be deleted and made again from the arms;
    - summary.json is sealed and holds the digest of every frame, so a report or a comparison is made only from
      what ``analyze`` wrote, and only while the arms are those that it saw;
    - a comparison's summary.json is written before anything else in its folder: it marks the folder as one that
      the same command may fill again.
"""

from __future__ import annotations

import io
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import moediag.analysis  # noqa: F401 - declares the frames
from moediag.analysis.floors import NOISE_ARMS, floors, own_side_pairs, verdict
from moediag.analysis.intervals import cluster_sums, ratio_mean_interval
from moediag.analysis.prediction import predict_flips
from moediag.analysis.summary import PairAnalysis, analyze_pair, pair_summary
from moediag.analysis.tokens import logp_diff
from moediag.errors import CorruptRunError, IncompleteRunError, RunError
from moediag.figures import draw_comparison_figures, draw_run_figures, first_of_each_kind
from moediag.figures.floors import summary_floors
from moediag.frames import declared_frames
from moediag.hygiene import check_run
from moediag.notation import INFER, PREFILLED, SCHEMA_VERSION, TRAIN
from moediag.report import (
    MAIN_PAIR,
    REPLAY_PAIR,
    comparison_page,
    html_page,
    markdown_page,
    run_page,
    token_texts,
)
from moediag.report.blocks import Page
from moediag.run import environment
from moediag.run.derived import begin_report, seal_report
from moediag.run.directory import Run, check_schema_version, open_run
from moediag.run.files import (
    digest_of,
    read_checked,
    read_sealed,
    sha256_bytes,
    write_atomic,
    write_error,
    write_sealed,
)

COMPARISON = "moediag comparison"
_RATIO_METRICS = ("abs_logp_diff.mean", "abs_logp_diff.p99", "abs_logp_diff.max", "kl_infer_train_k3")


def analyze_run(run: Run, force: bool = False) -> dict[str, Any]:
    """Analyse infer~train, further complete arms against infer, and each engine against itself; return the summary.

    Only the arms analysed are validated: a further arm that is half captured is left for later, it does not
    keep infer~train from being read.

    Args:
        force: analyse also when validation finds errors.

    Raises:
        IncompleteRunError: an arm or shard is missing.
        RunError: validation found errors.
    """
    arms = [INFER, TRAIN, *_further_arms(run)]
    pairs = [run.pair(*names) for names in _pairs_to_analyse(arms)]
    errors = [finding for finding in check_run(run, arms=arms) if finding.level == "error"]
    if errors and not force:
        raise RunError(
            f"{run.path} has {len(errors)} validation errors, first: {errors[0].line()}; "
            f"see moediag validate {run.path}"
        )
    analyses = [analyze_pair(pair) for pair in pairs]
    frames = {
        analysis.pair_name: _write_frames(_frames_folder(run, analysis.pair_name), analysis.frames())
        for analysis in analyses
    }
    frames[MAIN_PAIR] |= _write_frames(_frames_folder(run, MAIN_PAIR), predict_flips(run))
    provenance = {"frames": frames, "validation_errors": len(errors)}
    write_sealed(run.path / "summary.json", summarize(run, analyses, provenance))
    return read_sealed(run.path / "summary.json")


def summarize(run: Run, analyses: Sequence[PairAnalysis], provenance: dict[str, Any]) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        provenance: what the analysis adds: digests of its frames, number of validation errors overridden.
    """
    model, routing = run.model, run.model["routing"] or {}
    pairs = {analysis.pair_name: pair_summary(analysis) for analysis in analyses}
    floor = floors(pairs, is_prefilled=run.arm(INFER).get("path") == PREFILLED)
    replay = _replay_summary(analyses)
    analysed = {arm for analysis in analyses for arm in (analysis.minuend, analysis.subtrahend)}
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
        "arms": {arm: _arm_facts(run, arm) for arm in run.arms() if arm in analysed},
        "provenance": {
            "moediag_version": run.manifest["moediag_version"],
            "configuration": run.configuration,
            "prompts": run.manifest["prompts"],
            "captures": _captures_digest(run),
            **provenance,
        },
        "verdict": verdict(pairs[MAIN_PAIR], floor, provenance["validation_errors"], replay),
        "pairs": pairs,
        "floors": floor,
        "routing_replay": replay,
    }


def load_summary(run: Run) -> dict[str, Any]:
    """summary.json as ``analyze`` wrote it, of the arms as they are now.

    Raises:
        IncompleteRunError: never analysed, or the arms have changed since.
        CorruptRunError: not what ``analyze`` wrote.
    """
    path = run.path / "summary.json"
    if not path.exists():
        raise IncompleteRunError(f"{run.path} has not been analysed; {_analyze_again(run)}")
    try:
        summary = read_sealed(path)
        check_schema_version(summary, path)
        captures, _, _ = summary["provenance"]["captures"], summary["pairs"][MAIN_PAIR], _frame_digests(summary)
    except (CorruptRunError, KeyError, TypeError, AttributeError):
        raise CorruptRunError(
            f"{path} is not what this moediag writes (damaged, edited, or of another version); {_analyze_again(run)}"
        ) from None
    if captures != _captures_digest(run):
        raise IncompleteRunError(f"{run.path}: its arms have changed since the analysis; {_analyze_again(run)}")
    return summary


def load_frames(run: Run) -> dict[str, pd.DataFrame]:
    """The frames of the pair infer~train that summary.json names, checked against digest and declaration.

    Raises:
        IncompleteRunError: never analysed, the arms have changed since, or a frame is missing.
        CorruptRunError: a frame is not the one that was written.
    """
    return _read_frames(run, load_summary(run))


def report_run(
    run: Run, training_window: int | None = None, tokenizer: Path | None = None, no_text: bool = False
) -> Path:
    """Draw the figures and write report.md and report.html; returns the path of report.md.

    Args:
        training_window: length the model was trained on [tokens], marked in the drift figure.
        tokenizer: ``tokenizer.json`` or its folder, to show tokens as text; None = the checkpoint's, if at hand.
        no_text: keep tokens and the text around them out of the pages.
    """
    summary = load_summary(run)
    frames = _read_frames(run, summary)
    begin_report(run.path)
    figures = draw_run_figures(
        frames,
        run.path / "figures",
        _label(run),
        training_window=training_window,
        prompt_length=_longest_prompt(run),
        floors=summary_floors(summary["floors"]),
    )
    force = ["--force"] if summary["provenance"]["validation_errors"] else []
    commands = (
        _command("analyze", run.path, *force),
        _command("report", run.path, *_window_option(training_window), *_text_options(tokenizer, no_text)),
    )
    texts = token_texts(run, frames.get("worst_tokens"), tokenizer, no_text)
    pages = _write_pages(run.path, run_page(summary, frames, figures, regenerate=commands, texts=texts))
    seal_report(run.path, [*figures, *pages])
    return pages[0]


def compare_runs(paths: Sequence[Path], output: Path, training_window: int | None = None) -> dict[str, Any]:
    """Compare analysed runs side by side; writes summary.json, figures and both pages under ``output``.

    Raises:
        RunError: fewer than two runs, two of one name, or ``output`` holds something else.
    """
    runs = {_label(run): run for run in map(open_run, paths)}
    if len(runs) < 2 or len(runs) != len(paths):
        raise RunError(f"compare wants two or more runs with different folder names, found {[str(p) for p in paths]}")
    _refuse_foreign_output(output)
    summaries = {label: load_summary(run) for label, run in runs.items()}
    frames = {label: _read_frames(run, summaries[label]) for label, run in runs.items()}
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
        prompt_length=max(_longest_prompt(run) for run in runs.values()),
        floors={label: summary_floors(one["floors"]) for label, one in summaries.items()},
    )
    command = _command("compare", *paths, "-o", output, *_window_option(training_window))
    first, *others = runs
    environments = {f"A = {first}, B = {b}": environment.compare_runs(runs[first], runs[b]) for b in others}
    _write_pages(output, comparison_page(summary, frames, figures, regenerate=(command,), environments=environments))
    return {**read_sealed(output / "summary.json"), "runs": summaries}  # in the order asked for: JSON sorts by label


def _pairs_to_analyse(arms: list[str]) -> list[tuple[str, str]]:
    """infer~train first; then what changes the train side against infer, then each engine against itself."""
    own = own_side_pairs(arms)
    floor_only = {arm for _, arm in own if arm not in NOISE_ARMS or arm == "train-perturbed"}
    return [*((arm, INFER) for arm in arms[1:] if arm not in floor_only), *own]


def _further_arms(run: Run) -> list[str]:
    """Complete arms beside infer and train."""
    return [arm for arm in run.arms() if arm not in (INFER, TRAIN) and run.is_complete(arm)]


def _frames_folder(run: Run, pair: str) -> Path:
    return run.path / "analysis" / pair


def _write_frames(folder: Path, frames: dict[str, pd.DataFrame]) -> dict[str, str]:
    """Write every frame; returns name -> sha256 of its file."""
    digests = {}
    for name, frame in frames.items():
        sink = io.BytesIO()
        frame.to_parquet(sink, index=False)
        write_atomic(folder / f"{name}.parquet", sink.getvalue())
        digests[name] = sha256_bytes(sink.getvalue())
    return digests


def _frame_digests(summary: dict[str, Any]) -> dict[str, str]:
    return dict(summary["provenance"]["frames"][MAIN_PAIR])


def _read_frames(run: Run, summary: dict[str, Any]) -> dict[str, pd.DataFrame]:
    specs = {spec.name: spec for spec in declared_frames()}
    frames = {}
    for name, digest in _frame_digests(summary).items():
        path = _frames_folder(run, MAIN_PAIR) / f"{name}.parquet"
        if not path.exists():
            raise IncompleteRunError(f"{path} is missing; {_analyze_again(run)}")
        try:
            frames[name] = specs[name].validate(pd.read_parquet(io.BytesIO(read_checked(path, digest))))
        except (KeyError, OSError, ValueError):
            raise CorruptRunError(
                f"{path} is not the frame that the analysis wrote (damaged, edited, or of another version); "
                f"{_analyze_again(run)}"
            ) from None
    return frames


def _analyze_again(run: Run) -> str:
    return f"run: {_command('analyze', run.path)}"


def _command(*words: object) -> str:
    """A moediag command as a shell takes it, paths as the user gave them."""
    return " ".join(["moediag", *(shlex.quote(str(word)) for word in words)])


def _write_pages(folder: Path, page: Page) -> list[Path]:
    """report.md, then report.html: the same page twice."""
    paths = [folder / "report.md", folder / "report.html"]
    for path, render in zip(paths, (markdown_page, html_page), strict=True):
        write_atomic(path, render(page).encode())
    return paths


def _text_options(tokenizer: Path | None, no_text: bool) -> list[object]:
    return [*(["--tokenizer", tokenizer] if tokenizer else []), *(["--no-text"] if no_text else [])]


def _window_option(training_window: int | None) -> list[object]:
    return [] if training_window is None else ["--training-window", training_window]


def _arm_facts(run: Run, arm: str) -> dict[str, Any]:
    record = run.arm(arm)
    keys = ("engine", "versions", "path", "dtype", "loaded", "seeding", "environment", "replay")
    # vLLM's router dtypes are known only once a step has run: they stand beside the first shard
    dtypes = record.get("router_dtypes") or run.capture_sidecar(arm, run.shards[0]).get("router_dtypes")
    return {**{key: record.get(key) for key in keys}, "router_dtypes": dtypes}


def _captures_digest(run: Run) -> dict[str, str]:
    return {
        arm: digest_of([run.capture_sidecar(arm, shard)["data_sha256"] for shard in run.shards])
        for arm in run.arms()
        if run.is_complete(arm)
    }


def _replay_summary(analyses: Sequence[PairAnalysis]) -> dict[str, Any] | None:
    """Share of the mean abs logp diff that forcing infer's experts removes (R9); None without a replay arm.

    The two means are of the same tokens, so their ratio is resampled as one statistic, by prompt. Tokens that
    one of the pairs did not score are left out of both means.
    """
    tokens = {analysis.pair_name: analysis.tokens for analysis in analyses}
    if REPLAY_PAIR not in tokens:
        return None
    diff_T, replay_diff_T = (np.abs(logp_diff(tokens[pair])) for pair in (MAIN_PAIR, REPLAY_PAIR))
    is_scored_T = np.isfinite(diff_T) & np.isfinite(replay_diff_T)
    prompt_T = tokens[MAIN_PAIR]["prompt_id"].to_numpy()[is_scored_T]
    with_C, without_C = (cluster_sums(values_T[is_scored_T], prompt_T) for values_T in (replay_diff_T, diff_T))
    kept = ratio_mean_interval(with_C, without_C, kind="positive").one()
    bounds = [1 - kept.high, 1 - kept.low]
    return {
        "removed_share": 1 - kept.value if math.isfinite(kept.value) else None,
        "removed_share_ci": bounds if all(map(math.isfinite, bounds)) else None,
        "n_tokens": int(is_scored_T.sum()),
        "n_prompts": len(np.unique(prompt_T)),
        "note": kept.note,
    }


def _label(run: Run) -> str:
    return run.path.resolve().name


def _longest_prompt(run: Run) -> int:
    prompts, _ = run.prompt_tokens()
    return max(map(len, prompts))


def _ratios(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """First MoE run over first dense run, metric by metric; empty without one of each."""
    pairs = {label: summary["pairs"][MAIN_PAIR] for label, summary in summaries.items()}
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
