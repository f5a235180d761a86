"""How much more flipped tokens differ: abs(logp_diff) of flipped tokens against unflipped ones of the same kind.

Invariants:
    - groups are compared within strata of p_infer, entropy and position, and both sides get the *group's* strata
      weights: hard tokens flip more and differ more anyway, so a bare correlation would charge flips for it;
    - tokens whose stratum holds fewer than two unflipped tokens are left out of the excess and counted, never compared
      with another stratum;
    - it stays an association, an *excess* and not a cost: what makes a token hard without showing in its probability
      or entropy (unseen difficulty) is not controlled, infer's own flips move p_infer, and earlier flips act through
      attention. Forcing the routes is the experiment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import FLIP_EXCESS, LOGP_METRICS
from moediag.analysis.metrics import LOWER, Definition, Metric, declare_metrics
from moediag.analysis.strata import CONFIDENCE_EDGES, Strata, doubling_strata, edge_strata, position_strata
from moediag.analysis.tokens import AnyTokens, Tokens
from moediag.frames import declare
from moediag.statistics.intervals import MIN_CLUSTERS, Interval, jackknife_interval, ratio_mean_interval

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]

MASS_EDGES: Final = np.array([0.0, 0.01, 0.03, 0.1, 0.3, 1.0, np.inf])
"""Edges of the misrouted mass of a token, summed over its layers [gate weight]."""
MATCHED_ENTROPY_EDGES: Final = np.r_[0.0, 0.01 * 2.0 ** (np.arange(21) / 2), np.inf]
"""Edges of the entropy within which tokens are compared [nat]: half an octave, up to 10. Where flips and differences
both grow in proportion to entropy, bins of an octave leave a ratio of 1.04, these 1.01."""
_MATCHED_POSITION_BINS: Final = 4
_MIN_UNFLIPPED: Final = 2
"""Unflipped tokens that a stratum needs: one alone has no spread, and an interval would take its value for exact."""


_SHARES: Final = Definition(
    "share that flips hold, and explain",
    "sum of abs(logp_diff) over tokens with a flip / over all; the same of what they differ more than their like",
    "flips may stand where the mismatch is and not make it: what they hold is an accompaniment, what they explain is "
    "beyond unflipped tokens of the same p_infer, entropy and position. Difficulty that these do not show is not "
    "controlled; only replay shows a cause",
)


_SUM: Final = "sum abs(logp_diff)"


def _share(name: str, label: str, **rest: Any) -> Metric:
    path = ("flip_shares", name.removeprefix("flip_"))
    return Metric(name, "1", LOWER, label, path=path, section="excess", is_share=True, **rest)


TOKEN_SHARE, MASS_SHARE, EXPLAINED_SHARE = declare_metrics(
    _share("flip_token_share", "scored tokens with a flip"),
    _share("flip_mass_share", "mismatch on tokens with a flip", share_of=_SUM, on_terminal=True, definition=_SHARES),
    _share("flip_explained_share", "mismatch that flips explain", share_of=_SUM, is_headline=True),
)

FLIP_SHARES = declare(
    "flip_shares",
    "share of the tokens, or of the sum of abs(logp_diff), that tokens with a flip hold or flips explain",
    *LOGP_METRICS.columns,
    is_metrics=True,
)


def flip_shares(tokens: AnyTokens) -> pd.DataFrame:
    """How many tokens flip, how much of the mismatch they hold, and how much of it is beyond tokens like them.

    The last is the excess of :func:`flip_excess`, summed over all flipped tokens, as a share of the whole sum: negative
    where flipped tokens differ less than unflipped ones of their stratum. Those without a like are taken to exceed
    theirs in the proportion in which the others do.

    Args:
        tokens: token frame of a pair.

    Returns:
        Frame ``flip_shares``, of the scored tokens whose routing is known in every layer; lower is better. NaN without
        such a token, or without a difference. Intervals are clustered by prompt; that of the explained share counts the
        reference's noise, too. Where hard tokens flip more and flips double the difference or do nothing to it, they
        hold the truth .93 to .96 of the time at 16 and at 64 prompts (200 sets each, standard error .015).

    Source: ours, from the standardisation of :func:`flip_excess`.
    """
    routed = _routed(tokens)
    matched = _Matched(routed)
    flipped_T = routed.column("n_flipped_layers") > 0
    matched_T = flipped_T & matched.has_reference_S[matched.stratum_T]
    excess_T, _ = matched.parts(matched_T)
    held_T, compared_T = (np.where(some_T, matched.size_T, 0.0) for some_T in (flipped_T, matched_T))
    n_C, flips_C, sum_C, held_C, compared_C, excess_C = (
        np.bincount(matched.prompt_T, values_T, matched.n_prompts)
        for values_T in (None, flipped_T, matched.size_T, held_T, compared_T, excess_T)
    )
    held = ratio_mean_interval(held_C, sum_C, "signed").one()
    found = {
        TOKEN_SHARE: ratio_mean_interval(flips_C, n_C, "rate").one(),
        MASS_SHARE: replace(held, low=np.maximum(held.low, 0.0), high=np.minimum(held.high, 1.0)),
        EXPLAINED_SHARE: jackknife_interval(
            np.stack([sum_C, held_C, compared_C, excess_C], axis=1), _explained, "linear"
        ),
    }
    n = len(routed), matched.n_prompts
    records = [
        (metric.name, x.value, x.low, x.high, np.nan, *n, metric.unit, metric.direction, x.note)
        for metric, x in found.items()
    ]  # fmt: skip
    return FLIP_SHARES.validate(pd.DataFrame.from_records(records, columns=FLIP_SHARES.names))


def _routed(tokens: AnyTokens) -> Tokens:
    """The scored tokens whose routing is known in every layer."""
    x = Tokens.of(tokens)
    return Tokens(x.rows[x.column("n_flipped_layers") >= 0])


def _explained(sums: Float64) -> Float64:
    """Excess over what the compared flipped tokens hold, times the share that all flipped tokens hold."""
    whole, held, compared, excess = np.moveaxis(sums, -1, 0)
    return np.asarray(np.where(held > 0, excess / compared, 0.0) * held / whole)


def flip_excess(tokens: AnyTokens) -> pd.DataFrame:
    """Excess of abs(logp_diff) of flipped tokens, by how many layers flipped, by the first of them, by misrouted mass.

    Direct standardisation with the group's own weights: for every stratum s of p_infer, entropy (infer's, else train's;
    without any, of p_infer and position alone) and position, mean of the group minus mean of unflipped tokens, weighted
    by the group's tokens in s. Not controlled: difficulty that neither probability nor entropy shows. It makes an
    excess where flips do nothing, so an excess is no proof of an effect.

    Args:
        tokens: token frame of a pair.

    Returns:
        Frame ``flip_excess`` [nat]; an excess of 0 (a ratio of 1) means that flipped tokens differ no more than
        unflipped ones like them. No rows without routed tokens. Intervals are clustered by prompt and count the
        reference's own noise; where entropy alone makes tokens hard, that of the ratio holds the truth (1, and 1.5)
        .95 of the time at 16 and at 64 prompts (300 sets each, standard error .013).

    Source: direct standardisation, e.g. Rothman, Greenland and Lash (2008) chapter 15; linearised interval.
    """
    x = _routed(tokens)
    names = [column.name for column in FLIP_EXCESS.columns]
    records: list[tuple[Any, ...]] = []
    if len(x):
        matched = _Matched(x)
        records = [(*label, matched.names, *matched.excess(inside_T)) for *label, inside_T in _groups(x)]
    return FLIP_EXCESS.validate(pd.DataFrame.from_records(records, columns=names))


def _groups(x: Tokens) -> Iterator[tuple[str, float, float, Bool]]:
    """(grouping, low, high, tokens) of every group of flipped tokens that has one."""
    n_flipped_T = x.column("n_flipped_layers").astype(np.int64)
    first_T = x.column("first_flipped_layer").astype(np.int64)
    flipped_T = n_flipped_T > 0
    if flipped_T.any():
        yield "any_flip", 1.0, float(n_flipped_T.max()), flipped_T
    counts = doubling_strata("n_flipped_layers", n_flipped_T)
    masses = edge_strata("misrouted_mass", x.column("misrouted_mass").astype(np.float64), MASS_EDGES)
    for b in np.unique(counts.index_T[flipped_T]).tolist():
        yield counts.name, counts.low_B[b], counts.high_B[b], counts.index_T == b
    for layer in np.unique(first_T[flipped_T]).tolist():
        yield "first_flipped_layer", float(layer), float(layer), first_T == layer
    for b in np.unique(masses.index_T[flipped_T & (masses.index_T >= 0)]).tolist():
        yield masses.name, masses.low_B[b], masses.high_B[b], flipped_T & (masses.index_T == b)


def matched_strata(x: Tokens) -> list[Strata]:
    """What tokens are matched on: p_infer, position, and the entropy of infer or else of train where one is known."""
    strata = [
        edge_strata("p_infer", np.exp(x.logp_infer_T), CONFIDENCE_EDGES),
        position_strata(x.column("position").astype(np.int64), _MATCHED_POSITION_BINS),
    ]
    for side in ("infer", "train"):
        entropy_T = x.column(f"entropy_{side}").astype(np.float64)
        if np.isfinite(entropy_T).any():
            # an engine's entropy of a sure token may be -1e-8
            return [*strata, edge_strata(f"entropy_{side}", np.maximum(entropy_T, 0.0), MATCHED_ENTROPY_EDGES)]
    return strata


class _Matched:
    """abs(logp_diff) of every token beside the mean of the unflipped tokens of its stratum."""

    def __init__(self, x: Tokens) -> None:
        strata = matched_strata(x)
        self.names = ", ".join(each.name for each in strata)
        # a token whose entropy is not known stands in a stratum of those: index -1 becomes 0
        joint_T = np.zeros(len(x), dtype=np.int64)
        for each in strata:
            joint_T = joint_T * (len(each) + 1) + each.index_T + 1
        joint, self.stratum_T = np.unique(joint_T, return_inverse=True)
        self.prompt_T, self.n_strata, self.n_prompts = x.prompt_row_T, len(joint), x.n_prompts
        self.size_T = x.abs_diff_T
        self.unflipped_T = x.column("n_flipped_layers") == 0
        self.n0_S = self._count(self.unflipped_T)
        sum0_S = np.bincount(self.stratum_T[self.unflipped_T], self.size_T[self.unflipped_T], self.n_strata)
        self.has_reference_S = self.n0_S >= _MIN_UNFLIPPED
        self.mean0_T = (sum0_S / np.maximum(self.n0_S, 1))[self.stratum_T]

    def excess(self, inside_T: Bool) -> tuple[Any, ...]:
        """The record of a group, from its number of matched tokens on."""
        matched_T = inside_T & self.has_reference_S[self.stratum_T]
        n_matched = int(matched_T.sum())
        unmatched = int(inside_T.sum()) - n_matched
        if not n_matched:
            return (0, unmatched, *[np.nan] * 9)
        flipped, unflipped = self.size_T[matched_T].mean(), self.mean0_T[matched_T].mean()
        excess_T, noise_T = self.parts(matched_T)
        excess = self._interval(excess_T, matched_T)
        ratio = flipped / unflipped if unflipped > 0 else np.nan
        bounds = np.nan, np.nan
        if flipped > 0 and unflipped > 0:
            # linearised parts of log(flipped / unflipped): they sum to 0
            part_T = np.where(matched_T, self.size_T / flipped - self.mean0_T / unflipped, 0.0) - noise_T / unflipped
            log_ratio = self._interval(part_T, matched_T)
            bounds = float(ratio * np.exp(log_ratio.low)), float(ratio * np.exp(log_ratio.high))
        return (
            n_matched, unmatched, flipped, unflipped, flipped - unflipped, excess.low, excess.high, ratio, *bounds,
            self._raw_ratio(inside_T),
        )  # fmt: skip

    def parts(self, matched_T: Bool) -> tuple[Float64, Float64]:
        """What every token adds to the summed excess of the matched ones, and its noise as part of their reference."""
        # The mean of the reference is a weighted mean of unflipped tokens: its noise is theirs.
        weight_S = np.where(self.has_reference_S, self._count(matched_T) / np.maximum(self.n0_S, 1), 0.0)
        noise_T = np.where(self.unflipped_T, weight_S[self.stratum_T] * (self.size_T - self.mean0_T), 0.0)
        return np.where(matched_T, self.size_T - self.mean0_T, 0.0) - noise_T, noise_T

    def _interval(self, part_T: Float64, matched_T: Bool) -> Interval:
        """Interval of the sum of parts per matched token; prompts with reference tokens only are clusters, too."""
        n_C = np.bincount(self.prompt_T[matched_T], minlength=self.n_prompts)
        part_C = np.bincount(self.prompt_T, part_T, self.n_prompts)
        found = ratio_mean_interval(part_C, n_C + _NOTHING, "signed").one()
        if int((n_C > 0).sum()) < MIN_CLUSTERS:  # the group's own noise would be invented
            return Interval(found.value, np.nan, np.nan, found.n_clusters, "too few prompts")
        return found

    def _count(self, inside_T: Bool) -> Float64:
        return np.bincount(self.stratum_T[inside_T], minlength=self.n_strata).astype(np.float64)

    def _raw_ratio(self, inside_T: Bool) -> float:
        if not (inside_T.any() and self.unflipped_T.any()):
            return float("nan")
        reference = float(self.size_T[self.unflipped_T].mean())
        return float(self.size_T[inside_T].mean()) / reference if reference > 0 else float("nan")


_NOTHING: Final = 1e-12
"""Keeps prompts that hold only reference tokens among the clusters: their noise is part of the interval."""
