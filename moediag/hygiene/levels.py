"""Levels of logp_train - logp_infer: the same in every token, changing inside sequences, or lost in products.

- **Constant offset**, :class:`ConstantOffset`. Noise of any kind that infer samples honestly has E exp(d) = 1, so
  that a mean d of several standard deviations is no noise.
- **Change of regime**, :class:`RegimeChange`, for data of another tool. To first order noise of the logits moves a
  log-probability by (1 - p) times its size, so abs(d) / (1 - p) is what a place in a sequence is compared by:
  easy and hard text alternate, and are no change of weights.
- **Not estimable**, :func:`not_estimable`: chi2 of products over whole sequences.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moediag.hygiene.chance import ALPHA, N_GROUPS, group_of, is_positive
from moediag.hygiene.findings import N_PLACES, Finding, Place, finding
from moediag.hygiene.logps import LEAST_OFFSET, Float64, scored
from moediag.hygiene.rows import Rows
from moediag.statistics.resampling import TAIL

OFFSET_SPREADS = 3.0
"""Standard deviations of d from which on its mean is an offset. Honest Gaussian noise of deviation s has a mean of
-s^2 / 2: this many only from s = 6 nat on."""

HIGHEST_HEALTHY = 0.028
"""Highest published mean abs(logp_diff) of a healthy stack [nat]: GLM-4.5-Air."""

REGIME_RATIO = 3.0
"""Times by which the level beside a change of regime differs at least. Ours: a fault of weights or state gives more,
and clusters of flips on healthy pairs less."""

_WINDOW = 32
"""Tokens on either side of a change whose levels are compared."""
_BLOCK = 32
_LEAST_TOKENS = 6 * _BLOCK
_CERTAIN = 0.99
"""Probability beyond which abs(d) / (1 - p) is rounding."""


class ConstantOffset:
    """Mean and spread of logp_train - logp_infer."""

    def __init__(self) -> None:
        self._sums_GS = np.zeros((N_GROUPS, 3))  # of 1, d, d^2

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        scored_T, x_T, y_T = scored(train, infer)
        diff_N = y_T[scored_T] - x_T[scored_T]
        group_N = group_of(train.tokens.prompt_id_T[scored_T], train.tokens.position_T[scored_T])
        for i, value_N in enumerate((np.ones_like(diff_N), diff_N, diff_N**2)):
            self._sums_GS[:, i] += np.bincount(group_N, value_N, minlength=N_GROUPS)

    def findings(self, where: str) -> list[Finding]:
        """A mean of several standard deviations, by more than its error."""
        n, total, squares = self._sums_GS.sum(axis=0)
        mean = total / n if n else 0.0
        if abs(mean) < LEAST_OFFSET:
            return []

        def excess(sums: Float64) -> Float64:
            means = sums[..., 1] / sums[..., 0]
            spread = np.sqrt(np.maximum(sums[..., 2] / sums[..., 0] - means**2, 0.0))
            return np.asarray(math.copysign(1, mean) * means - OFFSET_SPREADS * spread)

        if not is_positive(self._sums_GS, excess):
            return []
        spread = math.sqrt(max(squares / n - mean**2, 0.0))
        message = (
            f"logp_train - logp_infer is {mean:.4g} nat on average with a standard deviation of {spread:.2g} "
            f"({int(n):,} tokens): an offset, not noise, which would have a mean of {-(spread**2) / 2:.2g}"
        )
        return [finding("constant-offset", where, message, n_of=int(n))]


class RegimeChange:
    """Places inside sequences at which the level of abs(logp_diff) changes; keeps candidates only."""

    def __init__(self) -> None:
        self._candidates: list[tuple[int, int, float, float, float]] = []  # sequence, position, before, after, chance
        self._n_sequences = 0

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        scored_T, x_T, y_T = scored(train, infer)
        uncertain_T = scored_T & (x_T < math.log(_CERTAIN))
        tokens = train.tokens
        for first, end in tokens.sequence_bounds():
            row_N = first + np.flatnonzero(uncertain_T[first:end])
            if len(row_N) < _LEAST_TOKENS:
                continue
            self._n_sequences += 1
            size_N = np.abs(y_T[row_N] - x_T[row_N])
            at, chance = change_point(size_N / -np.expm1(x_T[row_N]))
            before, after = size_N[max(at - _WINDOW, 0) : at], size_N[at : at + _WINDOW]
            if chance >= ALPHA or min(len(before), len(after)) < _WINDOW:
                continue
            levels = float(before.mean()), float(after.mean())
            if max(levels) >= max(REGIME_RATIO * min(levels), HIGHEST_HEALTHY):
                self._candidates.append(
                    (int(tokens.seq_id_T[first]), int(tokens.position_T[row_N[at]]), *levels, chance)
                )

    def findings(self, where: str) -> list[Finding]:
        """The sequences that change, the clearest in words."""
        found = sorted(one for one in self._candidates if one[-1] < ALPHA / self._n_sequences)
        if not found:
            return []
        sequence, position, before, after, chance = min(found, key=lambda one: (one[-1], one))
        places = tuple(Place(one[0], one[1]) for one in found[:N_PLACES])
        where_all = {one[1] for one in found}
        alike = ", all at one position" if len(where_all) == 1 and len(found) > 1 else ""
        message = (
            f"in {len(found):,} of {self._n_sequences:,} sequences{alike} abs(logp_diff) changes its level; clearest: "
            f"{before:.3g} nat in the {_WINDOW} tokens before position {position} of sequence {sequence}, {after:.3g} "
            f"from there on"
        )
        return [
            finding("regime-change", where, message, n=len(found), n_of=self._n_sequences, places=places,
                    base_rate=self._n_sequences * chance)
        ]  # fmt: skip


def change_point(level_N: Float64) -> tuple[int, float]:
    """The likeliest place of a change of level, and how often chance shows one as clear at most.

    Partial sums of which side of the median each token is on: a few large values decide nothing. Tokens in a row are
    alike on healthy pairs, too (a flip stays in the cache), so the error of the sums is that of neighbouring blocks of
    32 tokens where that is larger, those across the change apart.

    Args:
        level_N: a sequence's levels, in order.

    Returns:
        Index of the first token after the change, and Kolmogorov's bound 2 exp(-2 z^2).

    Source: the rank version of the cumulative-sum test (Pettitt 1979); the error from neighbouring blocks is ours.

    Example:
        >>> level = np.r_[np.linspace(1, 2, 100), np.linspace(3, 4, 100)]
        >>> change_point(level)[0], change_point(level)[1] < 1e-6, change_point(np.tile([1.0, 2.0], 100))[1] > 0.9
        (100, True, True)
    """
    median = float(np.median(level_N))
    side_N = np.sign(level_N - median) / 2
    n_blocks = len(side_N) // _BLOCK
    sums_B = side_N[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).sum(axis=1)
    partial_N = np.abs(np.cumsum(side_N - side_N.mean()))[:-1]
    at = int(partial_N.argmax())
    is_apart_B = np.abs((np.arange(1, n_blocks) * _BLOCK) - at - 1) < _BLOCK
    steps = np.diff(sums_B)[~is_apart_B]
    of_blocks = math.sqrt(float((steps**2).sum()) / max(len(steps) - 1, 1) / 2 / _BLOCK)
    error = max(0.5, of_blocks) * math.sqrt(len(side_N))
    return at + 1, min(1.0, 2 * math.exp(-2 * (float(partial_N[at]) / error) ** 2))


def not_estimable(logp_train_T: Any, logp_infer_T: Any, sequence_T: NDArray[Any], where: str) -> list[Finding]:
    """chi2 of the products of ratios over whole sequences, where it is below 0 by more than its error, with their
    effective sample size."""
    diff_T = np.asarray(logp_train_T, np.float64) - np.asarray(logp_infer_T, np.float64)
    is_scored_T = np.isfinite(diff_T)
    _, row_N = np.unique(sequence_T[is_scored_T], return_inverse=True)
    log_ratio_S = np.sort(np.bincount(row_N, diff_T[is_scored_T]))
    n = len(log_ratio_S)
    if n < 2:
        return []
    with np.errstate(over="ignore"):
        square_S = np.exp(2 * log_ratio_S)
        chi2, error = float(square_S.mean()) - 1, float(square_S.std(ddof=1)) / math.sqrt(n)
        high = chi2 + float(stats.t.isf(TAIL, n - 1)) * error
    if not high < 0:
        return []
    weight_S = np.exp(log_ratio_S - log_ratio_S[-1])
    ess = float(weight_S.sum() ** 2 / (weight_S**2).sum())
    mean = float(np.exp(log_ratio_S).mean())
    message = (
        f"chi2 of the sequences' ratios is {chi2:.4g} (at most {high:.3g}), and no chi2 is below 0: the sequences that "
        f"would carry it are not among these {n:,}; their products have an effective sample size of {ess:.1f} and a "
        f"mean of {mean:.3g}"
    )
    return [finding("not-estimable", where, message, n_of=n)]
