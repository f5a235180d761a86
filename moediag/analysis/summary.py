"""A pair's summary: the numbers of its analysis that summary.json keeps.

Invariant: strict JSON: plain ints and floats, NaN and infinities become null, and every interval stands beside its
value under ``<name>_ci`` as ``[low, high]`` or null; for means over tokens ``<name>_largest_prompt_share`` as well.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from moediag.analysis.pair_analysis import PairAnalysis
from moediag.analysis.sequences import (
    abs_log_ratio_mean,
)
from moediag.statistics.intervals import Interval

_SUMMARISED = (
    "abs_logp_diff.mean",
    "abs_logp_diff.p50",
    "abs_logp_diff.p90",
    "abs_logp_diff.p99",
    "abs_logp_diff.p999",
    "abs_logp_diff.max",
    "abs_prob_diff.mean",
    "abs_prob_diff.p99",
    "abs_prob_diff.max",
    "abs_prob_diff.std",
    "kl_infer_train_k1",
    "kl_infer_train_k2",
    "kl_infer_train_k3",
    "mean_ratio",
    "extreme_share_2",
    "bit_exact_share",
    "prob_mult_error",
    "binary_kl_infer_train",
    "binary_kl_train_infer",
    "pearson_p",
    "ess_token",
    "ess_sequence",
    "chi2_token",
    "chi2_sequence",
    "ppl_train",
    "ppl_infer",
    "log_ppl_gap",
    "log_ppl_abs_gap",
)
_RATES = (
    "flip_rate",
    "any_layer_share",
    "misrouted_mass",
    "overlap",
    "jaccard",
    "top1_rate",
    "reorder_rate",
    "clustering_ratio",
    "flip_dispersion",
)


def pair_summary(analysis: PairAnalysis) -> dict[str, Any]:
    """The contract's summary of a pair, ready for strict ``json.dumps(..., allow_nan=False)``.

    Args:
        analysis: what :func:`analyze_pair` gave.

    Returns:
        Nested dict; ``routing`` and ``margins`` are None for a dense model, or where ``left_out`` says why. Units are
        the frames'.
    """
    slope = analysis.position_slope
    return {
        "n_sequences": int(analysis.n_sequences),
        "n_prompts": int(analysis.n_prompts),
        "n_tokens": int(analysis.n_tokens),
        "n_unscored": int(analysis.n_unscored),
        "n_impossible": int(analysis.n_impossible),
        "left_out": dict(analysis.left_out),
        "logp": _logp_summary(analysis.logp_metrics),
        "routing": _routing_summary(analysis),
        "margins": _margin_summary(analysis.margin_quantiles),
        "position": {
            "slope_per_1k_tokens": _number(slope.value),
            "slope_per_1k_tokens_ci": _bounds(slope.low, slope.high),
            "n_tokens": slope.n_tokens,
            "n_sequences": slope.n_sequences,
        },
        "length": {
            **_entry("abs_log_ratio_mean", abs_log_ratio_mean(analysis.sequences)),
            "log_ratio_slope_per_1k_tokens": _number(analysis.length_slope.value),
            "log_ratio_slope_per_1k_tokens_ci": _bounds(analysis.length_slope.low, analysis.length_slope.high),
            "n_sequences": analysis.length_slope.n_sequences,
        },
        "flip_excess": _flip_excess_summary(analysis.flip_excess),
        "corrections": {str(row["method"]): _correction_summary(row) for _, row in analysis.corrections.iterrows()},
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
        value, low, high, largest = by_name.loc[
            metric, ["value", "ci_low", "ci_high", "largest_prompt_share"]
        ].to_numpy(dtype=np.float64)
        group, _, leaf = metric.rpartition(".")
        into = summary.setdefault(group, {}) if group else summary
        into.update({leaf: _number(value), f"{leaf}_ci": _bounds(low, high)})
        if math.isfinite(largest):
            into[f"{leaf}_largest_prompt_share"] = _number(largest)
    return summary


def _routing_summary(analysis: PairAnalysis) -> dict[str, Any] | None:
    rates, layers = analysis.routing_rates, analysis.agreement_by_layer
    if rates is None or layers is None:
        return None
    return {
        **{key: value for name in _RATES for key, value in _entry(name, getattr(rates, name)).items()},
        "independent_any_layer_share": _number(rates.independent_any_layer_share),
        "n_choices": rates.n_choices,
        "n_tokens": rates.n_tokens,
        "by_layer": [_layer_summary(row) for _, row in layers.iterrows()],
    }


def _layer_summary(row: pd.Series[Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {name: int(row[name]) for name in ("layer", "decoder_layer", "n_tokens")}
    for name in ("same_set_rate", "cumulative_same_set_rate", "overlap", "jaccard", "top1_rate", "misrouted_mass"):
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
            "side": str(row["side"]),
            "n_choices": n_choices,
            "exact_tie_share": int(row["n_exact_ties"]) / n_choices if n_choices else None,
            **{name: _number(row[name]) for name in ("p01", "p10", "p50", "p90", "p99")},
        }
    logit = summary.get("logit", {})
    summary["median_logit_margin_all"] = logit.get("all", {}).get("p50")
    summary["median_logit_margin_flipped"] = logit.get("flipped", {}).get("p50")
    summary["exact_tie_share"] = summary.get("choice", {}).get("all", {}).get("exact_tie_share")
    return summary


def _flip_excess_summary(excess: pd.DataFrame | None) -> dict[str, Any] | None:
    """Excess of abs(logp_diff) over all flipped tokens; None for a dense model or without a flip."""
    rows = excess[excess["grouping"] == "any_flip"] if excess is not None else None
    if rows is None or rows.empty:
        return None
    row = rows.iloc[0]
    names = ("flipped_mean", "unflipped_mean", "excess", "ratio", "raw_ratio")
    counts = {name: int(row[name]) for name in ("n_tokens", "n_unmatched")}
    bounds = {f"{name}_ci": _bounds(row[f"{name}_ci_low"], row[f"{name}_ci_high"]) for name in ("excess", "ratio")}
    matched_on = str(row["matched_on"])
    return {**{name: _number(row[name]) for name in names}, **bounds, "matched_on": matched_on, **counts}


def _correction_summary(row: pd.Series[Any]) -> dict[str, Any]:
    return {
        "masked_share": _number(row["masked_share"]),
        "masked_share_ci": _bounds(row["masked_share_ci_low"], row["masked_share_ci_high"]),
        "below_share": _number(row["below_share"]),
        "above_share": _number(row["above_share"]),
    }
