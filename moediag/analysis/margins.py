"""Margins against flips: P(flip | margin) and margin quantiles, streamed in bounded memory.

Invariants:
    - the margin is the *infer* arm's, binned exactly in float64; exact ties (0) are a bin of their own, and
      so are negative logit margins (a bias or group rule overruled the logits);
    - :class:`MarginTotals` holds integer counts only, so ``merge(parts)`` equals the whole exactly;
    - quantiles come from counts keyed by a float32's sign, exponent and top 11 mantissa bits: the order
      statistic of rank ceil(q n) to a relative error of 2^-12, from 8 MB per group however many choices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import MARGIN_CURVE, MARGIN_QUANTILES
from moediag.analysis.expert_sets import ExpertComparison, compare_block
from moediag.analysis.intervals import ratio_mean_interval
from moediag.run.align import Pair, PairBlock

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

SPACES: Final = ("choice", "logit")
POOLED: Final = -1
_EDGES: Final = 10.0 ** (np.arange(-24, 9) / 4)  # 1e-6 .. 100, four bins per decade
BIN_LOW: Final = np.r_[-np.inf, 0.0, 0.0, _EDGES]
BIN_HIGH: Final = np.r_[0.0, 0.0, _EDGES, np.inf]
_TIE_BIN: Final = 1
_N_BINS: Final = len(BIN_LOW)
_KEY_SHIFT: Final = 12  # 32 - 12 = 20 bits: sign, 8 exponent, 11 mantissa
_N_KEYS: Final = 1 << (32 - _KEY_SHIFT)
_CHOICES_PER_CHUNK: Final = 1_000_000
_QUANTILES: Final = {"p01": 0.01, "p10": 0.10, "p50": 0.50, "p90": 0.90, "p99": 0.99}


@dataclass(frozen=True)
class MarginTotals:
    """Counts of choices and flips by margin, in one score space.

    Args:
        prompt_id_C: the prompts seen, ascending.
        n_CB, flips_CB: choices, and those that flipped, by prompt and margin bin.
        n_LB, flips_LB: the same by MoE layer and margin bin.
        n_Q, flips_Q: the same by float32 key, for quantiles.
    """

    prompt_id_C: Int64
    n_CB: Int64
    flips_CB: Int64
    n_LB: Int64
    flips_LB: Int64
    n_Q: Int64
    flips_Q: Int64

    @staticmethod
    def empty(n_layers: int) -> MarginTotals:
        """Totals of nothing: the neutral element of :meth:`merge`."""
        none_CB, none_LB = np.zeros((0, _N_BINS), np.int64), np.zeros((n_layers, _N_BINS), np.int64)
        none_Q = np.zeros(_N_KEYS, np.int64)
        return MarginTotals(np.zeros(0, np.int64), none_CB, none_CB, none_LB, none_LB.copy(), none_Q, none_Q.copy())

    def add_block(self, block: PairBlock, seen: ExpertComparison, space: str) -> MarginTotals:
        """These totals and one block's, given its expert comparison; a space without margins adds nothing.

        The per-layer and per-key counts are added *in place* (8 MB each): use only the returned totals.
        """
        margin_TL = block.margin_infer_TL if space == "choice" else block.logit_margin_infer_TL
        if margin_TL is None or not len(block):
            return self
        prompts, row_T = np.unique(block.prompt_id_T, return_inverse=True)
        n_CB = np.zeros((len(prompts), _N_BINS), np.int64)
        flips_CB = np.zeros_like(n_CB)
        step = max(1, _CHOICES_PER_CHUNK // max(1, margin_TL.shape[1]))
        for rows in (slice(first, first + step) for first in range(0, len(block), step)):
            kept_TL = seen.is_compared_TL[rows] & ~np.isnan(margin_TL[rows])
            for chosen_TL, by_C, by_L, by_Q in (
                (kept_TL, n_CB, self.n_LB, self.n_Q),
                (kept_TL & ~seen.is_same_TL[rows], flips_CB, self.flips_LB, self.flips_Q),
            ):
                token_N, layer_N = np.nonzero(chosen_TL)
                margin_N = margin_TL[rows][chosen_TL] + np.float32(0)  # -0.0 is a tie like any other
                bin_N = _bin_index(margin_N)
                by_C += _count(row_T[rows][token_N] * _N_BINS + bin_N, by_C)
                by_L += _count(layer_N * _N_BINS + bin_N, by_L)
                by_Q += _count(_keys(margin_N), by_Q)
        all_prompts, n_all_CB, flips_all_CB = _merge_prompts(
            [(self.prompt_id_C, self.n_CB, self.flips_CB), (prompts.astype(np.int64), n_CB, flips_CB)]
        )
        return MarginTotals(all_prompts, n_all_CB, flips_all_CB, self.n_LB, self.flips_LB, self.n_Q, self.flips_Q)

    @staticmethod
    def merge(parts: Iterable[MarginTotals]) -> MarginTotals:
        """Totals of all parts together (at least one); a prompt may appear in several."""
        some = list(parts)
        prompts, n_CB, flips_CB = _merge_prompts([(p.prompt_id_C, p.n_CB, p.flips_CB) for p in some])
        summed = {
            name: np.sum([getattr(part, name) for part in some], axis=0)
            for name in ("n_LB", "flips_LB", "n_Q", "flips_Q")
        }
        return MarginTotals(prompts, n_CB, flips_CB, **summed)


def margin_totals(pair: Pair) -> dict[str, MarginTotals]:
    """Counts of the whole pair by score space, in one pass over its blocks."""
    totals = {space: MarginTotals.empty(pair.n_layers) for space in SPACES}
    for block in pair.blocks():
        if (seen := compare_block(block)) is not None:
            totals = {space: totals[space].add_block(block, seen, space) for space in SPACES}
    return totals


def margin_curve(totals: dict[str, MarginTotals]) -> pd.DataFrame:
    """P(flip | infer's margin), pooled over layers (with an interval) and per layer; empty bins are left out.

    Args:
        totals: counts by score space.

    Returns:
        Frame ``margin_curve``; a healthy pair flips near ties only, so the curve falls to 0 with the margin.

    Source: TRM: a flip needs a margin below the perturbation; the binning is ours.
    """
    parts = []
    for space, total in totals.items():
        interval = ratio_mean_interval(total.flips_CB, total.n_CB, "rate")
        pooled = _curve_rows(space, POOLED, total.n_CB.sum(axis=0), total.flips_CB.sum(axis=0))
        pooled["flip_rate_ci_low"], pooled["flip_rate_ci_high"] = interval.low_M, interval.high_M
        parts.append(pooled)
        parts.extend(
            _curve_rows(space, layer, n_B, flips_B)
            for layer, (n_B, flips_B) in enumerate(zip(total.n_LB, total.flips_LB, strict=True))
        )
    names = [column.name for column in MARGIN_CURVE.columns]
    rows = {name: np.concatenate([part[name] for part in parts]) if parts else np.zeros(0) for name in names}
    frame = pd.DataFrame(rows)
    return MARGIN_CURVE.validate(frame[frame["n_choices"] > 0])


def margin_quantiles(totals: dict[str, MarginTotals]) -> pd.DataFrame:
    """Quantiles of infer's margin for all, flipped and kept choices, and how many are exact ties.

    Args:
        totals: counts by score space.

    Returns:
        Frame ``margin_quantiles``: order statistics to a relative 2^-12; a small margin means an easy flip.

    Source: ours; ties counted apart because bf16 router logits make many (rule D16).
    """
    records = []
    for space, total in totals.items():
        kept_Q, kept_B = total.n_Q - total.flips_Q, (total.n_LB - total.flips_LB).sum(axis=0)
        groups = {
            "all": (total.n_Q, total.n_LB.sum(axis=0)),
            "flipped": (total.flips_Q, total.flips_LB.sum(axis=0)),
            "kept": (kept_Q, kept_B),
        }
        for group, (count_Q, count_B) in groups.items():
            record = {"space": space, "group": group, "n_choices": int(count_B.sum())}
            record["n_exact_ties"] = int(count_B[_TIE_BIN])
            records.append({**record, **_key_quantiles(count_Q)})
    names = [column.name for column in MARGIN_QUANTILES.columns]
    return MARGIN_QUANTILES.validate(pd.DataFrame.from_records(records, columns=names))


def _bin_index(margin_N: NDArray[np.float32]) -> Int64:
    """Margin bin of every choice: 0 negative, 1 exact tie, 2.. positive by edges."""
    # float64 before comparing: an edge such as 10^-5.75 is no float32
    index_N = np.searchsorted(_EDGES, margin_N.astype(np.float64), side="right") + 2
    return np.asarray(np.where(margin_N > 0, index_N, np.where(margin_N < 0, 0, _TIE_BIN)), dtype=np.int64)


def _count(index_N: NDArray[Any], like: Int64) -> Int64:
    return np.bincount(index_N, minlength=like.size).astype(np.int64).reshape(like.shape)


def _keys(margin_N: NDArray[np.float32]) -> Int64:
    """Order-preserving integer key of a float32, without its 12 lowest mantissa bits."""
    bits_N = np.ascontiguousarray(margin_N, dtype=np.float32).view(np.uint32)
    ordered_N = np.where(bits_N >> 31, ~bits_N, bits_N | np.uint32(1 << 31))
    return (ordered_N >> _KEY_SHIFT).astype(np.int64)


def _key_value(key: int) -> float:
    """The middle of a key's interval; the key of 0 (and of subnormals near it) gives 0."""
    zero_key = 1 << (31 - _KEY_SHIFT)
    if key in (zero_key, zero_key - 1):
        return 0.0
    ordered = (key << _KEY_SHIFT) | (1 << (_KEY_SHIFT - 1))
    bits = ordered ^ (1 << 31) if ordered >> 31 else ~ordered & 0xFFFFFFFF
    value = float(np.array([bits], dtype=np.uint32).view(np.float32)[0])
    if np.isnan(value):  # no NaN is ever counted: an exponent of all ones is an infinite margin (K = E)
        return float("inf") if ordered >> 31 else float("-inf")
    return value


def _key_quantiles(count_Q: Int64) -> dict[str, float]:
    present = np.flatnonzero(count_Q)  # a few thousand of a million keys
    if not len(present):
        return dict.fromkeys(_QUANTILES, float("nan"))
    cumulative = np.cumsum(count_Q[present])
    n_choices = int(cumulative[-1])
    ranks = [max(1, int(np.ceil(q * n_choices))) for q in _QUANTILES.values()]
    keys = present[np.searchsorted(cumulative, ranks, side="left")]
    return {name: _key_value(int(key)) for name, key in zip(_QUANTILES, keys, strict=True)}


def _merge_prompts(parts: list[tuple[Int64, Int64, Int64]]) -> tuple[Int64, Int64, Int64]:
    prompts, row_P = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    merged = np.zeros((2, len(prompts), _N_BINS), np.int64)
    for i in (0, 1):
        np.add.at(merged[i], row_P, np.concatenate([part[i + 1] for part in parts]))
    return prompts, merged[0], merged[1]


def _curve_rows(space: str, layer: int, n_B: Int64, flips_B: Int64) -> dict[str, NDArray[Any]]:
    """Columns of the curve for one space and layer, every bin, bounds NaN."""
    return {
        "space": np.full(_N_BINS, space),
        "layer": np.full(_N_BINS, layer),
        "bin_low": BIN_LOW,
        "bin_high": BIN_HIGH,
        "n_choices": n_B,
        "n_flipped": flips_B,
        "flip_rate": flips_B / np.where(n_B == 0, np.nan, n_B),
        "flip_rate_ci_low": np.full(_N_BINS, np.nan),
        "flip_rate_ci_high": np.full(_N_BINS, np.nan),
    }
