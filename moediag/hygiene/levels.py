"""Levels of logp_train - logp_infer: the same in every token, changing inside sequences, or lost in products.

- **Constant offset**, :class:`ConstantOffset`. Noise of any kind that infer samples honestly has E exp(d) = 1, so
  that a mean d of several standard deviations is no noise.
- **Change of regime**, :class:`RegimeChange`, for data of another tool. To first order noise of the logits moves a
  log-probability by (1 - p) times its size, so abs(d) / (1 - p) is what a place in a sequence is compared by:
  easy and hard text alternate, and are no change of weights.
- **Weight versions**, :class:`MixedVersions`, :class:`StaleSegments`: where a resumed generation went on with other
  weights, what is on either side of the seam is of two models.
- **Not estimable**, :func:`not_estimable`: chi2 of products over whole sequences.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from moediag.hygiene.chance import ALPHA, N_GROUPS, group_of, is_positive
from moediag.hygiene.findings import N_PLACES, Count, Finding, Place, Tally, finding
from moediag.hygiene.logps import LEAST_OFFSET, Float64, scored
from moediag.hygiene.rows import Rows
from moediag.run.capture import TokenRows
from moediag.statistics.resampling import TAIL

OFFSET_SPREADS = 3.0
"""Standard deviations of d from which on its mean is an offset. Honest Gaussian noise of deviation s has a mean of
-s^2 / 2: this many only from s = 6 nat on."""

HIGHEST_HEALTHY = 0.028
"""Highest published mean abs(logp_diff) of a healthy stack [nat]: GLM-4.5-Air."""

REGIME_RATIO = 3.0
"""Times by which the level beside a change of regime differs at least. Ours: a fault of weights or state gives more,
and clusters of flips on healthy pairs less."""

SEGMENT_RATIO = 1.5
"""Times by which tokens of earlier weight versions differ more, or less, than those of their sequences' last, from
which on it is worth a word. Ours: halves of 295 healthy captured pairs were 1.1 apart in the median, and none by more
than this beyond chance."""

_WINDOW = 32
"""Tokens on either side of a change whose levels are compared."""
_LINE = 128
"""Tokens on either side of a change that a line is laid through."""
_BLOCK = 32
_LEAST_TOKENS = 6 * _BLOCK
_CERTAIN = 0.99
"""Probability beyond which abs(d) / (1 - p) is rounding."""


class ConstantOffset(Tally):
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


class RegimeChange(Tally):
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
            level_N = size_N / -np.expm1(x_T[row_N])
            at, chance = change_point(level_N)
            sides = slice(max(at - _WINDOW, 0), at), slice(at, at + _WINDOW)
            if chance >= ALPHA or min(len(level_N[side]) for side in sides) < _WINDOW:
                continue
            chance = max(chance, step_chance(level_N, at))
            before, after = (float(size_N[side].mean()) for side in sides)
            if max(before, after) >= max(REGIME_RATIO * min(before, after), HIGHEST_HEALTHY):
                place = int(tokens.seq_id_T[first]), int(tokens.position_T[row_N[at]])
                self._candidates.append((*place, before, after, chance))

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


class MixedVersions(Tally):
    """Sequences whose tokens were sampled by more than one weight version."""

    _ends: ClassVar = {"_first": min}

    def __init__(self) -> None:
        self._earlier, self._seams = Count(), Count()
        self._first: tuple[int, int, str, str] | None = None  # sequence, position, versions before and from there on
        self._n_mixed, self._n_sequences = 0, 0

    def add(self, rows: Rows) -> None:
        """Count a shard."""
        tokens = rows.tokens
        if tokens.weight_version_T is None:
            return
        earlier_T, _ = segments(tokens)
        version_T, _ = pd.factorize(tokens.weight_version_T)
        known_T = version_T >= 0
        seam_T = np.r_[False, (version_T[1:] != version_T[:-1]) & known_T[1:] & known_T[:-1]] & ~rows.starts
        self._earlier.add(tokens, earlier_T, int(known_T.sum()))
        self._seams.add(tokens, seam_T, 0)
        self._n_sequences += len(np.unique(tokens.seq_id_T[known_T]))
        self._n_mixed += len(np.unique(tokens.seq_id_T[earlier_T]))
        for row in np.flatnonzero(seam_T)[:1].tolist():
            before, after = (str(tokens.weight_version_T[i]) for i in (row - 1, row))
            here = (int(tokens.seq_id_T[row]), int(tokens.position_T[row]), before, after)
            self._first = here if self._first is None else min(self._first, here)

    def findings(self, where: str) -> list[Finding]:
        """How many tokens, and where the first seams are."""
        if self._first is None:
            return []
        message = (
            f"in {self._n_mixed:,} of {self._n_sequences:,} sequences weights change, at {self._seams.n:,} places "
            f"(version {self._first[2]} to {self._first[3]} at the first): {self._earlier.text()} tokens, and their "
            "routing rows, are of another version than their sequence's last"
        )
        seams = tuple(self._seams.places)
        return [finding("mixed-versions", where, message, n=self._earlier.n, n_of=self._earlier.n_of, places=seams)]


class StaleSegments(Tally):
    """Levels of abs(logp_diff) in earlier segments and in the last of the same sequences."""

    def __init__(self) -> None:
        self._sums_GS = np.zeros((N_GROUPS, 6))  # earlier, then last: tokens, levels, abs(logp_diff)

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        tokens = train.tokens
        scored_T, x_T, y_T = scored(train, infer)
        uncertain_T = scored_T & (x_T < math.log(_CERTAIN))
        for first, is_here_T in zip((0, 3), segments(tokens), strict=True):
            here_T = is_here_T & uncertain_T
            size_N = np.abs(y_T[here_T] - x_T[here_T])
            group_N = group_of(tokens.prompt_id_T[here_T], tokens.position_T[here_T])
            for i, value_N in enumerate((np.ones_like(size_N), size_N / -np.expm1(x_T[here_T]), size_N)):
                self._sums_GS[:, first + i] += np.bincount(group_N, value_N, minlength=N_GROUPS)

    def findings(self, where: str) -> list[Finding]:
        """A ratio of levels that neither chance nor the place in the sequence gives."""
        n, level, size, n_last, level_last, size_last = self._sums_GS.sum(axis=0)
        if not (n and n_last and level and level_last):
            return []

        def log_ratio(sums: Float64) -> Float64:
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray(np.log(sums[..., 1] / sums[..., 0] * sums[..., 3] / sums[..., 4]))

        ratio = math.exp(float(log_ratio(self._sums_GS.sum(axis=0))))
        sign = math.copysign(1, math.log(ratio))
        if not is_positive(self._sums_GS, lambda sums: sign * log_ratio(sums) - math.log(SEGMENT_RATIO), n_tests=2):
            return []
        message = (
            f"abs(logp_diff) is {size / n:.3g} nat on {int(n):,} tokens of earlier weight versions and "
            f"{size_last / n_last:.3g} nat on {int(n_last):,} of their sequences' last: {ratio:.3g} times as much on "
            "tokens of like probability"
        )
        return [finding("stale-segments", where, message, n=int(n), n_of=int(n + n_last))]


def segments(tokens: TokenRows) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(T,) Tokens of another weight version than their sequence's last, and those of the last, of sequences that have
    both."""
    earlier_T, last_T = (np.zeros(len(tokens), np.bool_) for _ in range(2))
    if tokens.weight_version_T is None:
        return earlier_T, last_T
    version_T, _ = pd.factorize(tokens.weight_version_T)
    for first, end in tokens.sequence_bounds():
        known_N = first + np.flatnonzero(version_T[first:end] >= 0)
        other_N = version_T[known_N] != version_T[known_N[-1:]]
        if other_N.any():
            earlier_T[known_N[other_N]] = last_T[known_N[~other_N]] = True
    return earlier_T, last_T


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
    partial_N = np.abs(np.cumsum(side_N - side_N.mean()))[:-1]
    at = int(partial_N.argmax()) + 1
    error = _deviation(side_N, at, 0.5) * math.sqrt(len(side_N))
    return at, min(1.0, 2 * math.exp(-2 * (float(partial_N[at - 1]) / error) ** 2))


def _deviation(values_N: Float64, at: int, least: float) -> float:
    """Standard deviation of a value as sums of many show it: from differences of neighbouring blocks, those across
    ``at`` apart, and no less than ``least``."""
    n_blocks = len(values_N) // _BLOCK
    sums_B = values_N[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).sum(axis=1)
    is_apart_B = np.abs((np.arange(1, n_blocks) * _BLOCK) - at) < _BLOCK
    steps = np.diff(sums_B)[~is_apart_B]
    return max(least, math.sqrt(float((steps**2).sum()) / max(len(steps) - 1, 1) / 2 / _BLOCK))


def step_chance(level_N: Float64, at: int) -> float:
    """How often a level that changes slowly shows as sharp a step at one place.

    A line on either side of the place, up to 128 tokens each, through the levels' normal scores (a few large values
    decide nothing); the step is where the lines end. Errors as in :func:`change_point`.

    Source: regression discontinuity with local lines (Hahn, Todd and Van der Klaauw 2001), of normal scores.

    Example:
        >>> rising, sharp = np.linspace(1, 5, 256), np.repeat([1.0, 5.0], 128)
        >>> noise = np.random.default_rng(0).exponential(size=256)
        >>> step_chance(rising * noise, 128) > 0.01, step_chance(sharp * noise, 128) < 1e-4
        (True, True)
    """
    first = max(at - _LINE, 0)
    near_N = level_N[first : at + _LINE]
    score_N = stats.norm.ppf((stats.rankdata(near_N) - 0.5) / len(near_N))
    steps, variance = [], 0.0
    residual_N = np.empty_like(score_N)
    for side in (slice(0, at - first), slice(at - first, len(near_N))):
        place_N = np.arange(len(near_N))[side] - (at - first - 0.5)
        design_N2 = np.stack([np.ones_like(place_N), place_N], axis=1)
        line, *_ = np.linalg.lstsq(design_N2, score_N[side], rcond=None)
        residual_N[side] = score_N[side] - design_N2 @ line
        steps.append(float(line[0]))
        variance += float(np.linalg.inv(design_N2.T @ design_N2)[0, 0])
    error = _deviation(residual_N, at - first, float(residual_N.std(ddof=4))) * math.sqrt(variance)
    return float(2 * stats.norm.sf(abs(steps[1] - steps[0]) / error))


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
