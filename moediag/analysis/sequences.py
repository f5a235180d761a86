"""Whole responses: one row per sequence, the worst tokens, the first divergence, and drift with length.

Invariants:
    - only tokens scored by both arms enter sums and means; a sequence without one is there with n_tokens = 0 and NaN;
    - the first divergence is the first *routing* difference behind a response token: from there on the two engines
      compute different functions, whatever the log-probabilities say;
    - ``worst_tokens`` is bounded, ties broken by sequence and position, so it does not depend on shard order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import DRIFT_BY_LENGTH, FIRST_DIVERGENCE, SEQUENCES, WORST_TOKENS
from moediag.analysis.measures import is_extreme
from moediag.analysis.metrics import LOWER, Metric, declare_metrics
from moediag.analysis.tokens import Source, Tokens, source_of
from moediag.statistics.intervals import Interval, cluster_sums, mean_interval, ratio_mean_interval

Float64 = NDArray[np.float64]

N_WORST: Final = 200
MAX_BINS: Final = 8

declare_metrics(
    Metric("abs_log_ratio_mean", "nat", LOWER, "log-ratio of whole responses, mean size",
           path=("length", "abs_log_ratio_mean"), counts="sequence", floor="sum"),
)  # fmt: skip


@dataclass(frozen=True)
class LengthSlope:
    """Slope of a sequence's log(pi_train / pi_infer) against its length [nat per 1000 tokens]; 0 = no drift.

    Args:
        value, low, high: NaN where nothing can be said; ``note`` says why.
        n_sequences, n_prompts: sequences behind the slope and clusters behind the interval.
    """

    value: float
    low: float
    high: float
    n_sequences: int
    n_prompts: int
    note: str


def sequence_frame(tokens: Source, n_layers: int = 0) -> pd.DataFrame:
    """One row per sequence: its mismatch, its ratios, its perplexities, its flips, its worst token.

    Args:
        tokens: token frame of a pair.
        n_layers: L, to turn flipped layers into a rate; 0 = dense.

    Returns:
        Frame ``sequences``, ascending by ``seq_id``; sort by a column to see the few sequences that are worst.

    Source: verl for perplexities; GSPO and Geo-RS for the two sequence ratios.
    """
    frames = [_sequences_of(part, n_layers) for part in source_of(tokens).parts()]
    return SEQUENCES.validate(pd.concat(frames, ignore_index=True))


def _sequences_of(x: Tokens, n_layers: int) -> pd.DataFrame:
    # unscored tokens, too: a sequence without a scored token has a row, and flips are known without log-probabilities
    frame, scored_T = x.frame, x.is_scored_N
    ids, first_S, row_T = np.unique(frame["seq_id"].to_numpy(), return_index=True, return_inverse=True)
    sums = _Sums(row_T[scored_T], len(ids), x.diff_T)
    max_S, position_S = _worst_in_sequences(row_T, len(ids), np.abs(x.diff_N), frame["position"].to_numpy(), scored_T)
    flip_position_S, flip_layer_S = _first_flips(frame, row_T, len(ids))
    n_flipped_T = frame["n_flipped_layers"].to_numpy()
    routed_T = n_flipped_T >= 0
    flips = _Sums(row_T[routed_T], len(ids), n_flipped_T[routed_T] / max(n_layers, 1))
    with np.errstate(over="ignore"):
        return pd.DataFrame(
            {
                "seq_id": ids,
                "prompt_id": frame["prompt_id"].to_numpy()[first_S],
                "sample_index": frame["sample_index"].to_numpy()[first_S],
                "n_tokens": sums.n_S,
                "n_unscored": np.bincount(row_T, minlength=len(ids)) - sums.n_S,
                "abs_logp_diff_mean": sums.mean(np.abs(sums.diff_T)),
                "abs_logp_diff_max": max_S,
                "worst_position": position_S,
                "k3": sums.mean(np.expm1(sums.diff_T) - sums.diff_T),
                "log_ratio_sum": sums.mean(sums.diff_T) * sums.n_S,
                "log_ratio_mean": sums.mean(sums.diff_T),
                "ppl_train": np.exp(-sums.mean(x.logp_train_T)),
                "ppl_infer": np.exp(-sums.mean(x.logp_infer_T)),
                "extreme_share_2": sums.mean(is_extreme(sums.diff_T)),
                "flip_rate": flips.mean(flips.diff_T) if n_layers else np.nan,
                "first_flip_position": flip_position_S,
                "first_flip_layer": flip_layer_S,
            }
        )


def worst_tokens(tokens: Source, top: int = N_WORST) -> pd.DataFrame:
    """The scored tokens that differ most, at most ``top`` of them, with where they stand.

    Args:
        tokens: token frame of a pair.
        top: rows kept.

    Returns:
        Frame ``worst_tokens``, largest abs(logp_diff) first.
    """
    few = pd.concat([_worst_of(part, top) for part in source_of(tokens).parts()])
    return WORST_TOKENS.validate(_worst_of(Tokens(few), top)[[column.name for column in WORST_TOKENS.columns]])


def _worst_of(x: Tokens, top: int) -> pd.DataFrame:
    few: pd.DataFrame
    size_T, kept = x.abs_diff_T, np.arange(len(x))
    if len(x) > top > 0:
        kept = np.flatnonzero(size_T >= np.partition(size_T, len(x) - top)[len(x) - top])
    few = x.rows.iloc[kept]
    order = np.lexsort((few["position"], few["seq_id"], -size_T[kept]))[:top]
    few = few.iloc[order].copy()
    few["rank"], few["logp_diff"] = np.arange(len(order)), x.diff_T[kept[order]]
    return few


def first_divergence(sequences: pd.DataFrame) -> pd.DataFrame:
    """In which MoE layer sequences flip first, and how far into the response.

    Args:
        sequences: frame ``sequences`` of a pair.

    Returns:
        Frame ``first_divergence``; layer -1 counts the routed sequences without a flip. Short responses end before
        they could diverge, so positions are of those that did.

    Source: ours.
    """
    rows = sequences[sequences["flip_rate"].notna()]
    layer_S, position_S = rows["first_flip_layer"].to_numpy(), rows["first_flip_position"].to_numpy()
    records = []
    for layer in np.unique(layer_S).tolist():
        at = position_S[layer_S == layer].astype(np.float64)
        points = np.quantile(at, [0.1, 0.5, 0.9]) if layer >= 0 else [np.nan] * 3
        records.append((layer, len(at), len(at) / len(rows), *points))
    names = [column.name for column in FIRST_DIVERGENCE.columns]
    return FIRST_DIVERGENCE.validate(pd.DataFrame.from_records(records, columns=names))


def drift_by_length(sequences: pd.DataFrame) -> pd.DataFrame:
    """log(pi_train / pi_infer) of whole responses by their length, at most 8 bins.

    Args:
        sequences: frame ``sequences`` of a pair.

    Returns:
        Frame ``drift_by_length`` [nat]; 0 is best. Independent errors make the absolute value grow like the root of
        the length, a bias makes the mean grow like the length itself.

    Source: FP16 paper ("Defeating the Training-Inference Mismatch via FP16", arXiv 2510.26788).
    """
    rows = sequences[sequences["n_tokens"] > 0]
    length_S = rows["n_tokens"].to_numpy()
    longest = int(length_S.max(initial=0))
    width = 1 << max(0, (max(1, longest) - 1).bit_length() - 3)
    records = []
    for b in np.unique((length_S - 1) // width).tolist():
        inside = rows[(length_S - 1) // width == b]
        ratio_S, prompt_S = inside["log_ratio_sum"].to_numpy(), inside["prompt_id"].to_numpy()
        mean, size = mean_interval(ratio_S, prompt_S), mean_interval(np.abs(ratio_S), prompt_S, "positive")
        points = np.quantile(np.abs(ratio_S), [0.5, 0.9])
        bounds = (mean.value, mean.low, mean.high, size.value, size.low, size.high)
        records.append((b * width + 1, (b + 1) * width, len(inside), *bounds, *points))
    names = [column.name for column in DRIFT_BY_LENGTH.columns]
    return DRIFT_BY_LENGTH.validate(pd.DataFrame.from_records(records, columns=names))


def abs_log_ratio_mean(sequences: pd.DataFrame) -> Interval:
    """Mean over responses of abs(log(pi_train / pi_infer)) of the whole response [nat], clustered by prompt; 0 is best.

    Args:
        sequences: frame ``sequences`` of a pair; those without a scored token are left out.

    Source: FP16 paper (arXiv 2510.26788).
    """
    rows = sequences[sequences["n_tokens"] > 0]
    return mean_interval(np.abs(rows["log_ratio_sum"].to_numpy()), rows["prompt_id"].to_numpy(), "positive")


def length_slope(sequences: pd.DataFrame) -> LengthSlope:
    """Slope of log(pi_train / pi_infer) of the whole response against its length, over sequences.

    Args:
        sequences: frame ``sequences`` of a pair.

    Returns:
        Slope in nat per 1000 tokens with an interval clustered by prompt; 0 is best, the sign is train minus infer.

    Source: FP16 paper (arXiv 2510.26788); ordinary least squares.
    """
    rows = sequences[sequences["n_tokens"] > 0]
    x_S, y_S = (rows[name].to_numpy().astype(np.float64) for name in ("n_tokens", "log_ratio_sum"))
    if not len(rows):
        return LengthSlope(np.nan, np.nan, np.nan, 0, 0, "no data")
    prompt_S = rows["prompt_id"].to_numpy()
    x_S, y_S = x_S - x_S.mean(), y_S - y_S.mean()
    spread_C = cluster_sums(np.square(x_S), prompt_S)
    slope = ratio_mean_interval(1000 * cluster_sums(x_S * y_S, prompt_S), spread_C, "signed").one()
    note = "all responses are equally long" if not spread_C.sum() else slope.note
    return LengthSlope(slope.value, slope.low, slope.high, len(rows), slope.n_clusters, note)


class _Sums:
    """Means over the tokens of each sequence; NaN over none."""

    def __init__(self, row_T: NDArray[np.intp], n_sequences: int, diff_T: Float64) -> None:
        self.row_T, self.diff_T = row_T, diff_T
        self.n_S = np.bincount(row_T, minlength=n_sequences).astype(np.int64)

    def mean(self, values_T: NDArray[Any]) -> Float64:
        sums_S = np.bincount(self.row_T, weights=values_T, minlength=len(self.n_S))
        return np.asarray(sums_S / np.where(self.n_S == 0, np.nan, self.n_S))


def _worst_in_sequences(
    row_T: NDArray[np.intp], n_rows: int, size_T: Float64, position_T: NDArray[Any], scored_T: NDArray[np.bool_]
) -> tuple[Float64, NDArray[np.int64]]:
    """(largest abs diff, its first position) by sequence; (NaN, -1) without a scored token."""
    max_S, position_S = np.full(n_rows, np.nan), np.full(n_rows, -1, dtype=np.int64)
    np.fmax.at(max_S, row_T[scored_T], size_T[scored_T])
    worst = np.flatnonzero(scored_T & (size_T == max_S[row_T]))
    worst = worst[np.argsort(position_T[worst], kind="stable")[::-1]]  # written last, the first position stays
    position_S[row_T[worst]] = position_T[worst]
    return max_S, position_S


def _first_flips(
    tokens: pd.DataFrame, row_T: NDArray[np.intp], n_rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(position, layer) of the first flip by sequence, -1 without one."""
    position_S, layer_S = np.full(n_rows, -1, dtype=np.int64), np.full(n_rows, -1, dtype=np.int64)
    flipped = np.flatnonzero(tokens["n_flipped_layers"].to_numpy() > 0)
    position_T = tokens["position"].to_numpy()
    flipped = flipped[np.argsort(position_T[flipped], kind="stable")[::-1]]
    position_S[row_T[flipped]] = position_T[flipped]
    layer_S[row_T[flipped]] = tokens["first_flipped_layer"].to_numpy()[flipped]
    return position_S, layer_S
