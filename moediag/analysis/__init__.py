"""Analyses: aligned arms in, declared frames out. Pure: no engine, no file, no figure.

Importing this package declares every frame (see :func:`moediag.frames.declared_frames`).
"""

from moediag.analysis.intervals import Interval, Intervals, mean_interval, quantile_interval, ratio_mean_interval
from moediag.analysis.logprobs import logp_metrics, tail_curve
from moediag.analysis.margins import MarginTotals, margin_curve, margin_quantiles, margin_totals
from moediag.analysis.positions import PositionSlope, drift_by_position, position_slope
from moediag.analysis.routing import (
    RoutingRates,
    RoutingTotals,
    agreement_by_layer,
    flips_per_token,
    routing_rates,
    routing_totals,
)
from moediag.analysis.summary import PairAnalysis, analyze_pair, pair_summary
from moediag.analysis.tokens import logp_diff, scored_tokens, token_frame

__all__ = [
    "Interval",
    "Intervals",
    "MarginTotals",
    "PairAnalysis",
    "PositionSlope",
    "RoutingRates",
    "RoutingTotals",
    "agreement_by_layer",
    "analyze_pair",
    "drift_by_position",
    "flips_per_token",
    "logp_diff",
    "logp_metrics",
    "margin_curve",
    "margin_quantiles",
    "margin_totals",
    "mean_interval",
    "pair_summary",
    "position_slope",
    "quantile_interval",
    "ratio_mean_interval",
    "routing_rates",
    "routing_totals",
    "scored_tokens",
    "tail_curve",
    "token_frame",
]
