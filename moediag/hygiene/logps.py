"""Log-probabilities: values that no model gives, and two streams of the same tokens that do not belong together.

One arm (D31), :class:`Logps`. A logp of exactly 0.0 is honest where the token is near certain: logit - logsumexp
rounds to 0 once 1 - p is below half an ulp of the logsumexp. In bfloat16 and for a logsumexp below 32 that is
1 - p <= 1/16, and then the entropy is at most h(1/16) + log(V) / 16 = 1.02 nat for V up to 2^18. A zero beside more
entropy than that is no rounding.

Two sides. Each fault is judged against what healthy engines may do, however noisy:
    - **Shifted** (D01), :class:`TokenLag`: correlation at a lag above that at 0, each row its own control.
    - **Shifted one by one** (D01), :class:`SequenceLag`: each sequence at a lag of its own, as where columns of one
      side begin behind its prompt and those of the other at a column of the batch.
    - **Unrelated** (D01), :class:`OtherSequence`: tokens of a sequence vary together on both sides, or hardly at all. A
      sequence whose sides differ by far on most tokens *and* do not correlate is of other tokens.
    - **Scaled** (D10), :class:`Temperature`: noise on one side widens it, by no more than -log(r) at a correlation of
      r. A temperature widens without costing correlation: only a spread beyond twice that counts.
    - **Contradicted zeros** (D31), :class:`ContradictedZeros`.
    - **Copied** (D28), :class:`SameBits`, and **mean ratio** (D09), :class:`MeanRatio`, for data of another tool: the
      mean ratio is exactly 1 in expectation whatever train computes, if infer sampled the tokens from what it scores
      them with; so only checked on tokens for which that is known.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moediag.hygiene.chance import (
    ALPHA,
    N_GROUPS,
    correlation,
    correlation_excess,
    correlation_is_below,
    exceeds,
    group_of,
    is_positive,
    mean_is_positive,
)
from moediag.hygiene.findings import N_PLACES, Count, Finding, Place, Tally, counted, finding
from moediag.hygiene.rows import MIN_ROWS, TOKEN_LAGS, Rows, aligned
from moediag.run.capture import LARGEST_ROUNDED_LOGP
from moediag.statistics.intervals import Interval, ratio_mean_interval

Float64 = NDArray[np.float64]

MOST_ENTROPY_OF_CERTAIN = 1.02
"""Entropy [nat] above which a logp of exactly 0 is not a rounded near-certain token; derived above."""

_ROUNDING = 1e-3
"""Entropies may be negative by rounding of -sum p log p in half precision; below this [nat] they are wrong."""

FAR = 0.2
"""abs(logp_diff) [nat] that healthy tokens seldom reach: ten times the mean of published healthy pairs (0.011 to
0.028); two bf16 trainers move 8 % of tokens beyond 0.1 (TRL issue 6789)."""

_LEAST_FAR_SHARE = 0.1
"""Share of far tokens that is never an error: R3's collapse mark is 0.1 beyond a factor of 2, which is farther."""

_UNRELATED = 0.4
"""Correlation within sequences below which two streams have nothing in common; 0.99 is healthy (verl #7242). Ours, and
far off on purpose: streams of other sequences were within 0.1 of 0, so that 130 tokens are enough."""

MAX_OWN_LAG = 64
"""Largest lag of a sequence of its own that is tried: prompts of one batch are that unlike in length at least."""
_LEAST_OWN = 0.8
"""Rank correlation at a lag from which on two streams are of the same tokens. Ours: 0.99 is healthy."""

_LEAST_LIMIT, _MOST_LIMIT = 0.2, 0.5
"""Correlation of one sequence of many tokens, and of few, that still passes for 0."""

LEAST_SCALE = math.log(1.03)
"""Log of the ratio of spreads that is never an error; ours: a softmax temperature of 0.9 gives 0.04 to 0.05,
and vLLM against transformers 0.0007 on the trained demo pair (19,395 tokens, r = 0.9996)."""

LEAST_OFFSET = 1e-3
"""Distance of a mean ratio from 1 that is never worth a word; ours: logps rounded to bfloat16 bias it by less."""

_MOST_LOG_RATIO = 20.0
"""exp(20) is 5e8: one token decides a mean of ratios from there on, as corrections have it."""

_CONTRADICTION = -1.0
"""Other side's logp [nat] below which it contradicts a zero: a ratio beyond e where one side is certain."""

_LEAST_RATE = 0.04
"""Contradicted share that is never an error, however rare contradictions are elsewhere. R3's collapse mark is
F(2) > 0.1; with an exponential tail of abs(logp diff) that is 0.1^(1 / ln 2) = 0.036 beyond e."""

_NEAR_CERTAIN = -0.1


class Logps(Tally):
    """Counts impossible and certain log-probabilities of one arm's response tokens."""

    _ends: ClassVar = {"_longest": max}

    def __init__(self) -> None:
        self._nan, self._impossible, self._rounded = Count(), Count(), Count()
        self._zero, self._contradicted = Count(), Count()
        self._entropy_missing, self._entropy_negative = Count(), Count()
        self._longest = 0

    def add(self, rows: Rows) -> None:
        """Count a shard."""
        tokens, logp_T = rows.tokens, rows.capture.logp_T
        response_T = tokens.is_scored_T
        n = int(response_T.sum())
        zero_T = response_T & (logp_T == 0)
        scored_T = response_T & np.isfinite(logp_T)
        self._nan.add(tokens, response_T & np.isnan(logp_T), n)
        self._impossible.add(tokens, response_T & (np.isinf(logp_T) | (logp_T > LARGEST_ROUNDED_LOGP)), n)
        self._rounded.add(tokens, response_T & (logp_T > 0) & (logp_T <= LARGEST_ROUNDED_LOGP), n)
        self._zero.add(tokens, zero_T, n)
        entropy_T = np.full_like(logp_T, np.nan) if rows.capture.entropy_T is None else rows.capture.entropy_T
        self._contradicted.add(tokens, zero_T & (entropy_T > MOST_ENTROPY_OF_CERTAIN), int(zero_T.sum()))
        self._entropy_missing.add(tokens, scored_T & ~np.isfinite(entropy_T), int(scored_T.sum()))
        self._entropy_negative.add(tokens, scored_T & (entropy_T < -_ROUNDING), int(scored_T.sum()))
        self._longest = max(self._longest, _longest_run(zero_T, rows.starts))

    def findings(self, where: str) -> list[Finding]:
        """Impossible values, then zeros, then entropies."""
        found = []
        if self._nan.n:
            found.append(counted("D31-nan-logp", where, f"{self._nan.text()} response tokens have no logp", self._nan))
        if self._impossible.n:
            message = f"{self._impossible.text()} logps are infinite or above 0"
            found.append(counted("D31-impossible-logp", where, message, self._impossible))
        if self._rounded.n:
            message = f"{self._rounded.text()} logps are above 0 by at most {LARGEST_ROUNDED_LOGP:g} nat"
            found.append(counted("D31-rounded-logp", where, message, self._rounded))
        if self._contradicted.n:
            message = f"{self._contradicted.text()} logps of exactly 0 beside {MOST_ENTROPY_OF_CERTAIN} nat or more"
            found.append(counted("D31-zero-logp", where, message, self._contradicted))
        elif self._zero.n:
            message = (
                f"{self._zero.text()} logps are exactly 0, longest run {self._longest:,}; no entropy contradicts them"
            )
            found.append(counted("D31-certain-tokens", where, message, self._zero))
        # an arm without any entropy has none to be had
        if 0 < self._entropy_missing.n < self._entropy_missing.n_of:
            message = f"{self._entropy_missing.text()} scored tokens have no finite entropy"
            found.append(counted("D31-entropy", where, message, self._entropy_missing))
        if self._entropy_negative.n:
            message = f"{self._entropy_negative.text()} entropies are negative"
            found.append(counted("D31-entropy", where, message, self._entropy_negative))
        return found


class StoredBits(Tally):
    """Whether all log-probabilities of an arm lie on the grid of a 16-bit type: cast to it before they were kept."""

    def __init__(self) -> None:
        self._n = 0
        self._n_on = dict.fromkeys(("bfloat16", "float16"), 0)

    def add(self, rows: Rows) -> None:
        """Count a shard's distinct values: those that repeat are no further evidence."""
        logp_T = rows.capture.logp_T[rows.tokens.is_scored_T]
        values_N = np.unique(logp_T[np.isfinite(logp_T) & (logp_T < 0)]).astype(np.float32)
        self._n += len(values_N)
        self._n_on["bfloat16"] += int((values_N.view(np.uint32) & 0xFFFF == 0).sum())
        with np.errstate(over="ignore"):
            self._n_on["float16"] += int((values_N.astype(np.float16).astype(np.float32) == values_N).sum())

    def findings(self, where: str) -> list[Finding]:
        """The type on whose grid every value lies; a coarser grid than both lies on bfloat16's, too."""
        kept = next((dtype for dtype, n in self._n_on.items() if self._n >= MIN_ROWS and n == self._n), None)
        if kept is None:
            return []
        message = f"all of {self._n:,} distinct log-probabilities are {kept} values"
        return [finding("rounded-logp", where, message, n=self._n, n_of=self._n)]


def _longest_run(hit_T: NDArray[np.bool_], is_first_T: NDArray[np.bool_]) -> int:
    """Longest run of hits inside one sequence; a sequence begins with its prompt, so no run reaches into the next."""
    if not hit_T.any():
        return 0
    gap_T = np.flatnonzero(np.r_[True, ~hit_T | is_first_T, True])
    return int(np.diff(gap_T).max() - 1)


class TokenLag(Tally):
    """Correlation of two logp streams by lag, within sequences."""

    _ends: ClassVar = {"_n_copies": max}

    def __init__(self) -> None:
        self._sums = {lag: np.zeros((N_GROUPS, 6)) for lag in (0, *TOKEN_LAGS)}
        self._n_copies = 1

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        tokens = train.tokens
        self._n_copies = max(self._n_copies, int(tokens.sample_index_T.max(initial=0)) + 1)
        response_T = tokens.is_scored_T
        x_T, y_T = (np.where(response_T, rows.capture.logp_T, np.nan).astype(np.float64) for rows in (infer, train))
        group_T = group_of(tokens.prompt_id_T, tokens.position_T)
        for lag, sums in self._sums.items():
            here, there = aligned(len(tokens), lag)
            good_T = train.follows(abs(lag)) & np.isfinite(x_T[here]) & np.isfinite(y_T[there])
            x, y, group = x_T[here][good_T], y_T[there][good_T], group_T[here][good_T]
            for i, value in enumerate((np.ones_like(x), x, y, x * x, y * y, x * y)):
                sums[:, i] += np.bincount(group, value, minlength=N_GROUPS)

    def best(self) -> tuple[int, float, float, int, bool] | None:
        """The lag other than 0 of the largest correlation: the lag, its r, that at 0, tokens, and whether it is larger
        by more than chance; None where nothing varies."""
        r = {lag: float(correlation(sums.sum(axis=0))) for lag, sums in self._sums.items()}
        lags = [lag for lag in TOKEN_LAGS if np.isfinite(r[lag])]
        if not lags or not np.isfinite(r[0]):
            return None
        best = max(lags, key=lambda lag: r[lag])
        is_larger = correlation_excess(self._sums[best], self._sums[0], self._n_copies, len(TOKEN_LAGS))
        return best, r[best], r[0], int(self._sums[best][:, 0].sum()), is_larger

    def findings(self, where: str) -> list[Finding]:
        """The lag of the largest correlation, where it is not 0 by more than chance."""
        found = self.best()
        if found is None or not found[-1]:
            return []
        best, r, r_0, n, _ = found
        message = f"train's logps correlate with infer's at lag {best:+d} (r = {r:.3f}), not at 0 ({r_0:.3f})"
        return [finding("D01-token-lag", where, f"{message}, {n:,} tokens", n_of=n)]


class SequenceLag(Tally):
    """Rank correlation of two logp streams within a sequence, at a lag of its own."""

    def __init__(self) -> None:
        self._candidates: list[tuple[int, int, float]] = []  # sequence, lag, chance
        self._n_sequences = 0

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        scored_T, x_T, y_T = scored(train, infer)
        tokens = train.tokens
        for first, end in tokens.sequence_bounds():
            row_N = first + np.flatnonzero(scored_T[first:end])
            x_N, y_N = x_T[row_N], y_T[row_N]
            if len(row_N) < MIN_ROWS or min(np.ptp(x_N), np.ptp(y_N)) == 0:
                continue
            self._n_sequences += 1
            if np.corrcoef(x_N, y_N)[0, 1] < _MOST_LIMIT and (found := _own_lag(x_N, y_N)) is not None:
                self._candidates.append((int(tokens.seq_id_T[first]), *found))

    def findings(self, where: str) -> list[Finding]:
        """The sequences that agree elsewhere, and at which lags."""
        found = sorted(one for one in self._candidates if one[-1] < ALPHA / self._n_sequences)
        if not found:
            return []
        lags = sorted({lag for _, lag, _ in found})
        words = f"lag {lags[0]:+d}" if len(lags) == 1 else f"{len(lags)} different lags, {lags[0]:+d} to {lags[-1]:+d}"
        message = (
            f"in {len(found):,} of {self._n_sequences:,} sequences train's logps go with infer's at a lag of their "
            f"own, and not at 0: {words}"
        )
        places = tuple(Place(one[0], 0) for one in found[:N_PLACES])
        return [finding("D01-sequence-lag", where, message, n=len(found), n_of=self._n_sequences, places=places)]


def _own_lag(x_N: Float64, y_N: Float64) -> tuple[int, float] | None:
    """The lag of the largest rank correlation, and how often chance gives one as large at any of the lags tried; None
    where no lag leaves enough different tokens, or the streams have little in common anywhere."""
    n_lags = min(MAX_OWN_LAG, len(x_N) - MIN_ROWS)
    best: tuple[float, int, int] | None = None
    for lag in (lag for size in range(1, n_lags + 1) for lag in (size, -size)):
        here, there = aligned(len(x_N), lag)
        x, y = x_N[here], y_N[there]
        if min(len(np.unique(x)), len(np.unique(y))) >= MIN_ROWS:
            best = max(best or (-1.0, 0, 0), (float(stats.spearmanr(x, y).statistic), lag, len(x)))
    if best is None or best[0] < _LEAST_OWN:
        return None
    r, lag, n = best
    return lag, float(2 * n_lags * stats.norm.sf(math.atanh(min(r, 1 - 1e-12)) * math.sqrt((n - 3) / 1.06)))


class OtherSequence(Tally):
    """Correlation of two logp streams within every sequence, and how many of its tokens differ by far.

    Keeps 48 bytes per sequence.
    """

    _ends: ClassVar = {"_n_copies": max}

    def __init__(self) -> None:
        self._parts: list[Float64] = []
        self._sums_GS = np.zeros((N_GROUPS, 6))  # of 1, x, y, x^2, y^2, xy about each sequence's means
        self._n_copies = 1

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        scored_T, x_T, y_T = scored(train, infer)
        tokens = train.tokens
        self._n_copies = max(self._n_copies, int(tokens.sample_index_T.max(initial=0)) + 1)
        start_S = np.flatnonzero(train.starts)
        row_T = np.cumsum(train.starts) - 1
        row_N, x_N, y_N = row_T[scored_T], x_T[scored_T], y_T[scored_T]

        def total(values_N: NDArray[Any]) -> Float64:
            return np.bincount(row_N, values_N, minlength=len(start_S)).astype(np.float64)

        n_S = total(np.ones_like(x_N))
        mean_x_S, mean_y_S = (total(values) / np.maximum(n_S, 1) for values in (x_N, y_N))
        dx_N, dy_N = x_N - mean_x_S[row_N], y_N - mean_y_S[row_N]
        columns = (n_S, total(np.abs(y_N - x_N) > FAR), total(dx_N**2), total(dy_N**2), total(dx_N * dy_N))
        part = np.stack([tokens.seq_id_T[start_S], *columns], axis=1).astype(np.float64)
        self._parts.append(part[n_S > 1])
        group_N = group_of(tokens.prompt_id_T[scored_T], tokens.position_T[scored_T])
        for column, values in ((0, np.ones_like(x_N)), (3, dx_N**2), (4, dy_N**2), (5, dx_N * dy_N)):
            self._sums_GS[:, column] += np.bincount(group_N, values, minlength=N_GROUPS)

    def findings(self, where: str) -> list[Finding]:
        """All sequences together, else those unlike most others."""
        parts_SN = np.concatenate(self._parts) if self._parts else np.zeros((0, 6))
        parts_SN = parts_SN[np.argsort(parts_SN[:, 0], kind="stable")]
        if not len(parts_SN):
            return []
        n_S, far_S = parts_SN[:, 1], parts_SN[:, 2]
        n, far = int(n_S.sum()), float(far_S.sum() / n_S.sum())
        r = float(correlation(self._sums_GS.sum(axis=0)))
        if far > _LEAST_FAR_SHARE and correlation_is_below(_UNRELATED, self._sums_GS, self._n_copies):
            message = (
                f"the two sides' logps have nothing in common within sequences (r = {r:.3f}), and {far:.1%} of "
                f"{n:,} tokens differ by more than {FAR} nat"
            )
            return [finding("D01-other-sequence", where, message, n=len(parts_SN), n_of=len(parts_SN))]
        return self._some(where, parts_SN[n_S >= MIN_ROWS])

    def _some(self, where: str, long_SN: Float64) -> list[Finding]:
        if not len(long_SN):
            return []
        n_S, far_S, xx_S, yy_S, xy_S = long_SN[:, 1:].T
        # a quarter of the sequences is taken as healthy, whatever the others are
        usual = max(_LEAST_FAR_SHARE, 3 * float(np.quantile(far_S / n_S, 0.25)))
        most_r_S = np.clip(3 / np.sqrt(n_S - 1), _LEAST_LIMIT, _MOST_LIMIT)
        is_unrelated_S = xy_S < most_r_S * np.sqrt(xx_S * yy_S)
        hits = [
            row
            for row in np.flatnonzero(is_unrelated_S).tolist()
            if exceeds(int(far_S[row]), int(n_S[row]), usual, n_tests=len(long_SN))
        ]
        if not hits:
            return []
        worst = max(hits, key=lambda row: float(far_S[row] / n_S[row]))
        message = (
            f"in {len(hits):,} of {len(long_SN):,} sequences the two sides' logps have nothing in common; worst "
            f"sequence {long_SN[worst, 0]:.0f}: {far_S[worst] / n_S[worst]:.1%} of {n_S[worst]:.0f} tokens differ by "
            f"more than {FAR} nat, a quarter of the sequences at most {usual / 3:.1%}"
        )
        places = tuple(Place(int(long_SN[row, 0]), 0) for row in hits[:N_PLACES])
        return [
            finding("D01-other-sequence", where, message, n=len(hits), n_of=len(long_SN), places=places,
                    base_rate=usual)
        ]  # fmt: skip


class Temperature(Tally):
    """Spread of two logp streams; tokens that one side is certain of say nothing of a scale."""

    def __init__(self) -> None:
        self._sums_GS = np.zeros((N_GROUPS, 6))

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        scored_T, x_T, y_T = scored(train, infer)
        scored_T &= (x_T != 0) & (y_T != 0)
        x, y = x_T[scored_T], y_T[scored_T]
        group = group_of(train.tokens.prompt_id_T[scored_T], train.tokens.position_T[scored_T])
        for i, value in enumerate((np.ones_like(x), x, y, x * x, y * y, x * y)):
            self._sums_GS[:, i] += np.bincount(group, value, minlength=N_GROUPS)

    def findings(self, where: str) -> list[Finding]:
        """A ratio of spreads that noise of either side cannot give."""
        log_ratio, r, is_scaled = spread(self._sums_GS)
        if not is_scaled:
            return []
        ratio, n = math.exp(abs(log_ratio)), int(self._sums_GS[:, 0].sum())
        wide, narrow = ("train", "infer") if log_ratio > 0 else ("infer", "train")
        message = (
            f"{wide}'s logps are spread {ratio:.3f} times as wide as {narrow}'s (r = {r:.3f}, {n:,} "
            f"tokens), as a temperature on one side does: {1 / ratio:.2f} in {wide} if logps were divided by it, "
            "further from 1 if logits were"
        )
        return [finding("D10-temperature", where, message, n_of=n)]


def spread(sums_GS: Float64) -> tuple[float, float, bool]:
    """Log of y's standard deviation over x's, their correlation, and whether the ratio is one that noise of either side
    cannot give (D10).

    Args:
        sums_GS: per group the sums of 1, x, y, x^2, y^2, xy.
    """
    totals = sums_GS.sum(axis=0)
    log_ratio, r = float(_log_spread(totals)), float(correlation(totals))
    if not (math.isfinite(log_ratio) and r > 0):
        return log_ratio, r, False

    def excess(sums: Float64) -> Float64:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(math.copysign(1, log_ratio) * _log_spread(sums) + 2 * np.log(correlation(sums)))

    return log_ratio, r, is_positive(sums_GS, lambda sums: excess(sums) - LEAST_SCALE)


class SameBits(Tally):
    """Tokens that both sides give the same log-probability, bit for bit; certain tokens are no evidence."""

    def __init__(self) -> None:
        self._same = Count()

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        scored_T, x_T, y_T = scored(train, infer)
        scored_T &= (x_T != 0) | (y_T != 0)
        self._same.add(train.tokens, scored_T & (x_T == y_T), int(scored_T.sum()), train.prefixes)

    def findings(self, where: str) -> list[Finding]:
        """Every token the same."""
        if self._same.n < self._same.n_of or self._same.n_distinct < MIN_ROWS:
            return []
        message = f"all {self._same.n_of:,} logps other than 0 are the same on both sides, bit for bit"
        return [counted("D28-same-bits", where, message, self._same)]


class MeanRatio(Tally):
    """Mean of exp(logp_train - logp_infer), by prompt."""

    _ends: ClassVar = {"_n_copies": max}

    def __init__(self) -> None:
        self._n_G, self._sum_G, self._squares = np.zeros(N_GROUPS), np.zeros(N_GROUPS), 0.0
        self._parts: list[Float64] = []  # prompt, n, sum of ratios
        self._n_copies, self._n_prompts = 1, 0

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        scored_T, x_T, y_T = scored(train, infer)
        tokens = train.tokens
        self._n_copies = max(self._n_copies, int(tokens.sample_index_T.max(initial=0)) + 1)
        excess = np.exp(np.minimum(y_T[scored_T] - x_T[scored_T], _MOST_LOG_RATIO)) - 1
        group = group_of(tokens.prompt_id_T[scored_T], tokens.position_T[scored_T])
        self._n_G += np.bincount(group, minlength=N_GROUPS)
        self._sum_G += np.bincount(group, excess, minlength=N_GROUPS)
        self._squares += float((excess**2).sum())
        prompts, row = np.unique(tokens.prompt_id_T[scored_T], return_inverse=True)
        sums = (np.bincount(row), np.bincount(row, excess))
        self._parts.append(np.stack([prompts, *sums], axis=1).astype(np.float64))

    def measured(self) -> tuple[float, Interval | None, int, bool]:
        """The mean less 1, its interval over prompts, tokens, and whether the mean is away from 1 by more than
        chance and by what is worth a word."""
        n = float(self._n_G.sum())
        if not n:
            return 0.0, None, 0, False
        offset = float(self._sum_G.sum()) / n
        signed_G = math.copysign(1, offset) * self._sum_G
        is_away = abs(offset) >= LEAST_OFFSET and mean_is_positive(
            self._n_G, signed_G, self._squares, self._n_copies, n_tests=2
        )
        parts = np.concatenate(self._parts)
        _, row = np.unique(parts[:, 0], return_inverse=True)
        n_C, sum_C = (np.bincount(row, parts[:, column]) for column in (1, 2))
        interval = ratio_mean_interval(sum_C, n_C).one()
        self._n_prompts = len(n_C)
        return offset, interval, int(n), is_away

    def findings(self, where: str) -> list[Finding]:
        """A mean away from 1 by more than chance, with its interval over prompts."""
        offset, interval, n, is_away = self.measured()
        if not is_away or interval is None:
            return []
        bounds = f"[{1 + interval.low:.4f}, {1 + interval.high:.4f}]" if math.isfinite(interval.low) else "no interval"
        message = (
            f"mean of train's over infer's probability is {1 + offset:.4f} ({bounds}, {self._n_prompts:,} prompts, "
            f"{n:,} tokens); 1 where infer samples what it scores"
        )
        return [finding("D09-mean-ratio", where, message, n_of=n)]


class ContradictedZeros(Tally):
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


def scored(train: Rows, infer: Rows) -> tuple[NDArray[np.bool_], Float64, Float64]:
    """Response tokens that both sides scored, and (infer's, train's) logps of all rows."""
    x_T, y_T = (rows.capture.logp_T.astype(np.float64) for rows in (infer, train))
    return train.tokens.is_scored_T & np.isfinite(x_T) & np.isfinite(y_T), x_T, y_T


def _log_spread(sums: Float64) -> Float64:
    """Log of train's standard deviation over infer's, from sums of 1, x, y, x^2, y^2, xy with x = infer."""
    n, x, y, xx, yy, _ = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(0.5 * np.log((yy / n - (y / n) ** 2) / (xx / n - (x / n) ** 2)))
