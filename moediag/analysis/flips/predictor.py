"""P(flip) of every choice from one side's scores and a distribution of noise scales learned on other prompts.

First the probability for noise of a known size (exact for independent Gaussian noise, or simulated), then
:class:`FlipPredictor`, which averages it over the sizes measured.

Invariants:
    - the set changes when the largest unchosen score passes the smallest chosen one, so one integral over the
      unchosen maximum counts all K x (E - K) pairs together: no pair is counted twice, and no product of pair
      probabilities pretends that pairs sharing an expert are independent (at huge noise that product tends to
      1 - 2^-(K (E - K)), the truth to 1 - 1 / C(E, K));
    - zero noise gives 0, an exact tie of one pair 1/2, K = E gives 0; nothing here knows which side flipped;
    - the integral works in chunks: temporaries stay below 10 MB whatever N is;
    - the predictor reads of a block only what its reference side knew (logits, gaps) and whose prompt it is; the
      other side's numbers enter as counts of *other folds* alone;
    - P(flip) is an average over scales, not P(flip) at an average scale: the noise of real engines is a mixture, and
      one Gaussian sigma gives too many flips (its few loud tokens lift the sigma of all);
    - NaN where nothing can be said: no noise measured on other prompts, or no finite scores.

Assumed: given its layer, stratum and the size of its logits, a token's noise does not depend on its gap; noise is
symmetric, Gaussian for a token of known scale, and independent between experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import special

from moediag.analysis.choice_scores import RoutingRule, chosen_experts, compared_scores, score_slopes
from moediag.analysis.flips.noise import (
    CELL_SCALE,
    CELLS_PER_OCTAVE,
    N_CELLS,
    BlockView,
    Method,
    NoiseCounts,
    noise_freedom,
    size_of,
    spread_on_grid,
    without_estimation_error,
)
from moediag.statistics.resampling import SEED

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

_CELLS_PER_NODE: Final = 4
"""Scales are integrated over three nodes per octave; the flip rate is smooth in the log of the scale."""
_N_NODES: Final = N_CELLS // _CELLS_PER_NODE
_NODE_SCALE: Final = CELL_SCALE[0] * 2.0 ** (np.arange(_N_NODES) * _CELLS_PER_NODE / CELLS_PER_OCTAVE)
_SAFE: Final = 5 * np.sqrt(2)
"""Gaps beyond so many sigma of a score do not flip (3e-7), nor is anything computed for them."""

N_STEPS: Final = 48
"""Steps of the integral; against 4000 steps the error is below 0.5 % of the probability."""
REACH: Final = 5.0
"""Noise beyond this many sigma is left out: 3e-7 of its mass."""
N_DRAWS: Final = 128
"""Draws of a simulated probability."""
_NEVER_CROSSED: Final = 5.2 * np.sqrt(2)
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
        step = max(1, _CELLS_PER_CHUNK // (N_STEPS * min(2 * width, n_experts)))
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
    reach_N = _NEVER_CROSSED * sigma_NE.max(axis=1)
    n_chosen_N = (score_NE[:, :top_k] < (score_NE[:, top_k] + reach_N)[:, None]).sum(axis=1)
    n_unchosen_N = (score_NE[:, top_k:] > (score_NE[:, top_k - 1] - reach_N)[:, None]).sum(axis=1)
    return np.asarray(np.maximum(np.maximum(n_chosen_N, n_unchosen_N), 1), dtype=np.int64)


def _integral(score_NE: Float64, sigma_NE: Float64, top_k: int) -> Float64:
    """Midpoint Stieltjes sum: steep steps of an expert with tiny noise cost accuracy, never mass."""
    chosen, unchosen = np.s_[:, None, :top_k], np.s_[:, None, top_k:]
    widest_N = REACH * sigma_NE.max(axis=1)
    low_N, high_N = score_NE[:, top_k] - widest_N, score_NE[:, top_k - 1] + widest_N
    edge_NQ = low_N[:, None] + (high_N - low_N)[:, None] * np.linspace(0.0, 1.0, N_STEPS + 1)
    middle_NQ = (edge_NQ[:, 1:] + edge_NQ[:, :-1]) / 2
    below_NQ = special.ndtr((edge_NQ[..., None] - score_NE[unchosen]) / sigma_NE[unchosen]).prod(axis=-1)
    above_NQ = special.ndtr((score_NE[chosen] - middle_NQ[..., None]) / sigma_NE[chosen]).prod(axis=-1)
    # what lies beyond the ends: below, nothing chosen is there; above, everything chosen has been passed
    beyond_N = 1 - below_NQ[:, -1]
    return np.asarray(np.minimum(((1 - above_NQ) * np.diff(below_NQ, axis=1)).sum(axis=1) + beyond_N, 1.0))


class FlipPredictor:
    """Predicts the flips of blocks; made once from the noise of a pair.

    Args:
        counts: noise of a pair, of the same rule and layers.
        rule: how experts are chosen.
        method: ``all_pairs`` and ``border_pair`` from logits, ``simulated`` for group limits, ``margin_change`` from
            margins alone.
        bias_LE: the router's correction bias by layer, where the rule has one.
    """

    def __init__(
        self,
        counts: NoiseCounts,
        rule: RoutingRule,
        method: Method,
        bias_LE: Float64 | None = None,
    ) -> None:
        self.rule, self.method, self.bias_LE = rule, method, bias_LE
        others = counts.of_other_folds()
        self._profile_FLZ = others.profile_FLZ()
        self._share_FLRH, self._zero_FLR = others.shares()
        self._rng = np.random.default_rng(SEED)

    def layer_probability(self, view: BlockView, layer: int) -> Float64:
        """P(flip) of one layer's choices: (T,), NaN = not predicted."""
        if self.method == "margin_change":
            rows = np.flatnonzero(view.is_known_TL[:, layer])
        else:
            rows = np.flatnonzero(view.usable_rows(layer))
        fold_N, stratum_N = view.fold_T[rows], view.stratum_TL[rows, layer]
        flip_T = np.full(len(view.prompt_id_T), np.nan)
        if self.method == "margin_change" and self.rule.is_grouped:
            # a margin is the border within the groups kept: whether a whole group may lose is not known from it
            return flip_T
        has_noise_N = ~np.isnan(self._zero_FLR[fold_N, layer, stratum_N])
        rows, group_N = rows[has_noise_N], (fold_N[has_noise_N], stratum_N[has_noise_N])
        if self.rule.is_unrivalled:
            flip_T[rows] = 0.0
        elif self.method == "margin_change":
            flip_T[rows] = self._from_changes(view.gap_TL[rows, layer], group_N, layer)
        elif self.method == "simulated":
            flip_T[rows] = self._simulated(view.logits_TLE[rows, layer], group_N, layer)
        else:
            flip_T[rows] = self._integrated(view.logits_TLE[rows, layer], group_N, layer)
        return flip_T

    def _from_changes(self, gap_N: Float64, group_N: tuple[Int64, Int64], layer: int) -> Float64:
        """Half the share of changes that are larger than the gap: the other half moves away from the border."""
        above_FRH = np.zeros((*self._zero_FLR[:, layer].shape, N_CELLS + 2))
        above_FRH[..., :N_CELLS] = self._share_FLRH[:, layer, :, ::-1].cumsum(axis=-1)[..., ::-1]
        with np.errstate(divide="ignore"):
            cell_N = np.clip((np.log2(gap_N) - np.log2(CELL_SCALE[0])) * CELLS_PER_OCTAVE + 0.5, 0, N_CELLS)
        low_N = cell_N.astype(np.int64)
        part_N = cell_N - low_N
        below_N, above_N = above_FRH[*group_N, low_N], above_FRH[*group_N, low_N + 1]
        return np.asarray(((1 - part_N) * below_N + part_N * above_N) / 2)

    def _node_shares(self, layer: int) -> Float64:
        """Share of every node by fold and stratum; what is missing to 1 are exact zeros."""
        share_FRH = without_estimation_error(np.nan_to_num(self._share_FLRH[:, layer]), noise_freedom(self.rule))
        position_H = np.arange(N_CELLS) / _CELLS_PER_NODE
        return spread_on_grid(share_FRH, np.broadcast_to(position_H, share_FRH.shape), _N_NODES)

    def _noise_profile(self, logits_NE: NDArray[np.float32], fold_N: Int64, layer: int) -> Float64:
        return np.asarray(self._profile_FLZ[fold_N[:, None], layer, size_of(logits_NE)])

    def _integrated(self, logits_NE: NDArray[np.float32], group_N: tuple[Int64, Int64], layer: int) -> Float64:
        """Average over the scales; nodes at which a choice is safe cost nothing."""
        share_NQ = self._node_shares(layer)[group_N]
        score_NE = compared_scores(logits_NE, self.rule, self._bias(layer))
        unit_NE = self._noise_profile(logits_NE, group_N[0], layer) * score_slopes(logits_NE, self.rule)
        order_NE = np.argsort(-score_NE, axis=1, kind="stable")
        score_NE, unit_NE = (np.take_along_axis(array, order_NE, axis=1) for array in (score_NE, unit_NE))
        flip_N = np.zeros(len(share_NQ))
        for node, active in self._active(score_NE, unit_NE, share_NQ):
            probability = self._at_scale(score_NE[active], unit_NE[active] * _NODE_SCALE[node])
            flip_N[active] += share_NQ[active, node] * probability
        return flip_N

    def _active(self, score_NE: Float64, unit_NE: Float64, share_NQ: Float64) -> Iterator[tuple[int, Int64]]:
        top_k = self.rule.top_k
        reach_N = (score_NE[:, top_k - 1] - score_NE[:, top_k]) / (_SAFE * unit_NE.max(axis=1))
        for node in np.flatnonzero(share_NQ.any(axis=0)).tolist():
            yield node, np.flatnonzero((reach_N < _NODE_SCALE[node]) & (share_NQ[:, node] > 0))

    def _at_scale(self, score_NE: Float64, sigma_NE: Float64) -> Float64:
        if self.method == "all_pairs":
            return set_flip_probability(score_NE, np.maximum(sigma_NE, 1e-300), self.rule.top_k)
        pair = slice(self.rule.top_k - 1, self.rule.top_k + 1)
        gap_N = -np.diff(score_NE[:, pair], axis=1)[:, 0]
        return border_flip_probability(gap_N, np.sqrt(np.square(sigma_NE[:, pair]).sum(axis=1)))

    def _simulated(self, logits_NE: NDArray[np.float32], group_N: tuple[Int64, Int64], layer: int) -> Float64:
        upto_NQ = self._node_shares(layer).cumsum(axis=-1)[group_N]
        unit_NE = self._noise_profile(logits_NE, group_N[0], layer)

        def noise() -> Float64:
            node_N = (upto_NQ < self._rng.random(len(upto_NQ))[:, None]).sum(axis=1)
            scale_N = np.append(_NODE_SCALE, 0.0)[node_N]  # beyond the last share lie the exact zeros
            return np.asarray(scale_N[:, None] * unit_NE * self._rng.standard_normal(unit_NE.shape))

        return simulated_flip_probability(logits_NE.astype(np.float64), self.rule, self._bias(layer), noise, N_DRAWS)

    def _bias(self, layer: int) -> Float64 | None:
        return None if self.bias_LE is None else self.bias_LE[layer]
