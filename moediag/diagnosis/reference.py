"""Whose a difference of functions is: each engine in float32 against a third implementation of the same weights.

Two engines that compute different functions cannot tell which of them is right. A third can, to the word that two of
three agree: the publisher's modelling code, or any other implementation. Counted as :mod:`.function` counts, by
sequence, in units of the float32 rounding scale. Weaker, and only where nobody's engine sampled the tokens: of two
functions of a trained model the one that predicts given text better is likelier the trained one.

Invariants:
    - agreement is its own proof of equal weights; only a reference that agrees with neither may be of other weights;
    - a reference keeps no experts, so that its flips are not seen. A sequence that agrees to its end holds none; the
      reference chose there as that engine did, and the other engine is held to that engine, whose experts are known.
      One that agrees with neither counts up to the first choice of the engine's that rounding may turn over: at a
      margin within :data:`~.function.SAME` times what one float32 unit in the last place moves nine of ten margins by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from moediag.diagnosis.function import (
    FEW,
    NEAR_TIE,
    SAME,
    FunctionTest,
    compare_sequences,
    is_differing,
    pooled_mean,
    tested_sequences,
)
from moediag.notation import INFER, REFERENCE, TRAIN
from moediag.numbers import sig
from moediag.run.capture import is_scored
from moediag.run.reader import Run
from moediag.run.recipes import ENGINE_WORDS
from moediag.run.records import Imported
from moediag.statistics.intervals import Interval, mean_interval

_OTHER: Final = {INFER: TRAIN, TRAIN: INFER}


@dataclass(frozen=True)
class Agreement:
    """One engine in float32 against the reference.

    Args:
        arm: the engine's.
        n_sequences, n_agreeing: those that could be counted, and those of them within :data:`~.function.SAME` rounding
            scales.
        n_tokens: such tokens.
        mean: mean abs logp diff over those tokens [nat]; None without one.
    """

    arm: str
    n_sequences: int
    n_agreeing: int
    n_tokens: int
    mean: float | None

    @property
    def is_same(self) -> bool | None:
        """The same function, but for as few sequences as :data:`~.function.FEW` lets pass; None without a sequence."""
        n_differing = self.n_sequences - self.n_agreeing
        return n_differing <= FEW * self.n_sequences if self.n_sequences else None


@dataclass(frozen=True)
class Perplexity:
    """Which engine's float32 predicts given text better.

    Args:
        better: its side; None where the interval holds 0.
        gain: mean logp_train - logp_infer of a token [nat]; above 0 train predicts better; resampled by prompt.
        n_tokens: scored by both.
    """

    better: str | None
    gain: Interval
    n_tokens: int


@dataclass(frozen=True)
class Whose:
    """Whose the difference is, as far as it can be told.

    Args:
        side: the side that is off; None = cannot be told, or there is nothing to tell.
        words: a sentence for the verdict; empty where no third party speaks.
        evidence: lines.
        arm: the reference arm; None = there is none.
        code: the implementation, in words.
        scale: the float32 rounding scale [nat].
    """

    side: str | None = None
    words: str = ""
    evidence: tuple[str, ...] = ()
    arm: str | None = None
    code: str = ""
    scale: float | None = None
    infer: Agreement | None = None
    train: Agreement | None = None
    perplexity: Perplexity | None = None

    def content(self) -> dict[str, Any]:
        """As summary.json holds it."""
        content = asdict(self) | {"evidence": list(self.evidence)}
        if self.perplexity is not None:
            gain = self.perplexity.gain
            is_known = math.isfinite(gain.low) and math.isfinite(gain.high)
            content["perplexity"] |= {
                "gain": {"value": gain.value, "ci": [gain.low, gain.high] if is_known else None, "note": gain.note}
            }
        return content


def whose(
    run: Run, arms: list[str], function: FunctionTest | None, engines: Mapping[str, str] | None = None
) -> Whose | None:
    """Hold a reference arm, and given text, against both float32 arms; None where neither says anything.

    Args:
        arms: complete arms of the run.
        function: what :func:`~.function.same_function` found.
        engines: words for the engine of each side; None = as the arms' records say.
    """
    if function is None:
        return None
    infer, train = function.pair.split("~")
    engines = engines or {side: _engine_words(run, arm) for side, arm in ((INFER, infer), (TRAIN, train))}
    perplexity = _perplexity(run, train, infer) if function.is_same is False else None
    likelier = _likelier_words(perplexity, engines) if perplexity is not None else ()
    third = next((arm for arm in arms if run.arm(arm).role == REFERENCE), None)
    if third is None or not function.scale:
        return None if perplexity is None else Whose(evidence=likelier, perplexity=perplexity)
    arms_of = {INFER: infer, TRAIN: train}
    agreements = _agreements(run, third, arms_of, function)
    side, words = _answer(run, third, agreements, engines, function.is_same)
    line = f"reference arm {third}, {_code(run, third)}, in float32: " + "; ".join(
        f"{_count(one)} agree with {engines[at]} ({sig(one.mean)} nat on average, {one.n_tokens:,} tokens)"
        for at, one in agreements.items()
    )
    line += f"; agreeing is within {SAME:g} rounding scales of {sig(function.scale)} nat"
    return Whose(side, words, (line, *likelier), third, _code(run, third), function.scale, **agreements,
                 perplexity=perplexity)  # fmt: skip


def _agreements(run: Run, third: str, arms: Mapping[str, str], function: FunctionTest) -> dict[str, Agreement]:
    """Both engines against the reference, by side.

    Args:
        arms: the float32 arm of each side.
    """
    assert function.scale is not None
    scale, may_flip = function.scale, _may_flip(run, arms[TRAIN], function.scale_pair or "")
    between = compare_sequences(run, arms[TRAIN], arms[INFER])[0].set_index("seq_id")
    whole, cut = (
        {side: compare_sequences(run, third, arm, limit)[0].set_index("seq_id") for side, arm in arms.items()}
        for limit in (-math.inf, may_flip)
    )
    common = whole[INFER].index.intersection(whole[TRAIN].index)
    whole, cut = ({side: one.loc[common] for side, one in frames.items()} for frames in (whole, cut))
    agrees = {side: ~is_differing(one, scale) & (one["n_tokens"] > 0) for side, one in whole.items()}
    found = {}
    for side, arm in arms.items():
        own, other = agrees[side], agrees[_OTHER[side]]
        # a sequence is taken from the first of the three that says something of it
        parts = [whole[side][own], between.reindex(own.index[~own & other]), cut[side][~own & ~other]]
        tested = tested_sequences(pd.concat(parts).dropna(subset=["n_tokens"]).astype(between.dtypes))
        n_differing = int(is_differing(tested, scale).sum())
        n_tokens = int(tested["n_tokens"].sum())
        found[side] = Agreement(arm, len(tested), len(tested) - n_differing, n_tokens, pooled_mean(tested))
    return found


def _answer(
    run: Run, third: str, by_side: Mapping[str, Agreement], engines: Mapping[str, str], is_same: bool | None
) -> tuple[str | None, str]:
    """The side that is off, and the sentence."""
    found = {side: one.is_same for side, one in by_side.items()}
    counts = {side: _count(one) for side, one in by_side.items()}
    if None in found.values():
        return None, (
            "Whose it is the reference does not say: no token stands before a choice that rounding may turn over"
        )
    for side, other in _OTHER.items():
        if found[other] and not found[side]:
            return side, (
                f"It is {_own(engines[side])}: the reference ({_code(run, third)}) agrees with {engines[other]} "
                f"({counts[other]} within {SAME:g} rounding scales) and not with {engines[side]} ({counts[side]})"
            )
    if all(found.values()):
        if is_same:
            return None, ""
        return None, (
            f"Whose it is the reference does not say: it agrees with both ({counts[INFER]}; {counts[TRAIN]}), so that "
            "the sequences or layers that differ are too few for it"
        )
    weights = run.other_weights(by_side[TRAIN].arm, third)
    own = f" ({weights})" if weights else ""
    return None, (
        f"Whose it is the reference does not say: {_code(run, third)} agrees with neither ({engines[INFER]} "
        f"{counts[INFER]}, {engines[TRAIN]} {counts[TRAIN]}) and is a third function{own}"
    )


def _count(one: Agreement) -> str:
    return f"{one.n_agreeing} of {one.n_sequences} sequences"


def _own(name: str) -> str:
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def _engine_words(run: Run, arm: str) -> str:
    engine = run.arm(arm).engine
    return ENGINE_WORDS.get(engine, engine)


def _code(run: Run, arm: str) -> str:
    """The reference's implementation, in words."""
    record = run.arm(arm)
    if isinstance(record.origin, Imported):
        return f"imported from {record.origin.format}"
    return str(record.facts.get("model_code") or record.engine)


def _may_flip(run: Run, train: str, scale_pair: str) -> float:
    """Margin of choice scores up to which rounding in float32 may flip a set; 0 where no margins were kept."""
    moved = next(arm for arm in scale_pair.split("~") if arm != train)
    changes = []
    for shard in min(run.shards_of(train), run.shards_of(moved), key=len):
        a_TL, b_TL = (run.readable(arm, shard).margin_TL for arm in (train, moved))
        if a_TL is not None and b_TL is not None:
            changes.append(np.abs(a_TL.astype(np.float64) - b_TL).ravel())
    change_N = np.concatenate(changes) if changes else np.zeros(0)
    change_N = change_N[np.isfinite(change_N)]
    return min(SAME * float(np.quantile(change_N, 0.9)), NEAR_TIE) if len(change_N) else 0.0


def _perplexity(run: Run, train: str, infer: str) -> Perplexity | None:
    """Mean log-probability of given text by both; None where an engine sampled it, or no better than a uniform guess.

    A model that was never trained predicts text no better than a uniform guess: of it neither function is the trained.
    """
    if run.record.tokens.origin != "given" or run.record.checkpoint is None:
        return None
    n_vocabulary = run.checkpoint(run.record.checkpoint).n_vocabulary
    diffs, prompts, bests = [], [], []
    for shard in min(run.shards_of(train), run.shards_of(infer), key=len):
        tokens, a, b = run.tokens(shard), run.readable(train, shard), run.readable(infer, shard)
        used_T = tokens.is_scored_T & is_scored(a.logp_T, b.logp_T)
        pair = a.logp_T[used_T].astype(np.float64), b.logp_T[used_T].astype(np.float64)
        diffs.append(pair[0] - pair[1])
        bests.append(np.stack(pair))
        prompts.append(tokens.prompt_id_T[used_T])
    diff_N, prompt_N, logp_2N = np.concatenate(diffs), np.concatenate(prompts), np.concatenate(bests, axis=1)
    if not len(diff_N) or not n_vocabulary:
        return None
    better = logp_2N[int(logp_2N[1].mean() > logp_2N[0].mean())]
    if not mean_interval(better, prompt_N).low > -math.log(n_vocabulary):  # NaN, too few prompts, is not above
        return None
    gain = mean_interval(diff_N, prompt_N)
    side = TRAIN if gain.low > 0 else INFER if gain.high < 0 else None
    return Perplexity(side, gain, len(diff_N))


def _likelier_words(found: Perplexity, engines: Mapping[str, str]) -> tuple[str, ...]:
    gain = found.gain
    size = f"{sig(abs(gain.value))} nat a token"
    ends = sorted((abs(gain.low), abs(gain.high))) if found.better else (gain.low, gain.high)
    n = f"[{sig(ends[0])}, {sig(ends[1])}], n = {found.n_tokens:,} tokens of {gain.n_clusters} prompts"
    if found.better is None:
        return (f"in float32 neither engine predicts the given text better: {size} apart ({n})",)
    return (
        f"in float32 {engines[found.better]} predicts the given text better than {engines[_OTHER[found.better]]}, by "
        f"{size} ({n}): likely, not certainly, the difference is {_own(engines[_OTHER[found.better]])}, where the text "
        "is natural and neither engine sampled it",
    )
