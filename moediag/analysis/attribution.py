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

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import FLIP_EXCESS, LOGP_METRICS
from moediag.analysis.metrics import LOWER, Definition, Metric, declare_metrics
from moediag.analysis.strata import Strata, confidence_strata, doubling_strata, edge_strata, position_strata
from moediag.analysis.tokens import Source, Tokens, TokenSource, source_of
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


def flip_shares(tokens: Source) -> pd.DataFrame:
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
    x = _routed(tokens)
    matched = _Matched(x)
    weight_S = matched.weights(matched.count(lambda part: [_is_flipped(part)])[0])

    def sums(part: Tokens) -> Float64:
        beside = matched.beside(part)
        flipped_T = _is_flipped(part)
        matched_T = flipped_T & beside.has_reference_T
        excess_T, _ = beside.parts(matched_T, weight_S)
        held_T, compared_T = (np.where(some_T, part.abs_diff_T, 0.0) for some_T in (flipped_T, matched_T))
        columns = (np.ones(len(part)), flipped_T, part.abs_diff_T, held_T, compared_T, excess_T)
        return np.stack([part.by_prompt(column) for column in columns], axis=1)

    n_C, flips_C, sum_C, held_C, compared_C, excess_C = x.collect(sums).T
    held = ratio_mean_interval(held_C, sum_C, "signed").one()
    found = {
        TOKEN_SHARE: ratio_mean_interval(flips_C, n_C, "rate").one(),
        MASS_SHARE: replace(held, low=np.maximum(held.low, 0.0), high=np.minimum(held.high, 1.0)),
        EXPLAINED_SHARE: jackknife_interval(
            np.stack([sum_C, held_C, compared_C, excess_C], axis=1), _explained, "linear"
        ),
    }
    n = len(x), x.n_prompts
    records = [
        (metric.name, x.value, x.low, x.high, np.nan, *n, metric.unit, metric.direction, x.note)
        for metric, x in found.items()
    ]  # fmt: skip
    return FLIP_SHARES.validate(pd.DataFrame.from_records(records, columns=FLIP_SHARES.names))


def _routed(tokens: Source) -> TokenSource:
    """The scored tokens whose routing is known in every layer."""
    return source_of(tokens).where(lambda part: part.column("n_flipped_layers") >= 0)


def _is_flipped(x: Tokens) -> Bool:
    return np.asarray(x.column("n_flipped_layers") > 0)


def _explained(sums: Float64) -> Float64:
    """Excess over what the compared flipped tokens hold, times the share that all flipped tokens hold."""
    whole, held, compared, excess = np.moveaxis(sums, -1, 0)
    return np.asarray(np.where(held > 0, excess / compared, 0.0) * held / whole)


def flip_excess(tokens: Source) -> pd.DataFrame:
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
        matched, (labels, inside) = _Matched(x), _groups(x)
        found = matched.excess(inside) if labels else []
        records = [(*label, matched.names, *record) for label, record in zip(labels, found, strict=True)]
    return FLIP_EXCESS.validate(pd.DataFrame.from_records(records, columns=names))


Label = tuple[str, float, float]
"""Grouping, and the ends of what the group is of."""
Inside = Callable[[Tokens], list[Bool]]
"""Tokens of every group, in one order."""


def _groups(x: TokenSource) -> tuple[list[Label], Inside]:
    """Every group of flipped tokens that has one."""
    most = x.extent.most_flipped
    if most < 1:
        return [], lambda part: []
    counts = doubling_strata("n_flipped_layers", most, lambda part: part.column("n_flipped_layers"))
    masses = edge_strata("misrouted_mass", MASS_EDGES, lambda part: part.column("misrouted_mass"))
    first = max(int(part.column("first_flipped_layer").max(initial=-1)) for part in x.parts())
    layers_B = np.arange(first + 1, dtype=np.float64)
    layers = Strata("first_flipped_layer", layers_B, layers_B, lambda part: part.column("first_flipped_layer"))
    kinds = counts, layers, masses

    def indices(part: Tokens) -> list[NDArray[np.int64]]:
        flipped_T = _is_flipped(part)
        return [np.where(flipped_T, strata.index_T(part), -1) for strata in kinds]

    def counted(part: Tokens) -> NDArray[Any]:
        found = [
            np.bincount(index_T + 1, minlength=len(kind) + 1)[1:]
            for kind, index_T in zip(kinds, indices(part), strict=True)
        ]
        return np.concatenate(found)

    held = np.split(x.total(counted), np.cumsum([len(strata) for strata in kinds])[:-1])
    some = [np.flatnonzero(n_B).tolist() for n_B in held]

    def inside(part: Tokens) -> list[Bool]:
        return [_is_flipped(part), *(index_T == b for index_T, of in zip(indices(part), some, strict=True) for b in of)]

    labels = [
        (strata.name, strata.low_B[b], strata.high_B[b]) for strata, of in zip(kinds, some, strict=True) for b in of
    ]
    return [("any_flip", 1.0, float(most)), *labels], inside


def matched_strata(x: TokenSource) -> list[Strata]:
    """What tokens are matched on: p_infer, position, and the entropy of infer or else of train where one is known."""
    extent = x.extent
    strata = [confidence_strata(), position_strata(extent.n_positions, _MATCHED_POSITION_BINS)]
    if (entropy := extent.entropy) is not None:
        # an engine's entropy of a sure token may be -1e-8
        strata.append(edge_strata(entropy, MATCHED_ENTROPY_EDGES, lambda part: np.maximum(part.column(entropy), 0.0)))
    return strata


@dataclass(frozen=True)
class _Beside:
    """Tokens of a part beside the unflipped ones of their strata.

    Args:
        stratum_T: of S.
        size_T: abs(logp_diff) [nat]; mean0_T: mean of the unflipped tokens of the stratum.
        unflipped_T, has_reference_T: without a flip; of a stratum with enough tokens without one.
    """

    stratum_T: NDArray[np.intp]
    size_T: Float64
    mean0_T: Float64
    unflipped_T: Bool
    has_reference_T: Bool

    def parts(self, matched_T: Bool, weight_S: Float64) -> tuple[Float64, Float64]:
        """What every token adds to the summed excess of the matched ones, and its noise as part of their reference."""
        # The mean of the reference is a weighted mean of unflipped tokens: its noise is theirs.
        noise_T = np.where(self.unflipped_T, weight_S[self.stratum_T] * (self.size_T - self.mean0_T), 0.0)
        return np.where(matched_T, self.size_T - self.mean0_T, 0.0) - noise_T, noise_T


class _Matched:
    """abs(logp_diff) of every token beside the mean of the unflipped tokens of its stratum, in S strata."""

    def __init__(self, x: TokenSource) -> None:
        self.x, self.strata = x, matched_strata(x)
        self.names = ", ".join(each.name for each in self.strata)
        self.n_strata = math.prod(len(each) + 1 for each in self.strata)

        def unflipped(part: Tokens) -> Float64:
            stratum_T, unflipped_T = self._strata_of(part), part.column("n_flipped_layers") == 0
            stratum, size = stratum_T[unflipped_T], part.abs_diff_T[unflipped_T]
            return np.stack([np.bincount(stratum, weights, self.n_strata) for weights in (None, size)])

        self.n0_S, sum0_S = x.total(unflipped)
        self.has_reference_S = self.n0_S >= _MIN_UNFLIPPED
        self.mean0_S = sum0_S / np.maximum(self.n0_S, 1)
        self.mean0 = float(sum0_S.sum() / self.n0_S.sum()) if self.n0_S.any() else np.nan

    def _strata_of(self, part: Tokens) -> NDArray[np.intp]:
        # a token whose entropy is not known stands in a stratum of those: index -1 becomes 0
        joint_T = np.zeros(len(part), dtype=np.intp)
        for each in self.strata:
            joint_T = joint_T * (len(each) + 1) + each.index_T(part) + 1
        return joint_T

    def beside(self, part: Tokens) -> _Beside:
        """The tokens of a part beside their strata."""
        stratum_T = self._strata_of(part)
        unflipped_T = part.column("n_flipped_layers") == 0
        mean0_T, has_T = self.mean0_S[stratum_T], self.has_reference_S[stratum_T]
        return _Beside(stratum_T, part.abs_diff_T, mean0_T, unflipped_T, has_T)

    def count(self, inside: Inside) -> Float64:
        """(G, S) tokens of every group by stratum."""

        def counts(part: Tokens) -> Float64:
            stratum_T = self._strata_of(part)
            return np.stack([np.bincount(stratum_T[some], minlength=self.n_strata) for some in inside(part)])

        return np.asarray(self.x.total(counts), dtype=np.float64)

    def weights(self, n_S: Float64) -> Float64:
        """(S,) tokens of a group for each unflipped token of the stratum."""
        return np.where(self.has_reference_S, n_S / np.maximum(self.n0_S, 1), 0.0)

    def excess(self, inside: Inside) -> list[tuple[Any, ...]]:
        """The record of every group, from its number of matched tokens on."""
        n_GS = self.count(inside)
        matched_GS = n_GS * self.has_reference_S
        n_G, n_matched_G = n_GS.sum(axis=1), matched_GS.sum(axis=1)

        def totals(part: Tokens) -> Float64:
            beside = self.beside(part)
            size_T, matched_T = beside.size_T, beside.has_reference_T
            return np.array([[size_T[some].sum(), size_T[some & matched_T].sum()] for some in inside(part)])

        size_G, matched_size_G = self.x.total(totals).T
        with np.errstate(invalid="ignore", divide="ignore"):
            flipped_G, unflipped_G = matched_size_G / n_matched_G, matched_GS @ self.mean0_S / n_matched_G
            ratio_G = np.where(unflipped_G > 0, flipped_G / unflipped_G, np.nan)
            raw_G = size_G / n_G / self.mean0 if self.mean0 > 0 else np.full(len(n_G), np.nan)
        weight_GS = [self.weights(n_S) for n_S in matched_GS]

        def sums(part: Tokens) -> Float64:
            """(C, G, 3): matched tokens, parts of the excess, and linearised parts of log(flipped / unflipped)."""
            beside, columns = self.beside(part), []
            for some, weight_S, flipped, unflipped in zip(inside(part), weight_GS, flipped_G, unflipped_G, strict=True):
                matched_T = some & beside.has_reference_T
                excess_T, noise_T = beside.parts(matched_T, weight_S)
                ratio_T = np.zeros(len(part))
                if flipped > 0 and unflipped > 0:
                    linear_T = beside.size_T / flipped - beside.mean0_T / unflipped
                    ratio_T = np.where(matched_T, linear_T, 0.0) - noise_T / unflipped
                columns.append(np.stack([part.by_prompt(column) for column in (matched_T, excess_T, ratio_T)], axis=1))
            return np.stack(columns, axis=1)

        sums_CG = self.x.collect(sums)
        records: list[tuple[Any, ...]] = []
        for g, (n, flipped, unflipped, ratio) in enumerate(
            zip(n_matched_G, flipped_G, unflipped_G, ratio_G, strict=True)
        ):
            unmatched = int(n_G[g] - n)
            if not n:
                records.append((0, unmatched, *[np.nan] * 9))
                continue
            n_C, part_C, ratio_C = sums_CG[:, g].T
            excess, bounds = _interval(part_C, n_C), (np.nan, np.nan)
            if flipped > 0 and unflipped > 0:
                log_ratio = _interval(ratio_C, n_C)  # the parts sum to 0
                bounds = float(ratio * np.exp(log_ratio.low)), float(ratio * np.exp(log_ratio.high))
            difference = flipped - unflipped
            records.append(
                (int(n), unmatched, flipped, unflipped, difference, excess.low, excess.high, ratio, *bounds, raw_G[g])
            )
        return records


def _interval(part_C: Float64, n_C: Float64) -> Interval:
    """Interval of the sum of parts per matched token; prompts with reference tokens only are clusters, too."""
    found = ratio_mean_interval(part_C, n_C + _NOTHING, "signed").one()
    if int((n_C > 0).sum()) < MIN_CLUSTERS:  # the group's own noise would be invented
        return Interval(found.value, np.nan, np.nan, found.n_clusters, "too few prompts")
    return found


_NOTHING: Final = 1e-12
"""Keeps prompts that hold only reference tokens among the clusters: their noise is part of the interval."""
