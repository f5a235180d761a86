"""Every headline metric by position, confidence, entropy and number of flipped layers.

Invariants:
    - strata have fixed edges (positions: powers of two), so runs can be laid side by side;
    - within a stratum everything is as in the whole: scored tokens only, float64, intervals clustered by prompt;
    - a stratum without a scored token has no row; tokens whose stratifier is not known belong to no stratum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import METRICS_BY_STRATUM
from moediag.analysis.measures import QUANTILE_MEASURES, TOKEN_MEASURES
from moediag.analysis.metrics import LOWER
from moediag.analysis.tokens import AnyTokens, Tokens
from moediag.statistics.intervals import Intervals, ratio_mean_interval
from moediag.statistics.quantiles import quantile_of_rows

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

CONFIDENCE_EDGES: Final = np.array([0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, np.inf])
"""Edges of p_infer; the last bin holds p = 1, which engines do give. Fine near 1, where most tokens are."""
ENTROPY_EDGES: Final = np.array([0.0, 0.01, 0.05, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, np.inf])
"""Edges of the next-token entropy [nat]."""
MAX_POSITION_BINS: Final = 8


@dataclass(frozen=True)
class Strata:
    """A stratifier: the stratum of every token (-1 = in none) and the ends of the B strata."""

    name: str
    index_T: Int64
    low_B: Float64
    high_B: Float64

    def __len__(self) -> int:
        return len(self.low_B)


def metrics_by_stratum(tokens: AnyTokens, n_layers: int = 0) -> pd.DataFrame:
    """Headline metrics within strata of position, p_infer, entropy and number of flipped layers.

    A mean over all tokens mixes the sure with the unsure: most tokens have p near 1 and hardly differ, so a shift of
    the mix looks like a shift of the mismatch. Strata hold the mix still.

    Args:
        tokens: token frame of a pair.
        n_layers: L, to turn flipped layers into a rate; 0 = dense, no rate.

    Returns:
        Frame ``metrics_by_stratum``, long: one row per stratum and metric; unit and good end in each row.

    Source: "When Speed Kills Stability" for confidence strata; edges are ours.
    """
    x = Tokens.of(tokens)
    n_flipped_T = x.column("n_flipped_layers")
    records = [
        record
        for strata in token_strata(x)
        for record in _records(x, strata, n_flipped_T / n_layers if n_layers else None, n_flipped_T >= 0)
    ]
    names = [column.name for column in METRICS_BY_STRATUM.columns]
    return METRICS_BY_STRATUM.validate(pd.DataFrame.from_records(records, columns=names))


def token_strata(x: Tokens) -> list[Strata]:
    """The stratifiers that tokens have; one whose value no token knows is left out."""
    position_T = x.column("position").astype(np.int64)
    strata = [position_strata(position_T), edge_strata("p_infer", np.exp(x.logp_infer_T), CONFIDENCE_EDGES)]
    for side in ("infer", "train"):
        entropy_T = x.column(f"entropy_{side}").astype(np.float64)
        if np.isfinite(entropy_T).any():
            strata.append(edge_strata(f"entropy_{side}", entropy_T, ENTROPY_EDGES))
            break
    n_flipped_T = x.column("n_flipped_layers").astype(np.int64)
    if (n_flipped_T >= 0).any():
        strata.append(doubling_strata("n_flipped_layers", n_flipped_T))
    return strata


def position_strata(position_T: Int64, max_bins: int = MAX_POSITION_BINS) -> Strata:
    """Equal bins of positions in the response, a power of two wide."""
    longest = int(position_T.max(initial=0)) + 1
    width = int(2 ** max(0, math.ceil(math.log2(longest / max_bins))))
    low_B = np.arange(0, longest, width, dtype=np.float64)
    return Strata("position", position_T // width, low_B, low_B + width - 1)


def edge_strata(name: str, values_T: Float64, edges: Float64) -> Strata:
    """Half-open bins [edge, next edge); NaN and values outside the edges belong to none."""
    index_T = np.where(values_T < edges[-1], np.searchsorted(edges, values_T, side="right") - 1, -1)
    return Strata(name, index_T.astype(np.int64), edges[:-1], edges[1:])


def doubling_strata(name: str, count_T: Int64) -> Strata:
    """Counts as 0, 1, 2, 3-4, 5-8, 9-16 ...; negative counts belong to none."""
    most = max(0, int(count_T.max(initial=0)))
    high = [0, 1, *(2**power for power in range(1, max(1, (most - 1).bit_length() + 1) if most > 1 else 1))]
    high_B = np.array([end for end in high if end <= 1 or end // 2 < most], dtype=np.float64)
    low_B = np.r_[0.0, high_B[:-1] + 1]
    keep = low_B <= most
    index_T = np.where(count_T < 0, -1, np.searchsorted(high_B[keep], count_T, side="left"))
    return Strata(name, index_T.astype(np.int64), low_B[keep], high_B[keep])


def grid_sums(x: Tokens, strata: Strata, values_T: Float64 | None) -> Float64:
    """(C, B) sums of the values by prompt and stratum; counts without values."""
    inside_T = strata.index_T >= 0
    cell_T = x.prompt_row_T[inside_T] * len(strata) + strata.index_T[inside_T]
    weights = None if values_T is None else values_T[inside_T]
    size = x.n_prompts * len(strata)
    sums = np.bincount(cell_T, weights=weights, minlength=size).astype(np.float64)
    return sums.reshape(x.n_prompts, len(strata))


def _records(
    x: Tokens, strata: Strata, flip_rate_T: Float64 | None, is_routed_T: NDArray[np.bool_]
) -> Iterator[tuple[Any, ...]]:
    n_CB = grid_sums(x, strata, None)
    n_B, prompts_B = n_CB.sum(axis=0).astype(np.int64), (n_CB > 0).sum(axis=0)
    held = np.flatnonzero(n_B)
    for name, unit, direction, found in _found(x, strata, n_CB, flip_rate_T, is_routed_T):
        for b in held.tolist():
            value, low, high = (array[b] for array in (found.value_M, found.low_M, found.high_M))
            ends = (strata.name, strata.low_B[b], strata.high_B[b])
            yield (*ends, name, value, low, high, n_B[b], prompts_B[b], unit, direction)


def _found(
    x: Tokens, strata: Strata, n_CB: Float64, flip_rate_T: Float64 | None, is_routed_T: NDArray[np.bool_]
) -> Iterator[tuple[str, str, str, Intervals]]:
    """(name, unit, direction, intervals by stratum) of every metric."""
    with np.errstate(over="ignore", invalid="ignore"):
        for measure in TOKEN_MEASURES:
            found = measure.intervals(x, lambda values_T: grid_sums(x, strata, values_T), n_CB)
            yield measure.name, measure.unit, measure.direction, found
    if flip_rate_T is not None:
        routed = Strata(strata.name, np.where(is_routed_T, strata.index_T, -1), strata.low_B, strata.high_B)
        sums_CB, n_routed_CB = (grid_sums(x, routed, values) for values in (flip_rate_T, None))
        yield "flip_rate", "1", LOWER, ratio_mean_interval(sums_CB, n_routed_CB, "rate")
    order = np.argsort(strata.index_T, kind="stable")
    ends = np.searchsorted(strata.index_T[order], np.arange(len(strata) + 1))
    for metric, q, of in QUANTILE_MEASURES:
        values_T = of(x)
        groups = [order[low:high] for low, high in pairwise(ends.tolist())]
        each = [quantile_of_rows(values_T[part], x.prompt_row_T[part], x.n_prompts, q) for part in groups]
        yield metric.name, metric.unit, metric.direction, Intervals.of(each)
