"""Two streams of log-probabilities of the same tokens, beyond their lag: unrelated, scaled, copied, or not of mean 1.

Each is judged against what healthy engines may do, however noisy:
    - **Unrelated** (D01): tokens of a sequence vary together on both sides, or hardly at all. A sequence whose sides
      differ by far on most tokens *and* do not correlate is of other tokens. Noise alone makes one or the other.
    - **Scaled** (D10): noise on one side widens it, by no more than -log(r) at a correlation of r. A temperature widens
      without costing correlation: only a spread beyond twice that counts.
    - **Mean ratio** (D09): exactly 1 in expectation whatever train computes, if infer sampled the tokens from what it
      scores them with; so only asked of tokens of which that is known.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moediag.analysis.intervals import ratio_mean_interval
from moediag.hygiene.chance import (
    N_GROUPS,
    correlation,
    correlation_is_below,
    exceeds,
    group_of,
    is_positive,
    mean_is_positive,
)
from moediag.hygiene.findings import N_PLACES, Count, Finding, Place, counted, finding
from moediag.hygiene.rows import MIN_ROWS, Rows

Float64 = NDArray[np.float64]

FAR = 0.2
"""abs(logp_diff) [nat] that healthy tokens seldom reach: ten times the mean of published healthy pairs (0.011 to
0.028); two bf16 trainers move 8 % of tokens beyond 0.1 (TRL issue 6789)."""

_LEAST_FAR_SHARE = 0.1
"""Share of far tokens that is never an error: R3's collapse mark is 0.1 beyond a factor of 2, which is farther."""

_UNRELATED = 0.4
"""Correlation within sequences below which two streams have nothing in common; 0.99 is healthy (verl #7242). Ours, and
far off on purpose: streams of other sequences were within 0.1 of 0, so that 130 tokens are enough to tell."""

_LEAST_LIMIT, _MOST_LIMIT = 0.2, 0.5
"""Correlation of one sequence of many tokens, and of few, that still passes for 0."""

_LEAST_SCALE = math.log(1.03)
"""Log of the ratio of spreads that is never an error; ours: a softmax temperature of 0.9 gives 0.04 to 0.05,
and vLLM against transformers 0.0007 on the trained demo pair (19,395 tokens, r = 0.9996)."""

_LEAST_OFFSET = 1e-3
"""Distance of a mean ratio from 1 that is never worth a word; ours: logps rounded to bfloat16 bias it by less."""

_MOST_LOG_RATIO = 20.0
"""exp(20) is 5e8: one token decides a mean of ratios from there on, as corrections have it."""


class OtherSequence:
    """Correlation of two logp streams within every sequence, and how many of its tokens differ by far.

    Keeps 48 bytes per sequence.
    """

    def __init__(self) -> None:
        self._parts: list[Float64] = []
        self._sums_GS = np.zeros((N_GROUPS, 6))  # of 1, x, y, x^2, y^2, xy about each sequence's means
        self._n_copies = 1

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        scored_T, x_T, y_T = _scored(train, infer)
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
        """All sequences together, else those that stand apart from most others."""
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


class Temperature:
    """Spread of two logp streams; tokens that one side is certain of say nothing of a scale."""

    def __init__(self) -> None:
        self._sums_GS = np.zeros((N_GROUPS, 6))

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        scored_T, x_T, y_T = _scored(train, infer)
        scored_T &= (x_T != 0) & (y_T != 0)
        x, y = x_T[scored_T], y_T[scored_T]
        group = group_of(train.tokens.prompt_id_T[scored_T], train.tokens.position_T[scored_T])
        for i, value in enumerate((np.ones_like(x), x, y, x * x, y * y, x * y)):
            self._sums_GS[:, i] += np.bincount(group, value, minlength=N_GROUPS)

    def findings(self, where: str) -> list[Finding]:
        """A ratio of spreads that noise of either side cannot give."""
        totals = self._sums_GS.sum(axis=0)
        log_ratio, r = _log_spread(totals), float(correlation(totals))
        if not (math.isfinite(log_ratio) and r > 0):
            return []

        def excess(sums: Float64) -> Float64:
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray(math.copysign(1, log_ratio) * _log_spread(sums) + 2 * np.log(correlation(sums)))

        if not is_positive(self._sums_GS, lambda sums: excess(sums) - _LEAST_SCALE):
            return []
        ratio = math.exp(abs(log_ratio))
        wide, narrow = ("train", "infer") if log_ratio > 0 else ("infer", "train")
        message = (
            f"{wide}'s logps are spread {ratio:.3f} times as wide as {narrow}'s (r = {r:.3f}, {int(totals[0]):,} "
            f"tokens), as a temperature on one side does: {1 / ratio:.2f} in {wide} if logps were divided by it, "
            "further from 1 if logits were"
        )
        return [finding("D10-temperature", where, message, n_of=int(totals[0]))]


class SameBits:
    """Tokens that both sides give the same log-probability, bit for bit; certain tokens are no evidence."""

    def __init__(self) -> None:
        self._same = Count()

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        scored_T, x_T, y_T = _scored(train, infer)
        scored_T &= (x_T != 0) | (y_T != 0)
        self._same.add(train.tokens, scored_T & (x_T == y_T), int(scored_T.sum()), train.prefixes)

    def findings(self, where: str) -> list[Finding]:
        """Every token the same."""
        if self._same.n < self._same.n_of or self._same.n_distinct < MIN_ROWS:
            return []
        message = f"all {self._same.n_of:,} logps other than 0 are the same on both sides, bit for bit"
        return [counted("D28-same-bits", where, message, self._same)]


class MeanRatio:
    """Mean of exp(logp_train - logp_infer), by prompt."""

    def __init__(self) -> None:
        self._n_G, self._sum_G, self._squares = np.zeros(N_GROUPS), np.zeros(N_GROUPS), 0.0
        self._parts: list[Float64] = []  # prompt, n, sum of ratios
        self._n_copies = 1

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        scored_T, x_T, y_T = _scored(train, infer)
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

    def findings(self, where: str) -> list[Finding]:
        """A mean away from 1 by more than chance, with its interval over prompts."""
        n = float(self._n_G.sum())
        offset = float(self._sum_G.sum()) / n if n else 0.0
        if abs(offset) < _LEAST_OFFSET:
            return []
        signed_G = math.copysign(1, offset) * self._sum_G
        if not mean_is_positive(self._n_G, signed_G, self._squares, self._n_copies, n_tests=2):
            return []
        parts = np.concatenate(self._parts)
        _, row = np.unique(parts[:, 0], return_inverse=True)
        n_C, sum_C = (np.bincount(row, parts[:, column]) for column in (1, 2))
        interval = ratio_mean_interval(sum_C, n_C).one()
        bounds = f"[{1 + interval.low:.4f}, {1 + interval.high:.4f}]" if math.isfinite(interval.low) else "no interval"
        message = (
            f"mean of train's over infer's probability is {1 + offset:.4f} ({bounds}, {len(n_C):,} prompts, "
            f"{n:,.0f} tokens); 1 where infer samples what it scores"
        )
        return [finding("D09-mean-ratio", where, message, n_of=int(n))]


def _scored(train: Rows, infer: Rows) -> tuple[NDArray[np.bool_], Float64, Float64]:
    """Response tokens that both sides scored, and (infer's, train's) logps of all rows."""
    x_T, y_T = (rows.capture.logp_T.astype(np.float64) for rows in (infer, train))
    return train.tokens.is_scored_T & np.isfinite(x_T) & np.isfinite(y_T), x_T, y_T


def _log_spread(sums: Float64) -> Float64:
    """Log of train's standard deviation over infer's, from sums of 1, x, y, x^2, y^2, xy with x = infer."""
    n, x, y, xx, yy, _ = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(0.5 * np.log((yy / n - (y / n) ** 2) / (xx / n - (x / n) ** 2)))
