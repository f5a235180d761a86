"""The rule of every correction, one small function each: what multiplies a token's policy-gradient term.

Invariants:
    - 0 = no update; bounds are closed (a token or sequence exactly on a bound is kept, in float32 where its
      log-probabilities are float32) and tested in log space;
    - a *weight* rule gives ratios, truncated or masked; a *mask* rule says which tokens are kept; a *filter* rule says
      which tokens belong to a kept sequence;
    - token ratio, product ratio of a sequence and geometric mean ratio of a sequence are three different things.

What each is called, its parameters and its source stand in :mod:`moediag.corrections.methods`.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moediag.corrections.terms import LOG_RATIO_CLAMP, Float64, Terms, clamped_exp, on_bounds
from moediag.errors import MoediagError

Kept = NDArray[np.bool_]

_LARGEST_RATIO: Final = float(np.exp(LOG_RATIO_CLAMP))


def log_bound(bound: float) -> float:
    """A ratio's bound as a log-ratio; 0 leaves the side below open, infinity the side above."""
    # numpy's log, not math's: callers build values with np.log, and the two may differ in the last bit
    return float(np.log(bound)) if bound > 0 else -math.inf


def none(x: Terms) -> Float64:
    """1 for every token."""
    return np.ones(len(x))


def icepop(x: Terms, alpha: float, beta: float) -> Float64:
    """Ratio inside [alpha, beta], else 0."""
    return _masked(x, icepop_hard(x, alpha, beta))


def icepop_hard(x: Terms, alpha: float, beta: float) -> Kept:
    """Ratio inside [alpha, beta]."""
    return _is_inside(x.diff_T, x.is_float32_T, alpha, beta)


def tis_token(x: Terms, cap: float) -> Float64:
    """min(ratio, cap)."""
    return _truncated(x.diff_T, x.is_float32_T, cap)


def tis_sequence(x: Terms, cap: float) -> Float64:
    """min(product ratio, cap) for every token."""
    return x.of_sequence(_truncated(x.log_product_S, x.is_float32_S, cap))


def mis_token(x: Terms, cap: float) -> Float64:
    """Ratio up to cap, else 0."""
    return _masked(x, _at_most(x.diff_T, x.is_float32_T, log_bound(cap)))


def mis_sequence(x: Terms, cap: float) -> Float64:
    """Product ratio up to cap for every token, else 0."""
    is_kept_S = _at_most(x.log_product_S, x.is_float32_S, log_bound(cap))
    return x.of_sequence(np.where(is_kept_S, clamped_exp(x.log_product_S), 0.0))


def sequence_band(x: Terms, low: float, high: float) -> Kept:
    """Product ratio of the sequence inside [low, high]."""
    return x.of_sequence(_is_inside(x.log_product_S, x.is_float32_S, low, high))


def geometric_band(x: Terms, low: float, high: float) -> Kept:
    """Geometric mean ratio of the sequence inside [low, high]."""
    return x.of_sequence(_is_inside(x.log_geometric_mean_S, x.is_float32_S, low, high))


def veto(x: Terms, floor: float) -> Kept:
    """No ratio of the sequence below floor."""
    return x.of_sequence(_at_most(-x.least_S(x.diff_T), x.is_float32_S, -log_bound(floor)))


def kpop(x: Terms, phi: float) -> Float64:
    """Ratio where the binary KL is at most phi in both directions, else 0."""
    largest_T = np.maximum(x.binary_kl_train_infer_T, x.binary_kl_infer_train_T)
    return _masked(x, _at_most(largest_T, x.is_float32_T, phi))


def ipo(x: Terms, eps: float) -> Float64:
    """Ratio where the token's probabilities differ by at most eps, else 0."""
    return _masked(x, _at_most(np.abs(x.prob_diff_T), x.is_float32_T, eps))


def dppo_tv(x: Terms, eps_low: float, eps_high: float) -> Float64:
    """Ratio, but 0 where the update would move the token's probability further than eps away from infer's."""
    sign_T = np.sign(_advantages(x))
    is_kept_T = np.where(
        sign_T > 0,
        _at_most(x.prob_diff_T, x.is_float32_T, eps_high),
        (sign_T == 0) | _at_most(-x.prob_diff_T, x.is_float32_T, eps_low),
    )
    return _masked(x, is_kept_T)


def dppo_kl(x: Terms, eps: float) -> Float64:
    """Ratio, but 0 where binary KL(infer, train) exceeds eps and the update would move further away."""
    moves_away_T = np.sign(_advantages(x)) * x.prob_diff_T > 0
    return _masked(x, ~moves_away_T | _at_most(x.binary_kl_infer_train_T, x.is_float32_T, eps))


def trm_max(x: Terms, delta: float) -> Kept:
    """No d^2 / 2 of the sequence above delta."""
    return x.of_sequence(_at_most(-x.least_S(-np.square(x.diff_T) / 2), x.is_float32_S, delta))


def k3_mean(x: Terms, limit: float) -> Kept:
    """Mean k3 of the sequence at most limit."""
    return x.of_sequence(_at_most(x.mean_k3_S, x.is_float32_S, limit))


def trm_mean(x: Terms, delta: float) -> Kept:
    """Mean k3 of the sequence at most delta."""
    return k3_mean(x, delta)


def _at_most(values: Float64, is_float32: Kept, bound: float) -> Kept:
    return np.asarray(on_bounds(values, [bound], is_float32) <= bound)


def _is_inside(log_ratio: Float64, is_float32: Kept, low: float, high: float) -> Kept:
    low_log, high_log = log_bound(low), log_bound(high)
    held = on_bounds(log_ratio, [low_log, high_log], is_float32)
    return np.asarray((held >= low_log) & (held <= high_log))


def _masked(x: Terms, is_kept_T: Kept) -> Float64:
    return np.where(is_kept_T, x.ratio_T, 0.0)


def _truncated(log_ratio: Float64, is_float32: Kept, cap: float) -> Float64:
    """min(ratio, cap), exactly cap from the bound on."""
    at_most = min(cap, _LARGEST_RATIO)
    held = on_bounds(log_ratio, [log_bound(cap)], is_float32)
    return np.where(held >= log_bound(cap), at_most, np.minimum(clamped_exp(log_ratio), at_most))


def _advantages(x: Terms) -> Float64:
    if x.advantage_T is None:
        raise MoediagError("dppo looks at the sign of the advantage; none is given: pass advantage_T, or rewards")
    return x.advantage_T
