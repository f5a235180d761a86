"""Analysis of a run: every pair's frames, then the sealed summary.json that names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from copy import deepcopy
from typing import Any, Final

import pandas as pd

from moediag.analysis.flips.explained import flip_headlines
from moediag.analysis.floors import variants
from moediag.analysis.vocabulary import exact_divergences
from moediag.diagnosis import first_layers, ladder, layers_apart, remedies, same_function, whose
from moediag.diagnosis.function import float32_arms
from moediag.diagnosis.modules import kept_checks
from moediag.diagnosis.recorded import explain_recorded
from moediag.errors import RunError
from moediag.folder import SUMMARY, made_together, read_frames, refuse_read_only, write_frames
from moediag.hygiene.check import check_prompts
from moediag.hygiene.findings import Finding, by_level
from moediag.hygiene.rules import ERROR
from moediag.notation import INFER, REFERENCE, TRAIN
from moediag.results.load import analyze_again
from moediag.results.parts import (
    Kept,
    Made,
    WrittenTokens,
    check_parts,
    findings_of,
    flip_parts,
    make_parts,
    pair_part,
    shared,
)
from moediag.results.summary import Found, summarize
from moediag.run.derived import ANALYSIS, settle_derived
from moediag.run.files import read_sealed, write_sealed
from moediag.run.pieces import Pool
from moediag.run.reader import Run

_OWN_SIDE_ONLY: Final = ("repeat", "path", "observation", "perturbation", "batching")
"""Changes that compare an engine with itself: a pair of such an arm with the other side would add nothing."""


def analyze_run(
    run: Run,
    force: bool = False,
    no_text: bool = False,
    workers: int | Pool = 1,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> dict[str, Any]:
    """Analyse the main pair, further complete arms against infer, and each engine against itself; return the summary.

    The main pair is train and the arm that sampled the tokens: infer~train, or infer-production~train. What a run lacks
    is left out, with the reason in the summary.

    Only the arms analysed are validated: a further arm that is half captured is left for later, it does not
    keep infer~train from being read. What has not changed since the last analysis is not made again, as records and
    sidecars say; where nothing has, the last summary is returned.

    Args:
        force: analyse also when validation finds errors.
        no_text: leave token ids out of the frames, and have pages made from them hold no text.
        workers: processes that analyse pairs, here or elsewhere; the results do not depend on it.
        on_event: is called with how many steps of the analysis are ``done``, of a ``total`` in a ``unit``; never where
            nothing has changed.

    Raises:
        IncompleteRunError: an arm or shard is missing.
        RunError: validation found errors, or the run is read-only.
    """
    settle_derived(run.path)
    kept = Kept(run, no_text)
    last = kept.summary()
    if last is not None and (force or not last["provenance"]["validation_errors"]):
        return last
    refuse_read_only(run.path)
    minuend, subtrahend = run.main_arms
    train, infer = run.reference(TRAIN), run.reference(INFER)
    arms = list(dict.fromkeys([infer, train, minuend, subtrahend, *filter(run.is_complete, run.arms())]))
    main, observed = run.pair(minuend, subtrahend).name, run.pair_name(train, infer)
    own = variants(run, arms)
    float32 = float32_arms(run, arms)
    both = [float32] if float32 is not None else []
    of_own = [(one.of, one.arm) for one in own]
    every = [(minuend, subtrahend), (train, infer), *both, *_across(run, arms, train, infer), *of_own]
    pairs = {part.name: part for part in (pair_part(run, *names) for names in every)}
    with made_together(run.path, ANALYSIS) as made:
        folder = made / ANALYSIS
        checks = check_parts(run, arms, main)
        # flips take longest to predict: begun before the pairs, nobody waits for them at the end
        parts = [*flip_parts(run, main), *pairs.values()]
        done: dict[str, Made] = {}
        findings: list[Finding] | None = None
        with closing(make_parts(kept, [*checks, *parts], folder, no_text, workers, on_event)) as making:
            for name, one in making:
                done[name] = one
                if findings is None and all(check.name in done for check in checks):
                    findings = _findings(run, [done[check.name] for check in checks], force)
        assert findings is not None
        done = {part.name: done[part.name] for part in (*checks, *parts)}
        digests: dict[str, dict[str, str]] = {}
        for part in parts:
            digests.setdefault(part.pair, {}).update(done[part.name].frames)

        def read(pair: str, *names: str) -> dict[str, pd.DataFrame]:
            return read_frames(folder / pair, {name: digests[pair][name] for name in names}, analyze_again(run))

        def add(pair: str, frames: dict[str, pd.DataFrame]) -> None:
            digests[pair] |= write_frames(folder / pair, shared(frames, no_text))

        summaries = {name: deepcopy(done[name].summary) for name in pairs}
        function, layers = same_function(run, arms), layers_apart(run, arms)
        modules, third = kept_checks(run), whose(run, arms, function)
        cut = first_layers(run) if function is None else None
        found = Found(function, modules, explain_recorded(run, arms), layers, findings, third, cut)
        n_errors = sum(finding.level == ERROR for finding in findings)
        provenance = {"validation_errors": n_errors, "no_text": no_text}
        tokens = WrittenTokens(folder, pairs)
        sequences = read(main, "sequences")["sequences"]
        summary = summarize(run, main, summaries, tokens, sequences, own, found, provenance)
        exact = exact_divergences(run)
        if exact is not None:  # whole distributions are kept of the observed arms only
            add(observed, exact.frames())
        add(main, {"ladder": ladder(run, summaries, summary), "remedies": remedies(run, tokens, summaries, observed)})
        if layers is not None:
            add(main, {"layers_apart": layers.frame})
        if modules is not None:
            add(main, {"module_checks": modules.frame})
        predicted = [name for name in ("explained_flips", "forecast_flips") if name in digests[main]]
        summary |= {"predicted_flips": flip_headlines(read(main, *predicted))}
        summary["provenance"] |= {"frames": digests}
        if exact is not None:
            summary["pairs"][observed]["logp"] |= exact.summary()
        write_sealed(made / SUMMARY, summary)
        kept.write(folder, done, read_sealed(made / SUMMARY)["sha256"])
    return read_sealed(run.path / SUMMARY)


def _findings(run: Run, checks: Sequence[Made], force: bool) -> list[Finding]:
    """What the rules found, errors first.

    Raises:
        RunError: errors, and not ``force``.
    """
    findings = by_level(list(dict.fromkeys([*check_prompts(run), *findings_of(checks)])))
    errors = [finding for finding in findings if finding.level == ERROR]
    if errors and not force:
        raise RunError(
            f"{run.path} has {len(errors)} validation errors, first: {errors[0].line()}; see moediag validate "
            f"{run.path}"
        )
    return findings


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
