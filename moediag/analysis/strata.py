"""Every headline metric by position, confidence, entropy and number of flipped layers.

Invariants:
    - strata have fixed edges (positions: powers of two), so runs can be laid side by side;
    - within a stratum everything is as in the whole: scored tokens only, float64, intervals clustered by prompt;
    - a stratum without a scored token has no row; tokens whose stratifier is not known belong to no stratum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moediag.analysis.declarations import METRICS_BY_STRATUM
from moediag.analysis.measures import QUANTILE_MEASURES, TOKEN_MEASURES, formulas
from moediag.analysis.metrics import LOWER
from moediag.analysis.tokens import Source, Tokens, TokenSource, source_of
from moediag.statistics.intervals import Intervals, ratio_mean_interval
from moediag.statistics.quantiles import quantile_intervals

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

CONFIDENCE_EDGES: Final = np.array([0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, np.inf])
"""Edges of p_infer; the last bin holds p = 1, which engines do give. Fine near 1, where most tokens are."""
ENTROPY_EDGES: Final = np.array([0.0, 0.01, 0.05, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, np.inf])
"""Edges of the next-token entropy [nat]."""
MAX_POSITION_BINS: Final = 8


@dataclass(frozen=True)
class Strata:
    """A stratifier: the ends of its B strata, and the value by which a token is in one of them.

    Args:
        name: as tables show it.
        low_B, high_B: ends; the low ones ascend and belong to their stratum.
        of: (T,) values of tokens; NaN, infinities and what is below the first stratum are in none.
    """

    name: str
    low_B: Float64
    high_B: Float64
    of: Callable[[Any], NDArray[Any]]

    def __len__(self) -> int:
        return len(self.low_B)

    def index_T(self, x: Tokens) -> Int64:  # noqa: N802 - the legend suffix
        """(T,) the stratum of every token, -1 = in none."""
        values_T = self.of(x)
        index_T = np.searchsorted(self.low_B, values_T, side="right") - 1
        return np.where(values_T < np.inf, index_T, -1)


def metrics_by_stratum(tokens: Source, n_layers: int = 0) -> pd.DataFrame:
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
    x = source_of(tokens)
    records = [record for strata in token_strata(x) for record in _records(x, strata, n_layers)]
    names = [column.name for column in METRICS_BY_STRATUM.columns]
    return METRICS_BY_STRATUM.validate(pd.DataFrame.from_records(records, columns=names))


def token_strata(x: TokenSource) -> list[Strata]:
    """The stratifiers that tokens have; one whose value no token knows is left out."""
    extent = x.extent
    strata = [position_strata(extent.n_positions), confidence_strata()]
    if (entropy := extent.entropy) is not None:
        strata.append(edge_strata(entropy, ENTROPY_EDGES, lambda part: part.column(entropy)))
    if extent.most_flipped >= 0:
        strata.append(
            doubling_strata("n_flipped_layers", extent.most_flipped, lambda part: part.column("n_flipped_layers"))
        )
    return strata


def position_strata(n_positions: int, max_bins: int = MAX_POSITION_BINS) -> Strata:
    """Equal bins of positions in the response, a power of two wide."""
    longest = max(n_positions, 1)
    width = int(2 ** max(0, math.ceil(math.log2(longest / max_bins))))
    low_B = np.arange(0, longest, width, dtype=np.float64)
    return Strata("position", low_B, low_B + width - 1, lambda x: x.column("position"))


def confidence_strata() -> Strata:
    """Bins of p_infer."""
    return edge_strata("p_infer", CONFIDENCE_EDGES, lambda x: np.exp(x.logp_infer_T))


def edge_strata(name: str, edges: Float64, of: Callable[[Any], NDArray[Any]]) -> Strata:
    """Half-open bins [edge, next edge), the last without an end; NaN and values below the first are in none."""
    return Strata(name, edges[:-1], edges[1:], lambda x: of(x).astype(np.float64))


def doubling_strata(name: str, most: int, of: Callable[[Any], NDArray[Any]]) -> Strata:
    """Counts as 0, 1, 2, 3-4, 5-8, 9-16 ... up to the most there is; negative counts are in none."""
    most = max(0, most)
    high = [0, 1, *(2**power for power in range(1, max(1, (most - 1).bit_length() + 1) if most > 1 else 1))]
    high_B = np.array([end for end in high if end <= 1 or end // 2 < most], dtype=np.float64)
    low_B = np.r_[0.0, high_B[:-1] + 1]
    keep = low_B <= most
    return Strata(name, low_B[keep], high_B[keep], of)


def grid_sums(x: Tokens, index_T: Int64, n_strata: int, values_T: ArrayLike | None = None) -> Float64:
    """(C, B) sums of the values by prompt and stratum; counts without values."""
    inside_T = index_T >= 0
    cell_T = x.prompt_row_T[inside_T] * n_strata + index_T[inside_T]
    weights = None if values_T is None else np.asarray(values_T, np.float64)[inside_T]
    sums = np.bincount(cell_T, weights=weights, minlength=x.n_prompts * n_strata).astype(np.float64)
    return sums.reshape(x.n_prompts, n_strata)


def _records(x: TokenSource, strata: Strata, n_layers: int) -> Iterator[tuple[Any, ...]]:
    of = formulas(TOKEN_MEASURES)

    def sums(part: Tokens) -> Float64:
        index_T = strata.index_T(part)
        grids = [grid_sums(part, index_T, len(strata), values) for values in (None, *(one(part) for one in of))]
        if n_layers:
            n_flipped_T = part.column("n_flipped_layers")
            routed_T = np.where(n_flipped_T >= 0, index_T, -1)
            grids += [grid_sums(part, routed_T, len(strata), values) for values in (None, n_flipped_T / n_layers)]
        return np.stack(grids, axis=1)

    with np.errstate(over="ignore", invalid="ignore"):
        n_CB, *rest = np.moveaxis(x.collect(sums), 1, 0)
    n_B, prompts_B = n_CB.sum(axis=0).astype(np.int64), (n_CB > 0).sum(axis=0)
    held = np.flatnonzero(n_B)
    for name, unit, direction, found in _found(x, strata, n_CB, dict(zip(of, rest, strict=False)), rest[len(of) :]):
        for b in held.tolist():
            value, low, high = (array[b] for array in (found.value_M, found.low_M, found.high_M))
            ends = (strata.name, strata.low_B[b], strata.high_B[b])
            yield (*ends, name, value, low, high, n_B[b], prompts_B[b], unit, direction)


def _found(
    x: TokenSource,
    strata: Strata,
    n_CB: Float64,
    sums: Mapping[Callable[[Tokens], Float64], Float64],
    routed: Sequence[Float64],
) -> Iterator[tuple[str, str, str, Intervals]]:
    """(name, unit, direction, intervals by stratum) of every metric; ``routed``: tokens, and flips, by cell."""
    with np.errstate(over="ignore", invalid="ignore"):
        for measure in TOKEN_MEASURES:
            yield measure.name, measure.unit, measure.direction, measure.intervals(sums, n_CB)
    if routed:
        yield "flip_rate", "1", LOWER, ratio_mean_interval(routed[1], routed[0], "rate")
    for of, measures in groupby(QUANTILE_MEASURES, key=lambda measure: measure[2]):
        metrics, probabilities, _ = zip(*measures, strict=True)
        found = quantile_intervals(x.values(of, strata.index_T), len(strata), probabilities)
        for metric, each in zip(metrics, found, strict=True):
            yield metric.name, metric.unit, metric.direction, Intervals.of(each)
