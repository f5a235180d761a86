"""A pair analysed: every frame in one pass over its blocks, and the JSON-ready summary.

Invariants:
    - the blocks of a pair are read exactly once, and the two arms' experts compared once per block;
    - the summary is strict JSON: plain ints and floats, NaN and infinities become null, and every
      interval stands beside its value under ``<name>_ci`` as ``[low, high]`` or null.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moediag.analysis.expert_sets import compare_block
from moediag.analysis.intervals import Interval
from moediag.analysis.logprobs import logp_metrics, tail_curve
from moediag.analysis.margins import SPACES, MarginTotals, margin_curve, margin_quantiles
from moediag.analysis.positions import PositionSlope, drift_by_position, position_slope
from moediag.analysis.routing import (
    RoutingRates,
    RoutingTotals,
    agreement_by_layer,
    flips_per_token,
    routing_rates,
)
from moediag.analysis.tokens import concatenate_tokens, scored_tokens, token_columns
from moediag.corrections import icepop
from moediag.run.align import Pair

_SUMMARISED = (
    "abs_logp_diff.mean",
    "abs_logp_diff.p50",
    "abs_logp_diff.p90",
    "abs_logp_diff.p99",
    "abs_logp_diff.p999",
    "abs_logp_diff.max",
    "abs_prob_diff.mean",
    "abs_prob_diff.max",
    "kl_infer_train_k1",
    "kl_infer_train_k2",
    "kl_infer_train_k3",
    "mean_ratio",
    "extreme_share_2",
)


@dataclass(frozen=True)
class PairAnalysis:
    """Everything moediag says about a pair; routing parts are None for a dense model.

    Args:
        pair_name, minuend, subtrahend: as in :class:`~moediag.run.align.Pair`.
        n_sequences, n_prompts: with a response token, scored or not.
        n_tokens, n_unscored: response tokens scored by both arms, and not.
    """

    pair_name: str
    minuend: str
    subtrahend: str
    n_sequences: int
    n_prompts: int
    n_tokens: int
    n_unscored: int
    tokens: pd.DataFrame
    logp_metrics: pd.DataFrame
    tail_curve: pd.DataFrame
    drift_by_position: pd.DataFrame
    position_slope: PositionSlope
    corrections: pd.DataFrame
    routing_rates: RoutingRates | None = None
    agreement_by_layer: pd.DataFrame | None = None
    flips_per_token: pd.DataFrame | None = None
    margin_curve: pd.DataFrame | None = None
    margin_quantiles: pd.DataFrame | None = None

    def frames(self) -> dict[str, pd.DataFrame]:
        """The frames present, by declared name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, pd.DataFrame)}


def analyze_pair(pair: Pair) -> PairAnalysis:
    """Run every analysis of a pair in one pass over its blocks.

    Args:
        pair: two aligned arms of one run.

    Returns:
        Declared frames and scalars; a pair without tokens gives NaN values with n = 0.
    """
    token_parts, routing_parts = [], [RoutingTotals.empty(pair.n_layers, pair.top_k)]
    margins = {space: MarginTotals.empty(pair.n_layers) for space in SPACES} if pair.is_routed else {}
    for block in pair.blocks():
        seen = compare_block(block) if pair.is_routed else None
        token_parts.append(token_columns(block, seen))
        if seen is not None:
            routing_parts.append(RoutingTotals.of_block(block, seen, pair.top_k))
            margins = {space: total.add_block(block, seen, space) for space, total in margins.items()}
    tokens = concatenate_tokens(token_parts)
    scored = scored_tokens(tokens)
    return PairAnalysis(
        pair_name=pair.name,
        minuend=pair.minuend,
        subtrahend=pair.subtrahend,
        n_sequences=tokens["seq_id"].nunique(),
        n_prompts=tokens["prompt_id"].nunique(),
        n_tokens=len(scored),
        n_unscored=len(tokens) - len(scored),
        tokens=tokens,
        logp_metrics=logp_metrics(tokens),
        tail_curve=tail_curve(tokens),
        drift_by_position=drift_by_position(tokens, pair.n_layers),
        position_slope=position_slope(tokens),
        corrections=icepop.corrections_table(tokens),
        **_routing_parts(pair, tokens, RoutingTotals.merge(routing_parts), margins),
    )


def pair_summary(analysis: PairAnalysis) -> dict[str, Any]:
    """The contract's summary of a pair, ready for strict ``json.dumps(..., allow_nan=False)``.

    Args:
        analysis: what :func:`analyze_pair` gave.

    Returns:
        Nested dict; ``routing`` and ``margins`` are None for a dense model. Units are the frames'.
    """
    slope = analysis.position_slope
    return {
        "n_sequences": int(analysis.n_sequences),
        "n_prompts": int(analysis.n_prompts),
        "n_tokens": int(analysis.n_tokens),
        "n_unscored": int(analysis.n_unscored),
        "logp": _logp_summary(analysis.logp_metrics),
        "routing": _routing_summary(analysis),
        "margins": _margin_summary(analysis.margin_quantiles),
        "position": {
            "slope_per_1k_tokens": _number(slope.value),
            "slope_per_1k_tokens_ci": _bounds(slope.low, slope.high),
            "n_tokens": slope.n_tokens,
            "n_sequences": slope.n_sequences,
        },
        "corrections": {str(row["method"]): _correction_summary(row) for _, row in analysis.corrections.iterrows()},
    }


def _routing_parts(
    pair: Pair, tokens: pd.DataFrame, totals: RoutingTotals, margins: dict[str, MarginTotals]
) -> dict[str, Any]:
    if not pair.is_routed:
        return {}
    return {
        "routing_rates": routing_rates(totals),
        "agreement_by_layer": agreement_by_layer(totals, pair.decoder_layer_L),
        "flips_per_token": flips_per_token(tokens, totals),
        "margin_curve": margin_curve(margins),
        "margin_quantiles": margin_quantiles(margins),
    }


def _number(value: Any) -> float | None:
    """A plain float, or None for what JSON cannot hold."""
    return float(value) if math.isfinite(value) else None


def _bounds(low: Any, high: Any) -> list[float] | None:
    return [float(low), float(high)] if math.isfinite(low) and math.isfinite(high) else None


def _entry(name: str, interval: Interval) -> dict[str, Any]:
    return {name: _number(interval.value), f"{name}_ci": _bounds(interval.low, interval.high)}


def _logp_summary(metrics: pd.DataFrame) -> dict[str, Any]:
    """The contract's metrics, dotted names nested one level."""
    by_name = metrics.set_index("metric")
    summary: dict[str, Any] = {}
    for metric in _SUMMARISED:
        value, low, high = by_name.loc[metric, ["value", "ci_low", "ci_high"]].to_numpy(dtype=np.float64)
        group, _, leaf = metric.rpartition(".")
        into = summary.setdefault(group, {}) if group else summary
        into.update({leaf: _number(value), f"{leaf}_ci": _bounds(low, high)})
    return summary


def _routing_summary(analysis: PairAnalysis) -> dict[str, Any] | None:
    rates, layers = analysis.routing_rates, analysis.agreement_by_layer
    if rates is None or layers is None:
        return None
    return {
        **_entry("flip_rate", rates.flip_rate),
        **_entry("any_layer_share", rates.any_layer_share),
        **_entry("misrouted_mass", rates.misrouted_mass),
        "independent_any_layer_share": _number(rates.independent_any_layer_share),
        "n_choices": rates.n_choices,
        "by_layer": [_layer_summary(row) for _, row in layers.iterrows()],
    }


def _layer_summary(row: pd.Series[Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {name: int(row[name]) for name in ("layer", "decoder_layer", "n_tokens")}
    for name in ("same_set_rate", "cumulative_same_set_rate", "overlap"):
        summary[name] = _number(row[name])
        summary[f"{name}_ci"] = _bounds(row[f"{name}_ci_low"], row[f"{name}_ci_high"])
    return summary


def _margin_summary(quantiles: pd.DataFrame | None) -> dict[str, Any] | None:
    """Quantiles by space and group; the share of exact ties among the choices of each group."""
    if quantiles is None:
        return None
    summary: dict[str, Any] = {}
    for _, row in quantiles.iterrows():
        n_choices = int(row["n_choices"])
        summary.setdefault(str(row["space"]), {})[str(row["group"])] = {
            "n_choices": n_choices,
            "exact_tie_share": int(row["n_exact_ties"]) / n_choices if n_choices else None,
            **{name: _number(row[name]) for name in ("p01", "p10", "p50", "p90", "p99")},
        }
    logit = summary.get("logit", {})
    summary["median_logit_margin_all"] = logit.get("all", {}).get("p50")
    summary["median_logit_margin_flipped"] = logit.get("flipped", {}).get("p50")
    summary["exact_tie_share"] = summary.get("choice", {}).get("all", {}).get("exact_tie_share")
    return summary


def _correction_summary(row: pd.Series[Any]) -> dict[str, Any]:
    return {
        "masked_share": _number(row["masked_share"]),
        "masked_share_ci": _bounds(row["masked_share_ci_low"], row["masked_share_ci_high"]),
        "below_share": _number(row["below_share"]),
        "above_share": _number(row["above_share"]),
    }
