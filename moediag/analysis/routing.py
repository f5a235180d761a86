"""Routing agreement of two arms: one streaming pass into per-prompt counts, then frames.

Invariants:
    - :class:`RoutingTotals` holds integer counts per (prompt, layer); ``merge(parts)`` equals the whole, so
      blocks may be counted anywhere and in any order (gate mass is float64: equal to rounding);
    - a (token, layer) with an absent id in either arm is not compared; quantities over all layers of a token
      (any-layer share, flips per token, cumulative agreement) use only what is compared in all of them;
    - rows are those *behind* the response tokens (see :mod:`moediag.run.align`), whether or not a
      log-probability came with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import AGREEMENT_BY_LAYER, FLIPS_PER_TOKEN
from moediag.analysis.expert_sets import ExpertComparison, compare_block
from moediag.analysis.intervals import Interval, Intervals, cluster_sums, ratio_mean_interval
from moediag.analysis.tokens import logp_diff
from moediag.errors import MoediagError
from moediag.run.align import Pair, PairBlock

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class RoutingTotals:
    """Counts over (token, layer) choices by prompt (C, ascending ``prompt_id_C``) and MoE layer (L).

    Args:
        prompt_id_C: the prompts seen.
        n_compared_CL, n_same_CL, n_reorder_CL: choices compared, with equal sets, equal but reordered.
        n_common_CL: experts in both sets, summed over choices.
        n_prefix_CL, n_prefix_same_CL: tokens compared, and same, in all layers 0..l.
        n_complete_C, n_any_flip_C: tokens compared in every layer, and those with at least one flip.
        mass_CL, n_mass_CL: train's gate weight on experts that infer did not choose, and choices behind it.
        top_k: K.
    """

    prompt_id_C: Int64
    n_compared_CL: Int64
    n_same_CL: Int64
    n_reorder_CL: Int64
    n_common_CL: Int64
    n_prefix_CL: Int64
    n_prefix_same_CL: Int64
    n_complete_C: Int64
    n_any_flip_C: Int64
    mass_CL: Float64
    n_mass_CL: Int64
    top_k: int

    @staticmethod
    def empty(n_layers: int, top_k: int) -> RoutingTotals:
        """Totals of nothing: the neutral element of :meth:`merge`."""
        none_C, none_CL = np.zeros(0, np.int64), np.zeros((0, n_layers), np.int64)
        counts: dict[str, Any] = {f.name: none_CL for f in fields(RoutingTotals) if f.name.endswith("_CL")}
        counts["mass_CL"] = none_CL.astype(np.float64)
        return RoutingTotals(prompt_id_C=none_C, n_complete_C=none_C, n_any_flip_C=none_C, top_k=top_k, **counts)

    @staticmethod
    def of_block(block: PairBlock, seen: ExpertComparison, top_k: int) -> RoutingTotals:
        """Totals of one block, given its expert comparison."""
        add = _adder(block.prompt_id_T)
        prefix_TL = np.logical_and.accumulate(seen.is_compared_TL, axis=1)
        same_prefix_TL = np.logical_and.accumulate(seen.is_same_TL, axis=1)
        complete_T = seen.is_complete_T
        mass_TL, has_mass_TL = _misrouted_mass(block, seen)
        return RoutingTotals(
            np.unique(block.prompt_id_T).astype(np.int64),
            add(seen.is_compared_TL),
            add(seen.is_same_TL),
            add(seen.is_reorder_TL),
            add(seen.n_common_TL),
            add(prefix_TL),
            add(same_prefix_TL),
            add(complete_T),
            add(complete_T & seen.is_flip_TL.any(axis=1)),
            cluster_sums(mass_TL, block.prompt_id_T),
            add(has_mass_TL),
            top_k,
        )

    @staticmethod
    def merge(parts: Iterable[RoutingTotals]) -> RoutingTotals:
        """Totals of all parts together; a prompt may appear in several.

        Raises:
            MoediagError: there is no part at all.
        """
        some = list(parts)
        if not some:
            raise MoediagError("nothing to merge: pass at least RoutingTotals.empty(n_layers, top_k)")
        prompt_T = np.concatenate([part.prompt_id_C for part in some])
        prompt_C, row_T = np.unique(prompt_T, return_inverse=True)
        merged: dict[str, Any] = {"prompt_id_C": prompt_C, "top_k": max(part.top_k for part in some)}
        for name in (f.name for f in fields(RoutingTotals) if f.name not in merged):
            stacked = np.concatenate([getattr(part, name) for part in some])
            total = np.zeros((len(prompt_C), *stacked.shape[1:]), stacked.dtype)
            np.add.at(total, row_T, stacked)
            merged[name] = total
        return RoutingTotals(**merged)


@dataclass(frozen=True)
class RoutingRates:
    """Routing agreement over all layers; every rate lies in [0, 1] and 0 is perfect agreement.

    Args:
        flip_rate: share of (token, layer) choices whose expert set differs.
        any_layer_share: share of tokens with at least one flipped layer.
        misrouted_mass: mean gate weight, train side, on experts that infer did not choose [gate weight].
        independent_any_layer_share: 1 - prod(1 - p_l), what independent layers would give.
        n_choices, n_tokens: choices compared; tokens compared in every layer.
    """

    flip_rate: Interval
    any_layer_share: Interval
    misrouted_mass: Interval
    independent_any_layer_share: float
    n_choices: int
    n_tokens: int


def routing_totals(pair: Pair) -> RoutingTotals:
    """Counts of the whole pair, in one pass over its blocks."""
    parts = [RoutingTotals.empty(pair.n_layers, pair.top_k)]
    for block in pair.blocks():
        if (seen := compare_block(block)) is not None:
            parts.append(RoutingTotals.of_block(block, seen, pair.top_k))
    return RoutingTotals.merge(parts)


def agreement_by_layer(totals: RoutingTotals, decoder_layer_L: tuple[int, ...]) -> pd.DataFrame:
    """Agreement of the expert sets by depth, per layer and cumulative (both readings of "10 % lost with depth").

    Args:
        totals: counts of the pair.
        decoder_layer_L: decoder layer of every MoE layer.

    Returns:
        Frame ``agreement_by_layer``; 1 is perfect agreement in every rate but ``reorder_rate`` (harmless).

    Source: IcePop post (one sentence, no definition); R3 (arXiv 2510.11370) for the per-layer share.
    """
    same = ratio_mean_interval(totals.n_same_CL, totals.n_compared_CL, "rate")
    cumulative = ratio_mean_interval(totals.n_prefix_same_CL, totals.n_prefix_CL, "rate")
    overlap = ratio_mean_interval(totals.n_common_CL, totals.n_compared_CL * totals.top_k, "rate")
    reorder = ratio_mean_interval(totals.n_reorder_CL, totals.n_compared_CL, "rate")
    frame = pd.DataFrame(
        {
            "layer": np.arange(len(decoder_layer_L)),
            "decoder_layer": np.array(decoder_layer_L, dtype=np.int64),
            "n_tokens": totals.n_compared_CL.sum(axis=0),
            **_with_bounds("same_set_rate", same),
            **_with_bounds("cumulative_same_set_rate", cumulative),
            **_with_bounds("overlap", overlap),
            "reorder_rate": reorder.value_M,
        }
    )
    return AGREEMENT_BY_LAYER.validate(frame)


def routing_rates(totals: RoutingTotals) -> RoutingRates:
    """Flip rate over all choices and any-layer share over tokens, with intervals clustered by prompt.

    Source: R3 (arXiv 2510.11370): about 10 % of choices and 94 % of tokens on Qwen3-30B-A3B.
    """
    n_compared_C = totals.n_compared_CL.sum(axis=1)
    flip = ratio_mean_interval(n_compared_C - totals.n_same_CL.sum(axis=1), n_compared_C, "rate")
    any_layer = ratio_mean_interval(totals.n_any_flip_C, totals.n_complete_C, "rate")
    mass = ratio_mean_interval(totals.mass_CL.sum(axis=1), totals.n_mass_CL.sum(axis=1), "positive")
    return RoutingRates(
        flip_rate=flip.one(),
        any_layer_share=any_layer.one(),
        misrouted_mass=mass.one(),
        independent_any_layer_share=float(1 - _independent_flips(layer_flip_rates(totals))[0]),
        n_choices=int(n_compared_C.sum()),
        n_tokens=int(totals.n_complete_C.sum()),
    )


def layer_flip_rates(totals: RoutingTotals) -> Float64:
    """Flip rate of every MoE layer, in [0, 1]; NaN where nothing was compared."""
    n_L = totals.n_compared_CL.sum(axis=0)
    return np.asarray(1 - totals.n_same_CL.sum(axis=0) / np.where(n_L == 0, np.nan, n_L), dtype=np.float64)


def flips_per_token(tokens: pd.DataFrame, totals: RoutingTotals) -> pd.DataFrame:
    """How many layers flip per token, against what independent layers would give, and what it costs in logp.

    Args:
        tokens: token frame of the pair.
        totals: counts of the same pair.

    Returns:
        Frame ``flips_per_token``, one row for 0 .. most flipped layers seen. A heavier tail than
        ``independent_share`` means that flips cluster in tokens.

    Source: R3 (arXiv 2510.11370) for the distribution; the Poisson-binomial reference is ours.
    """
    n_flipped_T = tokens["n_flipped_layers"].to_numpy()
    known_T = n_flipped_T >= 0
    n_rows = int(n_flipped_T.max(initial=-1)) + 1
    count_N = np.bincount(n_flipped_T[known_T], minlength=n_rows)
    abs_diff_T = np.abs(logp_diff(tokens))
    groups = [abs_diff_T[(n_flipped_T == n) & np.isfinite(abs_diff_T)] for n in range(n_rows)]
    frame = pd.DataFrame(
        {
            "n_flipped_layers": np.arange(n_rows),
            "n_tokens": count_N,
            "share": count_N / max(int(known_T.sum()), 1),
            "independent_share": _independent_flips(layer_flip_rates(totals))[:n_rows],
            "abs_logp_diff_mean": [_or_nan(np.mean, group) for group in groups],
            "abs_logp_diff_p99": [_or_nan(lambda x: np.quantile(x, 0.99), group) for group in groups],
        }
    )
    return FLIPS_PER_TOKEN.validate(frame)


def _adder(prompt_id_T: Int64) -> Callable[[NDArray[Any]], Int64]:
    """Sum token rows by prompt into int64 counts."""
    order = np.argsort(prompt_id_T, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(prompt_id_T[order]) != 0]) if len(order) else order

    def add(values: NDArray[Any]) -> Int64:
        if not len(starts):
            return np.zeros((0, *values.shape[1:]), np.int64)
        return np.asarray(np.add.reduceat(values[order], starts, axis=0, dtype=np.int64))

    return add


def _misrouted_mass(block: PairBlock, seen: ExpertComparison) -> tuple[Float64, NDArray[np.bool_]]:
    """Train's gate weight on experts that infer did not choose, (T, L), and where it is known."""
    mass_TL = np.zeros(seen.is_compared_TL.shape)
    weights_TLK = block.gate_weights_train_TLK
    if weights_TLK is None or block.expert_ids_train_TLK is None or block.expert_ids_infer_TLK is None:
        return mass_TL, np.zeros(mass_TL.shape, bool)
    known_TL = seen.is_compared_TL & np.isfinite(weights_TLK).all(axis=2)
    flipped = np.nonzero(known_TL & seen.is_flip_TL)  # only flips carry mass: a few per cent of the rows
    train_NK, infer_NK = block.expert_ids_train_TLK[flipped], block.expert_ids_infer_TLK[flipped]
    only_train_NK = ~(train_NK[:, :, None] == infer_NK[:, None, :]).any(axis=2)
    mass_TL[flipped] = (weights_TLK[flipped].astype(np.float64) * only_train_NK).sum(axis=1)
    return mass_TL, known_TL


def _independent_flips(rate_L: Float64) -> Float64:
    """P(n layers flip), n = 0..L, when layers flip independently (Poisson-binomial, by convolution)."""
    share = np.ones(1)
    for rate in rate_L:
        share = np.convolve(share, [1 - rate, rate])
    return share


def _with_bounds(name: str, intervals: Intervals) -> dict[str, Float64]:
    return {name: intervals.value_M, f"{name}_ci_low": intervals.low_M, f"{name}_ci_high": intervals.high_M}


def _or_nan(reduce: Callable[[Float64], Any], values: Float64) -> float:
    """A reduction, or NaN over nothing."""
    return float(reduce(values)) if len(values) else float("nan")
