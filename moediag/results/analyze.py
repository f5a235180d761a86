"""Analysis of a run: every pair's frames, then the sealed summary.json that names them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd

from moediag.analysis.floors import NOISE_ARMS, own_side_pairs
from moediag.analysis.pair_analysis import analyze_pair
from moediag.analysis.predicted import predicted_flips
from moediag.analysis.prediction import predict_flips
from moediag.analysis.vocabulary import exact_divergences
from moediag.errors import RunError
from moediag.hygiene import check_run
from moediag.notation import INFER, TRAIN, pair_name
from moediag.report import OBSERVED_PAIR
from moediag.results.load import frames_folder
from moediag.results.summary import summarize
from moediag.run.directory import Run
from moediag.run.files import read_sealed, sha256_bytes, write_atomic, write_sealed


def analyze_run(run: Run, force: bool = False, no_text: bool = False) -> dict[str, Any]:
    """Analyse the main pair, further complete arms against infer, and each engine against itself; return the summary.

    The main pair is train and the arm that sampled the tokens: infer~train, or infer-production~train.

    Only the arms analysed are validated: a further arm that is half captured is left for later, it does not
    keep infer~train from being read.

    Args:
        force: analyse also when validation finds errors.
        no_text: leave token ids out of the frames, and have pages made from them hold no text.

    Raises:
        IncompleteRunError: an arm or shard is missing.
        RunError: validation found errors.
    """
    arms = [INFER, TRAIN, *_further_arms(run)]
    main = run.pair(TRAIN, run.sampler)
    pairs = [main, *(run.pair(*names) for names in _pairs_to_analyse(arms) if pair_name(*names) != main.name)]
    errors = [finding for finding in check_run(run, arms=arms) if finding.level == "error"]
    if errors and not force:
        raise RunError(
            f"{run.path} has {len(errors)} validation errors, first: {errors[0].line()}; "
            f"see moediag validate {run.path}"
        )
    analyses = [analyze_pair(pair) for pair in pairs]
    frames = {
        analysis.pair_name: _write_frames(frames_folder(run, analysis.pair_name), _shared(analysis.frames(), no_text))
        for analysis in analyses
    }
    predictions = predict_flips(run)
    frames[main.name] |= _write_frames(frames_folder(run, main.name), predictions)
    exact = exact_divergences(run)
    if exact is not None:
        # whole distributions are kept of the observed arms only
        frames[OBSERVED_PAIR] |= _write_frames(frames_folder(run, OBSERVED_PAIR), exact.frames())
    provenance = {"frames": frames, "validation_errors": len(errors), "no_text": no_text}
    summary = summarize(run, analyses, provenance) | {"predicted_flips": predicted_flips(predictions)}
    if exact is not None:
        summary["pairs"][OBSERVED_PAIR]["logp"] |= exact.summary()
    write_sealed(run.path / "summary.json", summary)
    return read_sealed(run.path / "summary.json")


def _pairs_to_analyse(arms: list[str]) -> list[tuple[str, str]]:
    """infer~train first; then what changes the train side against infer, then each engine against itself."""
    own = own_side_pairs(arms)
    floor_only = {arm for _, arm in own if arm not in NOISE_ARMS or arm == "train-perturbed"}
    return [*((arm, INFER) for arm in arms[1:] if arm not in floor_only), *own]


def _further_arms(run: Run) -> list[str]:
    """Complete arms beside infer and train."""
    return [arm for arm in run.arms() if arm not in (INFER, TRAIN) and run.is_complete(arm)]


def _write_frames(folder: Path, frames: dict[str, pd.DataFrame]) -> dict[str, str]:
    """Write every frame; returns name -> sha256 of its file."""
    digests = {}
    for name, frame in frames.items():
        sink = io.BytesIO()
        frame.to_parquet(sink, index=False)
        write_atomic(folder / f"{name}.parquet", sink.getvalue())
        digests[name] = sha256_bytes(sink.getvalue())
    return digests


def _shared(frames: dict[str, pd.DataFrame], no_text: bool) -> dict[str, pd.DataFrame]:
    """The frames as they may be passed on: without text, -1 stands for every token id."""
    if not no_text:
        return frames
    return {name: frame.assign(token_id=-1) if "token_id" in frame else frame for name, frame in frames.items()}
