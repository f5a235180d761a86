"""Chance: how often a healthy capture would show a pattern, and when it no longer explains what is seen.

Base rates:
    - **False alarms.** Every test runs at :data:`ALPHA` per rule and capture, divided by the number of tests in the
      rule (Bonferroni over layers, lags or patterns).
    - **Events in all layers at once** (filler rows, stale rows). A single layer shows them by chance: a hot expert
      pair may be {0, 1}, neighbours may share a set. Per-layer rates are therefore measured on the capture itself,
      fault included, and the joint rate is bounded by their geometric mean to the power min(L / 2, 3). Layers of one
      token depend on each other, so only half of them count, and never more than three: what they share does not
      wear off with depth. Ours; it covers a latent shared by all layers with correlation up to 0.25 (tested for L up
      to 48). On the trained demo pair (E = 16, K = 4, L = 6; pairs of different tokens at lags 1 to 37) the power
      found is 1.9-2.0 for 2 layers, 2.0-2.4 for 3, and no pair agrees in 4 or more: twice as independent as assumed.
      The price: ids alone show nothing at L <= 2.
    - **Bit-identical scores** (gate weights, margins). Neighbours were not more alike than rows far apart on that
      pair (0.9 % against 1.7 % same sets in the first layer); we still allow ten times the odds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ALPHA = 1e-6
"""Chance that a rule fires on a healthy capture, all its layers, lags and patterns together."""

MOST_FREE_LAYERS = 3
"""Layers that count as independent in a joint rate, however many there are; see above."""

NEIGHBOUR_ALLOWANCE = 10.0
"""Rows at one distance may coincide this many times as often as rows at others, before it counts as evidence."""

N_GROUPS = 4096
"""Groups of (prompt, 16 positions) that errors of pair statistics are taken over: bounded memory, any order."""

GROUP_POSITIONS = 16
MIN_GROUPS = 20
"""Below this many groups their spread is no error estimate (t quantiles beyond 10); rows are used instead."""


def exceeds(n: int, n_of: int, rate: float, n_tests: int = 1) -> bool:
    """True when n of n_of is more than a rate can give (one-sided binomial, at ALPHA over ``n_tests``).

    Example:
        >>> exceeds(9, 10, 0.5), exceeds(90, 100, 0.5)
        (False, True)
    """
    if n == 0 or rate >= 1:
        return False
    return bool(stats.binom.sf(n - 1, n_of, rate) < ALPHA / n_tests)


def exceeds_others(n: int, n_of: int, n_other: int, n_of_other: int, n_tests: int = 1) -> bool:
    """True when n of n_of is more than the others' n_other of n_of_other explain, NEIGHBOUR_ALLOWANCE allowed.

    Fisher's exact test, one-sided, of n of n_of against n_other of n_of_other / allowance: few others are weak
    evidence of a low rate, and the test says so by itself.

    Example:
        >>> exceeds_others(5, 100, 5, 800), exceeds_others(40, 100, 0, 800)
        (False, True)
    """
    n_of_other = max(n_other, int(n_of_other / NEIGHBOUR_ALLOWANCE))
    if n == 0 or not n_of_other:
        return False
    p = stats.hypergeom.sf(n - 1, n_of + n_of_other, n + n_other, n_of)
    return bool(p < ALPHA / n_tests)


def joint_rate(n_L: NDArray[Any], n_of: int) -> float:
    """Upper bound on the rate of an event in all L layers at once, from its rate in each.

    Few rows leave much room: each rate is taken as (n + 1) / (n_of + 2), the rule of succession.

    Example:
        >>> round(joint_rate(np.array([99, 99, 99, 99]), 998), 12)
        0.01
    """
    if not n_L.size:
        return 1.0
    n_free = min(n_L.size / 2, MOST_FREE_LAYERS)
    return float(math.exp(np.log((n_L + 1) / (n_of + 2)).mean() * n_free))


def group_of(prompt_id_T: NDArray[Any], position_T: NDArray[Any]) -> NDArray[np.int64]:
    """Group number of each row: rows of one prompt within 16 positions, all its samples, fall together.

    Samples of one prompt may be copies of each other, so they never count as separate evidence.
    """
    key_T = prompt_id_T.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    key_T += (position_T // GROUP_POSITIONS).astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    key_T ^= key_T >> np.uint64(31)
    return ((key_T * np.uint64(0xD6E8FEB86659FD93)) >> np.uint64(52)).astype(np.int64)


def mean_is_positive(n_G: NDArray[Any], sum_G: NDArray[Any], square_sum: float, n_copies: int, n_tests: int) -> bool:
    """True when a mean over rows is above 0 by more than its error, rows grouped (one-sided t at ALPHA / n_tests).

    Args:
        n_G, sum_G: rows and sum of the statistic in each group.
        square_sum: sum of its squares over all rows.
        n_copies: samples per prompt at most; where groups are too few, rows are divided by it.
    """
    used = n_G > 0
    n, n_groups = float(n_G.sum()), int(used.sum())
    if n == 0:
        return False
    mean = float(sum_G.sum()) / n
    if mean <= 0:
        return False
    if n_groups >= MIN_GROUPS:
        residual_G = sum_G[used] - mean * n_G[used]
        error = math.sqrt(n_groups / (n_groups - 1) * float((residual_G**2).sum())) / n
        freedom = n_groups - 1
    else:
        rows = n / max(n_copies, 1)
        if rows < MIN_GROUPS:
            return False
        error = math.sqrt(max(square_sum / n - mean**2, 0.0) / (rows - 1))
        freedom = int(rows) - 1
    return mean > float(stats.t.isf(ALPHA / n_tests, freedom)) * error


def correlation_excess(sums_GS: NDArray[Any], sums0_GS: NDArray[Any], n_copies: int, n_tests: int) -> bool:
    """True when one correlation exceeds another of the same rows by more than its error explains.

    Delete-one-group jackknife of the difference; below MIN_GROUPS groups Fisher's z with n / copies rows each.

    Args:
        sums_GS: per group the sums of 1, x, y, x^2, y^2, xy.
        sums0_GS: the same for the correlation it must exceed.
    """
    both_GS = np.concatenate([sums_GS, sums0_GS], axis=1)
    totals, totals0 = sums_GS.sum(axis=0), sums0_GS.sum(axis=0)
    excess = float(correlation(totals) - correlation(totals0))
    if not excess > 0:
        return False
    if int(((sums_GS[:, 0] > 0) | (sums0_GS[:, 0] > 0)).sum()) >= MIN_GROUPS:
        return is_positive(both_GS, lambda sums: correlation(sums[..., :6]) - correlation(sums[..., 6:]), n_tests)
    rows = min(totals[0], totals0[0]) / max(n_copies, 1)
    if rows < MIN_GROUPS:
        return False
    r, r0 = (_fisher_z(correlation(t)) for t in (totals, totals0))
    return r - r0 > float(stats.norm.isf(ALPHA / n_tests)) * math.sqrt(2 / (rows - 3))


def correlation_is_below(limit: float, sums_GS: NDArray[Any], n_copies: int) -> bool:
    """True when a correlation is below a limit by more than its error explains; errors as :func:`correlation_excess`.

    Fisher's z is used up to three times as many groups: streams that are unrelated have independent products whatever
    their groups, and a t quantile of few groups would need twice as many tokens.

    Args:
        sums_GS: per group the sums of 1, x, y, x^2, y^2, xy.
    """
    totals = sums_GS.sum(axis=0)
    r = float(correlation(totals))
    if not r < limit:
        return False
    if int((sums_GS[:, 0] > 0).sum()) >= 3 * MIN_GROUPS:
        return is_positive(sums_GS, lambda sums: limit - correlation(sums))
    rows = totals[0] / max(n_copies, 1)
    return bool(
        rows >= MIN_GROUPS and _fisher_z(limit) - _fisher_z(r) > float(stats.norm.isf(ALPHA)) / math.sqrt(rows - 3)
    )


def is_positive(sums_GS: NDArray[Any], statistic: Callable[[NDArray[Any]], NDArray[Any]], n_tests: int = 1) -> bool:
    """True when a statistic of sums is above 0 by more than its error (delete-one-group jackknife, t at ALPHA).

    Below MIN_GROUPS groups there is no finding.

    Args:
        sums_GS: sums of each group; unused groups are 0 throughout.
        statistic: of (..., S) sums.
    """
    used_GS = sums_GS[(sums_GS != 0).any(axis=1)]
    n_groups, totals = len(used_GS), sums_GS.sum(axis=0)
    if n_groups < MIN_GROUPS:
        return False
    left_G = statistic(totals - used_GS)
    if not np.isfinite(left_G).all():
        return False
    error = math.sqrt((n_groups - 1) / n_groups * float(((left_G - left_G.mean()) ** 2).sum()))
    return bool(statistic(totals) > float(stats.t.isf(ALPHA / n_tests, n_groups - 1)) * error)


def _fisher_z(r: Any) -> float:
    limit = 1 - 1e-12
    return math.atanh(float(np.clip(r, -limit, limit)))


def correlation(sums: NDArray[Any]) -> NDArray[Any]:
    """Pearson correlation from (..., 6) sums of 1, x, y, x^2, y^2, xy; NaN where a side does not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        vx, vy, cov = xx / n - (x / n) ** 2, yy / n - (y / n) ** 2, xy / n - x * y / n**2
        # differences of large sums leave rounding of 1e-16 of the square: below it nothing varies
        flat = (vx <= 1e-12 * xx / n) | (vy <= 1e-12 * yy / n)
        return np.where(flat, np.nan, cov / np.sqrt(vx * vy))
