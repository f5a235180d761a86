"""P(the top-K set changes) when Gaussian noise is added to scores: exact for independent noise, or simulated.

Invariants:
    - the set changes when the largest unchosen score passes the smallest chosen one, so one integral over the
      unchosen maximum counts all K x (E - K) pairs together: no pair is counted twice, and no product of pair
      probabilities pretends that pairs sharing an expert are independent (at huge noise that product tends to
      1 - 2^-(K (E - K)), the truth to 1 - 1 / C(E, K));
    - zero noise gives 0, an exact tie of one pair 1/2, K = E gives 0; nothing here knows which side flipped;
    - work goes in chunks: temporaries stay below 10 MB whatever N is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import special

from moediag.analysis.choice_scores import RoutingRule, chosen_experts

Float64 = NDArray[np.float64]

N_NODES: Final = 48
"""Steps of the integral; against 4000 steps the error is below 0.5 % of the probability."""
REACH: Final = 5.0
"""Noise beyond this many sigma is left out: 3e-7 of its mass."""
N_DRAWS: Final = 128
"""Draws of a simulated probability."""
_SAFE: Final = 5.2 * np.sqrt(2)
"""Gaps of so many sigma of a score are not crossed: 1e-7."""
_CELLS_PER_CHUNK: Final = 1 << 18


def border_flip_probability(gap_N: Float64, sigma_N: Float64) -> Float64:
    """P(flip) of the border pair alone: Phi(-gap / sigma), sigma of the *difference* of the two scores."""
    gap_N, sigma_N = np.broadcast_arrays(gap_N, sigma_N)
    with np.errstate(divide="ignore", invalid="ignore"):
        flip_N = special.ndtr(-gap_N / sigma_N)
    return np.where((sigma_N > 0) & np.isfinite(gap_N), flip_N, 0.0)


def set_flip_probability(score_NE: Float64, sigma_NE: Float64, top_k: int) -> Float64:
    """P(flip) from all pairs: the top-K set of score + sigma * z differs from that of score.

    Args:
        score_NE: scores, each row in *descending* order; finite.
        sigma_NE: standard deviation of every score's own noise, same order, > 0.
        top_k: K.

    Returns:
        (N,) probabilities.

    Source: ours; P(flip) = integral of P(some chosen < x) dP(all unchosen < x), Gaussian independent noise.

    Example:
        >>> set_flip_probability(np.array([[1.0, 1.0]]), np.ones((1, 2)), 1).round(3).tolist()
        [0.5]
    """
    n_rows, n_experts = score_NE.shape
    flip_N = np.zeros(n_rows)
    if top_k >= n_experts:
        return flip_N
    need_N = _reach_of_border(score_NE, sigma_NE, top_k)
    width = 1
    while len(rows := np.flatnonzero((need_N <= width) & (need_N > width // 2))) or (need_N > width).any():
        near = slice(max(0, top_k - width), top_k + width)
        step = max(1, _CELLS_PER_CHUNK // (N_NODES * min(2 * width, n_experts)))
        for some in (rows[first : first + step] for first in range(0, len(rows), step)):
            flip_N[some] = _integral(score_NE[some, near], sigma_NE[some, near], min(top_k, width))
        width *= 2
    return flip_N


def simulated_flip_probability(
    logits_NE: Float64,
    rule: RoutingRule,
    bias_E: Float64 | None,
    noise: Callable[[], Float64],
    n_draws: int = N_DRAWS,
) -> Float64:
    """P(flip) by running the whole rule on noisy logits: for group limits, where a group may lose at once.

    Args:
        logits_NE: raw router logits.
        noise: gives one draw of the noise of every logit, (N, E).
        n_draws: draws per row; a probability is known to 1 / (2 sqrt(n_draws)) at worst.
    """
    kept_NK = np.sort(chosen_experts(logits_NE, rule, bias_E), axis=-1)
    n_flips_N = np.zeros(len(logits_NE))
    for _ in range(n_draws):
        found_NK = np.sort(chosen_experts(logits_NE + noise(), rule, bias_E), axis=-1)
        n_flips_N += (found_NK != kept_NK).any(axis=-1)
    return np.asarray(n_flips_N / n_draws, dtype=np.float64)


def _reach_of_border(score_NE: Float64, sigma_NE: Float64, top_k: int) -> NDArray[np.int64]:
    """Experts on either side of the border that noise may carry across it, the larger number; 1 at least."""
    reach_N = _SAFE * sigma_NE.max(axis=1)
    n_chosen_N = (score_NE[:, :top_k] < (score_NE[:, top_k] + reach_N)[:, None]).sum(axis=1)
    n_unchosen_N = (score_NE[:, top_k:] > (score_NE[:, top_k - 1] - reach_N)[:, None]).sum(axis=1)
    return np.asarray(np.maximum(np.maximum(n_chosen_N, n_unchosen_N), 1), dtype=np.int64)


def _integral(score_NE: Float64, sigma_NE: Float64, top_k: int) -> Float64:
    """Midpoint Stieltjes sum: steep steps of an expert with tiny noise cost accuracy, never mass."""
    chosen, unchosen = np.s_[:, None, :top_k], np.s_[:, None, top_k:]
    widest_N = REACH * sigma_NE.max(axis=1)
    low_N, high_N = score_NE[:, top_k] - widest_N, score_NE[:, top_k - 1] + widest_N
    edge_NQ = low_N[:, None] + (high_N - low_N)[:, None] * np.linspace(0.0, 1.0, N_NODES + 1)
    middle_NQ = (edge_NQ[:, 1:] + edge_NQ[:, :-1]) / 2
    below_NQ = special.ndtr((edge_NQ[..., None] - score_NE[unchosen]) / sigma_NE[unchosen]).prod(axis=-1)
    above_NQ = special.ndtr((score_NE[chosen] - middle_NQ[..., None]) / sigma_NE[chosen]).prod(axis=-1)
    # what lies beyond the ends: below, nothing chosen is there; above, everything chosen has been passed
    beyond_N = 1 - below_NQ[:, -1]
    return np.asarray(np.minimum(((1 - above_NQ) * np.diff(below_NQ, axis=1)).sum(axis=1) + beyond_N, 1.0))
