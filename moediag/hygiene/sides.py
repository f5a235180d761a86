"""What only two sides beside each other show: zeros that the other contradicts (D31), gate weights off (D14)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from moediag.hygiene.chance import exceeds
from moediag.hygiene.findings import Count, Finding, counted, finding
from moediag.hygiene.rows import MIN_ROWS, Rows, Shape, over_slots

_CONTRADICTION = -1.0
"""Other side's logp [nat] below which it contradicts a zero: a ratio beyond e where one side is certain."""

_LEAST_RATE = 0.04
"""Contradicted share that is never an error, however rare contradictions are elsewhere. R3's collapse mark is
F(2) > 0.1; with an exponential tail of abs(logp diff) that is 0.1^(1 / ln 2) = 0.036 beyond e."""

_NEAR_CERTAIN = -0.1
_ROUNDING = 2.0**-6
"""Weight sums of one row in bf16 agree to 2^-8 relative on each side; twice that each, both sides."""


class ContradictedZeros:
    """Zeros of one side against the other side's logp, beside the same for other near-certain tokens."""

    def __init__(self, zero_side: str) -> None:
        self._side = zero_side
        self._zeros, self._near = Count(), Count()
        self._n_scored, self._n_trailing, self._sum_beside = 0, 0, 0.0

    def add(self, this: Rows, other: Rows) -> None:
        """Add a shard; ``this`` has the zeros."""
        tokens, logp_T = this.tokens, this.capture.logp_T
        scored_T = tokens.is_scored_T & np.isfinite(logp_T) & np.isfinite(other.capture.logp_T)
        contradicted_T = scored_T & (other.capture.logp_T < _CONTRADICTION)
        zero_T, near_T = scored_T & (logp_T == 0), scored_T & (logp_T < 0) & (logp_T > _NEAR_CERTAIN)
        self._zeros.add(tokens, zero_T & contradicted_T, int(zero_T.sum()), this.prefixes)
        self._near.add(tokens, near_T & contradicted_T, int(near_T.sum()))
        self._n_scored += int(scored_T.sum())
        self._n_trailing += int((zero_T & _trailing(zero_T, this.ends)).sum())
        self._sum_beside += float(other.capture.logp_T[zero_T].astype(np.float64).sum())

    def findings(self, where: str) -> list[Finding]:
        """An error where zeros are contradicted much more often than near-certain tokens are."""
        near = (self._near.n + 1) / (self._near.n_of + MIN_ROWS) if self._near.n else 0.0
        rate = min(1.0, max(_LEAST_RATE, 2 * near))
        if not exceeds(self._zeros.n_distinct, self._zeros.n_of, rate, n_tests=2):
            return []
        n = self._zeros.n_of
        message = (
            f"{n / self._n_scored:.1%} of {self._side}'s {self._n_scored:,} logps are exactly 0, {self._n_trailing:,} "
            f"of these {n:,} at the end of sequences; the other side has {self._sum_beside / n:.2g} nat there on "
            f"average, and {self._zeros.n:,} times less than {_CONTRADICTION:g}"
        )
        return [counted("D31-zero-logp", where, message, self._zeros, rate)]


def _trailing(hit_T: NDArray[np.bool_], ends_T: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows from which on every row of their sequence is a hit."""
    here_T = np.arange(len(hit_T))
    next_miss_T = np.minimum.accumulate(np.where(hit_T, len(hit_T), here_T)[::-1])[::-1]
    next_end_T = np.minimum.accumulate(np.where(ends_T, here_T, len(hit_T))[::-1])[::-1]
    return np.asarray(next_miss_T > next_end_T)


class GateFactor:
    """Sums of gate weights of the two sides, where both chose the same experts."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._n = 0
        self._ratio = np.zeros(2)  # sum and square sum of log(train / infer)
        self._sums = np.zeros((2, 2))  # per side the same of the row sum

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        train_TL, infer_TL = train.gate_totals, infer.gate_totals
        if train_TL is None or infer_TL is None:
            return
        same_TL = train.routed & infer.routed & over_slots(np.logical_and, train.sets == infer.sets)
        train_N, infer_N = (totals_TL[same_TL].astype(np.float64) for totals_TL in (train_TL, infer_TL))
        good_N = np.isfinite(train_N) & np.isfinite(infer_N) & (train_N > 0) & (infer_N > 0)
        train_N, infer_N = train_N[good_N], infer_N[good_N]
        self._n += len(train_N)
        self._ratio += _moments(np.log(train_N / infer_N))
        self._sums += np.array([_moments(train_N), _moments(infer_N)])

    def findings(self, where: str) -> list[Finding]:
        """A constant factor, or one side normalised and the other not."""
        if self._n < MIN_ROWS:
            return []
        mean, spread = _mean_and_spread(self._ratio, self._n)
        (train, train_spread), (infer, infer_spread) = (_mean_and_spread(sums, self._n) for sums in self._sums)
        if abs(mean) > _ROUNDING and spread < abs(mean) / 4:
            message = f"train's weights sum to {math.exp(mean):.4g} times infer's (spread {spread:.1g})"
        elif abs(mean) > _ROUNDING and _one_is_normalised((train_spread / train, infer_spread / infer)):
            message = (
                f"weights sum to {train:.3g} +- {train_spread:.2g} in train, {infer:.3g} +- {infer_spread:.2g} in infer"
            )
        else:
            return []
        text = f"{message}, {self._n:,} (token, layer) with the same experts"
        return [finding("D14-gate-factor", where, text, n_of=self._n)]


def _one_is_normalised(spreads: tuple[float, float]) -> bool:
    """One side's sums are constant to bf16 rounding (2^-8), the other's are far from it."""
    return min(spreads) < _ROUNDING / 4 and max(spreads) > 2 * _ROUNDING


def _moments(values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([values_N.sum(), (values_N**2).sum()])


def _mean_and_spread(moments: NDArray[np.float64], n: int) -> tuple[float, float]:
    mean = float(moments[0]) / n
    return mean, math.sqrt(max(float(moments[1]) / n - mean**2, 0.0))
