"""A pair analysed: every frame of it, in one pass over its blocks.

Invariant: the blocks of a pair are read exactly once, and the two arms' experts compared once per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from moediag.analysis.attribution import flip_excess, flip_shares
from moediag.analysis.flip_maps import FlipMap, SwapTotals, expert_swaps, flips_by_layer_position
from moediag.analysis.logprobs import entropy_quantiles, logp_metrics, ratio_quantiles, tail_curve
from moediag.analysis.margins import margin_curve, margin_noise, margin_quantiles
from moediag.analysis.positions import PositionSlope, drift_by_position, position_slope
from moediag.analysis.routing import RoutingRates, agreement_by_layer, flips_per_token, routing_rates
from moediag.analysis.sequences import (
    LengthSlope,
    drift_by_length,
    first_divergence,
    length_slope,
    sequence_frame,
    worst_tokens,
)
from moediag.analysis.strata import metrics_by_stratum
from moediag.analysis.streaming import RoutingPass, read_pair
from moediag.analysis.tokens import Tokens
from moediag.corrections import masked_shares
from moediag.run.align import Pair
from moediag.run.capture import is_impossible


@dataclass(frozen=True)
class PairAnalysis:
    """Everything moediag says about a pair; routing parts are None for a dense model.

    Margin frames are None, too, where neither arm captured margins.

    Args:
        pair_name, minuend, subtrahend: as in :class:`~moediag.run.align.Pair`.
        n_sequences, n_prompts: with a token that both arms scored.
        n_tokens, n_unscored: response tokens scored by both arms, and not.
        n_impossible: of those not scored, tokens with an infinite log-probability (D31-impossible-logp).
        left_out: what could not be compared (``routing``) -> why.
    """

    pair_name: str
    minuend: str
    subtrahend: str
    n_sequences: int
    n_prompts: int
    n_tokens: int
    n_unscored: int
    n_impossible: int
    left_out: dict[str, str]
    tokens: pd.DataFrame
    logp_metrics: pd.DataFrame
    tail_curve: pd.DataFrame
    ratio_quantiles: pd.DataFrame
    metrics_by_stratum: pd.DataFrame
    entropy_quantiles: pd.DataFrame
    drift_by_position: pd.DataFrame
    position_slope: PositionSlope
    sequences: pd.DataFrame
    worst_tokens: pd.DataFrame
    drift_by_length: pd.DataFrame
    length_slope: LengthSlope
    corrections: pd.DataFrame
    routing_rates: RoutingRates | None = None
    agreement_by_layer: pd.DataFrame | None = None
    flips_per_token: pd.DataFrame | None = None
    flips_by_layer_position: pd.DataFrame | None = None
    expert_swaps: pd.DataFrame | None = None
    first_divergence: pd.DataFrame | None = None
    flip_excess: pd.DataFrame | None = None
    flip_shares: pd.DataFrame | None = None
    margin_curve: pd.DataFrame | None = None
    margin_quantiles: pd.DataFrame | None = None
    margin_noise: pd.DataFrame | None = None

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
    frame, routing = read_pair(pair)
    tokens = Tokens(frame)
    sequences = sequence_frame(tokens, pair.n_layers)
    return PairAnalysis(
        pair_name=pair.name,
        minuend=pair.minuend,
        subtrahend=pair.subtrahend,
        n_sequences=tokens.n_sequences,
        n_prompts=tokens.n_prompts,
        n_tokens=len(tokens),
        n_unscored=len(frame) - len(tokens),
        n_impossible=int(is_impossible(frame["logp_train"].to_numpy(), frame["logp_infer"].to_numpy()).sum()),
        left_out=pair.left_out,
        tokens=frame,
        logp_metrics=logp_metrics(tokens),
        tail_curve=tail_curve(tokens),
        ratio_quantiles=ratio_quantiles(tokens),
        metrics_by_stratum=metrics_by_stratum(tokens, pair.n_layers),
        entropy_quantiles=entropy_quantiles(tokens),
        drift_by_position=drift_by_position(tokens, pair.n_layers),
        position_slope=position_slope(tokens),
        sequences=sequences,
        worst_tokens=worst_tokens(tokens),
        drift_by_length=drift_by_length(sequences),
        length_slope=length_slope(sequences),
        corrections=masked_shares(tokens),
        **(_routing_parts(pair, tokens, routing, sequences) if pair.is_routed else {}),
    )


def _routing_parts(pair: Pair, tokens: Tokens, routing: RoutingPass, sequences: pd.DataFrame) -> dict[str, Any]:
    totals, layers = routing.totals, pair.decoder_layer_L
    swaps = routing.swaps or SwapTotals.empty(pair.n_layers, pair.n_experts)
    parts: dict[str, Any] = {
        "routing_rates": routing_rates(totals),
        "agreement_by_layer": agreement_by_layer(totals, layers),
        "flips_per_token": flips_per_token(tokens, totals),
        "flips_by_layer_position": flips_by_layer_position(routing.flips or FlipMap.empty(pair.n_layers), layers),
        "expert_swaps": expert_swaps(swaps, layers),
        "first_divergence": first_divergence(sequences),
        "flip_excess": flip_excess(tokens),
        "flip_shares": flip_shares(tokens),
    }
    if margins := routing.known_margins:
        parts["margin_curve"] = margin_curve(margins)
        parts["margin_quantiles"] = margin_quantiles(margins)
        parts["margin_noise"] = margin_noise(margins)
    return parts
