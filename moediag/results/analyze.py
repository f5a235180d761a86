"""Analysis of a run: every pair's frames, then the sealed summary.json that names them."""

from __future__ import annotations

from typing import Any, Final

import pandas as pd

from moediag.analysis.flips.explained import flip_headlines, predict_flips
from moediag.analysis.floors import variants
from moediag.analysis.vocabulary import exact_divergences
from moediag.diagnosis import first_layers, ladder, layers_apart, remedies, same_function, whose
from moediag.diagnosis.function import float32_arms
from moediag.diagnosis.modules import kept_checks
from moediag.diagnosis.recorded import explain_recorded
from moediag.errors import RunError
from moediag.folder import SUMMARY, made_together, refuse_read_only, write_frames
from moediag.hygiene import check_run
from moediag.notation import INFER, REFERENCE, TRAIN
from moediag.results.pair_analysis import analyze_pair
from moediag.results.summary import Found, summarize
from moediag.run.derived import ANALYSIS
from moediag.run.files import read_sealed, write_sealed
from moediag.run.reader import Run

_OWN_SIDE_ONLY: Final = ("repeat", "path", "observation", "perturbation", "batching")
"""Changes that compare an engine with itself: a pair of such an arm with the other side would add nothing."""


def analyze_run(run: Run, force: bool = False, no_text: bool = False) -> dict[str, Any]:
    """Analyse the main pair, further complete arms against infer, and each engine against itself; return the summary.

    The main pair is train and the arm that sampled the tokens: infer~train, or infer-production~train. What a run lacks
    is left out, with the reason in the summary.

    Only the arms analysed are validated: a further arm that is half captured is left for later, it does not
    keep infer~train from being read.

    Args:
        force: analyse also when validation finds errors.
        no_text: leave token ids out of the frames, and have pages made from them hold no text.

    Raises:
        IncompleteRunError: an arm or shard is missing.
        RunError: validation found errors, or the run is read-only.
    """
    refuse_read_only(run.path)
    minuend, subtrahend = run.main_arms
    train, infer = run.reference(TRAIN), run.reference(INFER)
    arms = list(dict.fromkeys([infer, train, minuend, subtrahend, *filter(run.is_complete, run.arms())]))
    main = run.pair(minuend, subtrahend)
    own = variants(run, arms)
    pairs = {main.name: main}
    float32 = float32_arms(run, arms)
    both = [float32] if float32 is not None else []
    for names in [(train, infer), *both, *_across(run, arms, train, infer), *((one.of, one.arm) for one in own)]:
        pair = run.pair(*names)
        pairs.setdefault(pair.name, pair)
    findings = check_run(run, arms=arms)
    errors = [finding for finding in findings if finding.level == "error"]
    if errors and not force:
        raise RunError(
            f"{run.path} has {len(errors)} validation errors, first: {errors[0].line()}; see moediag validate "
            f"{run.path}"
        )
    analyses = [analyze_pair(pair) for pair in pairs.values()]
    frames = {analysis.pair_name: _shared(analysis.frames(), no_text) for analysis in analyses}
    predictions = predict_flips(run)
    frames[main.name] |= predictions
    exact, observed = exact_divergences(run), run.pair_name(train, infer)
    if exact is not None:  # whole distributions are kept of the observed arms only
        frames[observed] |= exact.frames()
    provenance = {"validation_errors": len(errors), "no_text": no_text}
    modules = kept_checks(run)
    function, layers = same_function(run, arms), layers_apart(run, arms)
    third = whose(run, arms, function)
    cut = first_layers(run) if function is None else None
    found = Found(function, modules, explain_recorded(run, arms), layers, findings, third, cut)
    summary = summarize(run, analyses, own, found, provenance)
    tokens = {analysis.pair_name: analysis.tokens for analysis in analyses}
    frames[main.name] |= {
        "ladder": ladder(run, summary["pairs"], summary),
        "remedies": remedies(run, tokens, summary["pairs"], observed),
        **({"layers_apart": layers.frame} if layers is not None else {}),
        **({"module_checks": modules.frame} if modules is not None else {}),
    }
    with made_together(run.path, ANALYSIS) as made:
        digests = {pair: write_frames(made / ANALYSIS / pair, some) for pair, some in frames.items()}
        summary |= {"predicted_flips": flip_headlines(predictions)}
        summary["provenance"] |= {"frames": digests}
        if exact is not None:
            summary["pairs"][observed]["logp"] |= exact.summary()
        write_sealed(made / SUMMARY, summary)
    return read_sealed(run.path / SUMMARY)


def _across(run: Run, arms: list[str], train: str, infer: str) -> list[tuple[str, str]]:
    """Further pairs with the other side: other precisions, forced routes, other weights, another engine."""
    across = []
    for arm in arms:
        record = run.arm(arm)
        is_prefilled = record.role == INFER and record.change == "path"  # the model's part without decoding's
        is_third = record.role == REFERENCE  # held against both engines' float32, sequence by sequence
        if arm in (train, infer) or is_third or (record.change in _OWN_SIDE_ONLY and not is_prefilled):
            continue
        across.append((train, arm) if record.role == INFER else (arm, infer))
    ours = [run.arm(arm) for arm in arms if run.arm(arm).change == "engine"]  # beside what another tool recorded
    across += [(one.name, other.name) for one in ours if one.role == TRAIN for other in ours if other.role == INFER]
    return across


def _shared(frames: dict[str, pd.DataFrame], no_text: bool) -> dict[str, pd.DataFrame]:
    """The frames as they may be passed on: without text every token id is -1."""
    if not no_text:
        return frames
    return {name: frame.assign(token_id=-1) if "token_id" in frame else frame for name, frame in frames.items()}
