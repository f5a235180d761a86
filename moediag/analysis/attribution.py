"""How much more flipped tokens differ: abs(logp_diff) of flipped tokens against unflipped ones of the same kind.

Invariants:
    - groups are compared within strata of p_infer, entropy and position, and both sides get the *group's* strata
      weights: hard tokens flip more and differ more anyway, so a bare correlation would charge flips for it;
    - tokens whose stratum holds fewer than two unflipped tokens are left out and counted, never compared with another
      stratum;
    - it stays an association, an *excess* and not a cost: what makes a token hard without showing in its probability
      or entropy (unseen difficulty) is not controlled, infer's own flips move p_infer, and earlier flips act through
      attention. Forcing the routes (rule R9) is the experiment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import FLIP_EXCESS
from moediag.analysis.strata import CONFIDENCE_EDGES, Strata, doubling_strata, edge_strata, position_strata
from moediag.analysis.tokens import logp_diff, scored_tokens
from moediag.statistics.intervals import MIN_CLUSTERS, Interval, ratio_mean_interval

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


def flip_excess(tokens: pd.DataFrame) -> pd.DataFrame:
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
    rows = scored_tokens(tokens)
    rows = rows[rows["n_flipped_layers"].to_numpy() >= 0]
    names = [column.name for column in FLIP_EXCESS.columns]
    records: list[tuple[Any, ...]] = []
    if len(rows):
        matched = _Matched(rows)
        records = [(*label, matched.names, *matched.excess(inside_T)) for *label, inside_T in _groups(rows)]
    return FLIP_EXCESS.validate(pd.DataFrame.from_records(records, columns=names))


def _groups(rows: pd.DataFrame) -> Iterator[tuple[str, float, float, Bool]]:
    """(grouping, low, high, tokens) of every group of flipped tokens that has one."""
    n_flipped_T = rows["n_flipped_layers"].to_numpy().astype(np.int64)
    first_T = rows["first_flipped_layer"].to_numpy().astype(np.int64)
    flipped_T = n_flipped_T > 0
    if flipped_T.any():
        yield "any_flip", 1.0, float(n_flipped_T.max()), flipped_T
    counts = doubling_strata("n_flipped_layers", n_flipped_T)
    masses = edge_strata("misrouted_mass", rows["misrouted_mass"].to_numpy().astype(np.float64), MASS_EDGES)
    for b in np.unique(counts.index_T[flipped_T]).tolist():
        yield counts.name, counts.low_B[b], counts.high_B[b], counts.index_T == b
    for layer in np.unique(first_T[flipped_T]).tolist():
        yield "first_flipped_layer", float(layer), float(layer), first_T == layer
    for b in np.unique(masses.index_T[flipped_T & (masses.index_T >= 0)]).tolist():
        yield masses.name, masses.low_B[b], masses.high_B[b], flipped_T & (masses.index_T == b)


def matched_strata(rows: pd.DataFrame) -> list[Strata]:
    """What tokens are matched on: p_infer, position, and the entropy of infer or else of train where one is known."""
    strata = [
        edge_strata("p_infer", np.exp(rows["logp_infer"].to_numpy().astype(np.float64)), CONFIDENCE_EDGES),
        position_strata(rows["position"].to_numpy().astype(np.int64), _MATCHED_POSITION_BINS),
    ]
    for side in ("infer", "train"):
        entropy_T = rows[f"entropy_{side}"].to_numpy().astype(np.float64)
        if np.isfinite(entropy_T).any():
            # an engine's entropy of a sure token may be -1e-8
            return [*strata, edge_strata(f"entropy_{side}", np.maximum(entropy_T, 0.0), MATCHED_ENTROPY_EDGES)]
    return strata


class _Matched:
    """abs(logp_diff) of every token beside the mean of the unflipped tokens of its stratum."""

    def __init__(self, rows: pd.DataFrame) -> None:
        strata = matched_strata(rows)
        self.names = ", ".join(each.name for each in strata)
        # a token whose entropy is not known stands in a stratum of those: index -1 becomes 0
        joint_T = np.zeros(len(rows), dtype=np.int64)
        for each in strata:
            joint_T = joint_T * (len(each) + 1) + each.index_T + 1
        joint, self.stratum_T = np.unique(joint_T, return_inverse=True)
        prompts, self.prompt_T = np.unique(rows["prompt_id"].to_numpy(), return_inverse=True)
        self.n_strata, self.n_prompts = len(joint), len(prompts)
        self.size_T = np.abs(logp_diff(rows))
        self.unflipped_T = rows["n_flipped_layers"].to_numpy() == 0
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
        # The mean of the reference is a weighted mean of unflipped tokens: its noise is theirs.
        weight_S = np.where(self.has_reference_S, self._count(matched_T) / np.maximum(self.n0_S, 1), 0.0)
        noise_T = np.where(self.unflipped_T, weight_S[self.stratum_T] * (self.size_T - self.mean0_T), 0.0)
        excess = self._interval(np.where(matched_T, self.size_T - self.mean0_T, 0.0) - noise_T, matched_T)
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
