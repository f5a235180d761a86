"""Drift of the mismatch along the response: by bins, and as a slope within sequences.

Invariants:
    - late bins hold only the sequences that got so far, so the table counts them; the *slope* compares
      each sequence with itself (its own mean removed), hence survivors do not bias it;
    - only tokens scored by both arms count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import DRIFT_BY_POSITION
from moediag.analysis.measures import abs_diff, is_extreme
from moediag.analysis.strata import grid_sums
from moediag.analysis.tokens import Source, Tokens, source_of
from moediag.statistics.intervals import ratio_mean_interval
from moediag.statistics.quantiles import quantiles_of_groups

Float64 = NDArray[np.float64]

MAX_BINS: Final = 16
_QUANTILES: Final = {"abs_logp_diff_p50": 0.5, "abs_logp_diff_p90": 0.9, "abs_logp_diff_p99": 0.99}


@dataclass(frozen=True)
class PositionSlope:
    """Slope of abs(logp_diff) [nat per 1000 tokens] with its 95 % interval; 0 = no drift.

    Args:
        value, low, high: NaN where nothing can be said; ``note`` says why.
        n_tokens, n_sequences: tokens and sequences that carry the slope (two tokens or more).
        n_prompts: clusters behind the interval.
    """

    value: float
    low: float
    high: float
    n_tokens: int
    n_sequences: int
    n_prompts: int
    note: str


def drift_by_position(tokens: Source, n_layers: int = 0, bin_width: int | None = None) -> pd.DataFrame:
    """abs(logp_diff) and flips by position in the response.

    Args:
        tokens: token frame of a pair.
        n_layers: L, to turn flipped layers into a rate; 0 = dense, no rate.
        bin_width: tokens per bin; None takes the power of two that gives at most 16 bins.

    Returns:
        Frame ``drift_by_position`` [nat]; lower is better; bins without a scored token are left out.

    Source: IcePop Figs. 2-3, whose bins are not stated; ours are.
    """
    x = source_of(tokens)
    if not len(x):
        return DRIFT_BY_POSITION.validate(pd.DataFrame({c.name: np.zeros(0) for c in DRIFT_BY_POSITION.columns}))
    width = bin_width or _default_width(x.extent.n_positions)
    n_bins = (x.extent.n_positions - 1) // width + 1

    def bin_of(part: Tokens) -> NDArray[np.int64]:
        return part.column("position").astype(np.int64) // width

    def sums(part: Tokens) -> Float64:
        return np.stack([grid_sums(part, bin_of(part), n_bins, of) for of in (None, part.abs_diff_T)], axis=1)

    def counts(part: Tokens) -> Float64:
        bin_T, n_flipped_T = bin_of(part), part.column("n_flipped_layers")
        routed_T = n_flipped_T >= 0
        cells = np.unique(part.row_T * n_bins + bin_T)
        return np.stack(
            [
                np.bincount(cells % n_bins, minlength=n_bins),
                np.bincount(bin_T[is_extreme(part.diff_T)], minlength=n_bins),
                np.bincount(bin_T[routed_T], minlength=n_bins),
                np.bincount(bin_T[routed_T], n_flipped_T[routed_T], minlength=n_bins),
            ]
        )

    n_CB, sum_CB = np.moveaxis(x.collect(sums), 1, 0)
    n_B = n_CB.sum(axis=0).astype(np.int64)
    held = np.flatnonzero(n_B)
    n_sequences_B, n_extreme_B, n_routed_B, n_flipped_B = x.total(counts)[:, held]
    mean = ratio_mean_interval(sum_CB[:, held], n_CB[:, held], "positive")
    q_QB = np.repeat(np.c_[list(_QUANTILES.values())], n_bins, axis=1)
    points = quantiles_of_groups(x.values(abs_diff, bin_of), n_B, q_QB)[:, held]
    frame = pd.DataFrame(
        {
            "position_low": held * width,
            "position_high": (held + 1) * width - 1,
            "n_tokens": n_B[held],
            "n_sequences": n_sequences_B.astype(np.int64),
            "abs_logp_diff_mean": mean.value_M,
            "abs_logp_diff_mean_ci_low": mean.low_M,
            "abs_logp_diff_mean_ci_high": mean.high_M,
            **dict(zip(_QUANTILES, points, strict=True)),
            "extreme_share_2": n_extreme_B / n_B[held],
            "flip_rate": n_flipped_B / n_layers / np.where(n_routed_B, n_routed_B, np.nan) if n_layers else np.nan,
        }
    )
    return DRIFT_BY_POSITION.validate(frame)


def position_slope(tokens: Source) -> PositionSlope:
    """Slope of abs(logp_diff) against position within sequences, per 1000 tokens.

    Least squares with one intercept per sequence, so only change *inside* a response counts; a slope
    through binned means would mix in that long responses differ from short ones.

    Args:
        tokens: token frame of a pair.

    Returns:
        Slope in nat per 1000 tokens, interval clustered by prompt; 0 is best, above 0 = grows.

    Source: fixed-effects (within) estimator, e.g. Wooldridge (2010) section 10.5.
    """
    x = source_of(tokens)

    def sums(part: Tokens) -> Float64:
        position_T = within_sequence(part.column("position").astype(np.float64), part.row_T)
        abs_diff_T = within_sequence(part.abs_diff_T, part.row_T)
        return np.stack([part.by_prompt(position_T * abs_diff_T), part.by_prompt(np.square(position_T))], axis=1)

    cross_C, spread_C = x.collect(sums).T
    slope = ratio_mean_interval(1000 * cross_C, spread_C, "signed").one()
    used_S = x.n_S[x.n_S > 1]  # a single token has no slope
    n_tokens, n_sequences = int(used_S.sum()), len(used_S)
    return PositionSlope(slope.value, slope.low, slope.high, n_tokens, n_sequences, slope.n_clusters, slope.note)


def _default_width(longest: int) -> int:
    """Smallest power of two that cuts the longest response into at most 16 bins."""
    return int(2 ** max(0, math.ceil(math.log2(longest / MAX_BINS))))


def within_sequence(values_T: Float64, seq_T: NDArray[Any]) -> Float64:
    """Values minus the mean of their sequence, in the unit of the values."""
    index_T = np.unique(seq_T, return_inverse=True)[1]
    sum_S, n_S = np.bincount(index_T, weights=values_T), np.bincount(index_T)
    return np.asarray(values_T - (sum_S / n_S)[index_T]) if len(values_T) else values_T
