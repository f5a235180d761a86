"""What a flip costs: abs(logp_diff) of flipped tokens against unflipped ones of the same kind.

Invariants:
    - groups are compared within strata of p_infer and position, and both sides get the *group's* strata weights: hard
      tokens flip more and differ more anyway, so a bare correlation would charge flips for being on hard tokens;
    - tokens whose stratum holds no unflipped token are left out and counted, never compared with another stratum;
    - it stays an association: infer's own flips move p_infer, and earlier flips act through attention. Forcing the
      routes (rule R9) is the experiment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import FLIP_COSTS
from moediag.analysis.intervals import MIN_CLUSTERS, ratio_mean_interval
from moediag.analysis.strata import CONFIDENCE_EDGES, doubling_strata, edge_strata, position_strata
from moediag.analysis.tokens import logp_diff, scored_tokens

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

MASS_EDGES: Final = np.array([0.0, 0.01, 0.03, 0.1, 0.3, 1.0, np.inf])
"""Edges of the misrouted mass of a token, summed over its layers [gate weight]."""


def flip_costs(tokens: pd.DataFrame) -> pd.DataFrame:
    """Cost of flips by how many layers flipped, by the first of them, and by misrouted mass.

    Direct standardisation with the group's own weights (the effect on the flipped): for every stratum s of p_infer and
    position, mean of the group minus mean of unflipped tokens, weighted by the group's tokens in s.

    Args:
        tokens: token frame of a pair.

    Returns:
        Frame ``flip_costs`` [nat]; a cost of 0 means that flipped tokens differ no more than unflipped ones like them.
        No rows without routed tokens. Intervals are clustered by prompt and count the reference's own noise.

    Source: direct standardisation, e.g. Rothman, Greenland and Lash (2008) chapter 15; linearised interval.
    """
    rows = scored_tokens(tokens)
    rows = rows[rows["n_flipped_layers"].to_numpy() >= 0]
    names = [column.name for column in FLIP_COSTS.columns]
    records: list[tuple[Any, ...]] = []
    if len(rows):
        matched = _Matched(rows)
        records = [(*label, *matched.cost(inside_T)) for *label, inside_T in _groups(rows)]
    return FLIP_COSTS.validate(pd.DataFrame.from_records(records, columns=names))


def _groups(rows: pd.DataFrame) -> Iterator[tuple[str, float, float, NDArray[np.bool_]]]:
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


class _Matched:
    """Sums of abs(logp_diff) by prompt and stratum, ready to compare any group with the unflipped."""

    def __init__(self, rows: pd.DataFrame) -> None:
        confidence = edge_strata("p_infer", np.exp(rows["logp_infer"].to_numpy().astype(np.float64)), CONFIDENCE_EDGES)
        position = position_strata(rows["position"].to_numpy().astype(np.int64))
        self.n_strata = len(confidence) * len(position)
        self.stratum_T = confidence.index_T * len(position) + position.index_T
        prompts, self.prompt_T = np.unique(rows["prompt_id"].to_numpy(), return_inverse=True)
        self.n_prompts = len(prompts)
        self.size_T = np.abs(logp_diff(rows))
        self.unflipped_T = rows["n_flipped_layers"].to_numpy() == 0
        self.n0_CS, self.sum0_CS = self._sums(self.unflipped_T)
        self.n0_S, self.sum0_S = self.n0_CS.sum(axis=0), self.sum0_CS.sum(axis=0)
        self.mean0_S = self.sum0_S / np.where(self.n0_S == 0, np.nan, self.n0_S)

    def cost(self, inside_T: NDArray[np.bool_]) -> tuple[Any, ...]:
        """The record of a group, from its number of matched tokens on."""
        n_CS, sum_CS = self._sums(inside_T)
        has_reference_S = self.n0_S > 0
        unmatched = int(n_CS[:, ~has_reference_S].sum())
        n_CS, sum_CS = n_CS[:, has_reference_S], sum_CS[:, has_reference_S]
        n0_CS, sum0_CS = self.n0_CS[:, has_reference_S], self.sum0_CS[:, has_reference_S]
        mean0_S, n_S = self.mean0_S[has_reference_S], n_CS.sum(axis=0)
        n_matched = int(n_S.sum())
        if not n_matched:
            return (0, unmatched, *[np.nan] * 7)
        # each prompt's part of sum(group) - sum(group's n x reference mean), the reference's own noise included
        noise_CS = (sum0_CS - mean0_S * n0_CS) * (n_S / self.n0_S[has_reference_S])
        part_C = (sum_CS - n_CS * mean0_S - noise_CS).sum(axis=1)
        found = ratio_mean_interval(part_C, n_CS.sum(axis=1) + _NOTHING, "signed").one()
        if int((n_CS.sum(axis=1) > 0).sum()) < MIN_CLUSTERS:  # the group's own noise would be invented
            found = replace(found, low=np.nan, high=np.nan)
        flipped, unflipped = float(sum_CS.sum() / n_matched), float((n_S * mean0_S).sum() / n_matched)
        raw = self._raw_ratio(inside_T)
        ratio = flipped / unflipped if unflipped > 0 else np.nan
        return (n_matched, unmatched, flipped, unflipped, flipped - unflipped, found.low, found.high, ratio, raw)

    def _sums(self, inside_T: NDArray[np.bool_]) -> tuple[Float64, Float64]:
        cell_T = self.prompt_T[inside_T] * self.n_strata + self.stratum_T[inside_T]
        size, shape = self.n_prompts * self.n_strata, (self.n_prompts, self.n_strata)
        n_CS, sum_CS = (
            np.bincount(cell_T, weights=weights, minlength=size).astype(np.float64).reshape(shape)
            for weights in (None, self.size_T[inside_T])
        )
        return n_CS, sum_CS

    def _raw_ratio(self, inside_T: NDArray[np.bool_]) -> float:
        if not (inside_T.any() and self.unflipped_T.any()):
            return float("nan")
        reference = float(self.size_T[self.unflipped_T].mean())
        return float(self.size_T[inside_T].mean()) / reference if reference > 0 else float("nan")


_NOTHING: Final = 1e-12
"""Keeps prompts that hold only reference tokens among the clusters: their noise is part of the interval."""
