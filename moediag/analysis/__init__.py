"""Analyses: aligned arms in, declared frames out. No engine, no figure; no file is written.

Importing this package declares every frame (see :func:`moediag.frames.declared_frames`). Every analysis takes any pair,
so the floors of an engine against itself are the same functions on the same frames.
"""

from moediag.analysis.aliases import ALIASES, Alias, aliases_of
from moediag.analysis.attribution import flip_excess
from moediag.analysis.choice_scores import RoutingRule, choice_scores
from moediag.analysis.entropies import entropy_quantiles
from moediag.analysis.flip_maps import FlipMap, SwapTotals, expert_swaps, flips_by_layer_position
from moediag.analysis.flips.explained import explain_flips, forecast_flips, predict_flips
from moediag.analysis.flips.noise import measure_noise
from moediag.analysis.flips.predictor import border_flip_probability, set_flip_probability
from moediag.analysis.gradients import audit_frames
from moediag.analysis.logprobs import logp_metrics, ratio_quantiles, tail_curve
from moediag.analysis.margins import MarginTotals, margin_curve, margin_noise, margin_quantiles, margin_totals
from moediag.analysis.measures import binary_kl
from moediag.analysis.pair_analysis import PairAnalysis, analyze_pair
from moediag.analysis.positions import PositionSlope, drift_by_position, position_slope
from moediag.analysis.routing import RoutingRates, agreement_by_layer, flips_per_token, routing_rates
from moediag.analysis.routing_counts import RoutingTotals, routing_totals
from moediag.analysis.sequences import (
    LengthSlope,
    drift_by_length,
    first_divergence,
    length_slope,
    sequence_frame,
    worst_tokens,
)
from moediag.analysis.series import step_metrics, trend_of, trend_recurrence
from moediag.analysis.strata import metrics_by_stratum
from moediag.analysis.streaming import RoutingPass, read_pair
from moediag.analysis.summary import pair_summary
from moediag.analysis.tokens import Tokens, token_frame
from moediag.analysis.vocabulary import ExactDivergences, divergences, exact_divergences
from moediag.statistics.intervals import Interval, Intervals, jackknife_interval, mean_interval, ratio_mean_interval
from moediag.statistics.quantiles import quantile_interval
from moediag.statistics.recurrence import Recurrence, fit_recurrence

__all__ = [
    "ALIASES",
    "Alias",
    "ExactDivergences",
    "FlipMap",
    "Interval",
    "Intervals",
    "LengthSlope",
    "MarginTotals",
    "PairAnalysis",
    "PositionSlope",
    "Recurrence",
    "RoutingPass",
    "RoutingRates",
    "RoutingRule",
    "RoutingTotals",
    "SwapTotals",
    "Tokens",
    "agreement_by_layer",
    "aliases_of",
    "analyze_pair",
    "audit_frames",
    "binary_kl",
    "border_flip_probability",
    "choice_scores",
    "divergences",
    "drift_by_length",
    "drift_by_position",
    "entropy_quantiles",
    "exact_divergences",
    "expert_swaps",
    "explain_flips",
    "first_divergence",
    "fit_recurrence",
    "flip_excess",
    "flips_by_layer_position",
    "flips_per_token",
    "forecast_flips",
    "jackknife_interval",
    "length_slope",
    "logp_metrics",
    "margin_curve",
    "margin_noise",
    "margin_quantiles",
    "margin_totals",
    "mean_interval",
    "measure_noise",
    "metrics_by_stratum",
    "pair_summary",
    "position_slope",
    "predict_flips",
    "quantile_interval",
    "ratio_mean_interval",
    "ratio_quantiles",
    "read_pair",
    "routing_rates",
    "routing_totals",
    "sequence_frame",
    "set_flip_probability",
    "step_metrics",
    "tail_curve",
    "token_frame",
    "trend_of",
    "trend_recurrence",
    "worst_tokens",
]
