"""D31: log-probabilities that no model gives, and exact zeros, which a model may give.

A logp of exactly 0.0 is honest where the token is near certain: logit - logsumexp rounds to 0 once 1 - p is below half
an ulp of the logsumexp. In bfloat16 and for a logsumexp below 32 that is 1 - p <= 1/16, and then the entropy is at
most h(1/16) + log(V) / 16 = 1.02 nat for V up to 2^18. A zero beside more entropy than that is no rounding. Zeros that
only the other side contradicts are judged in :mod:`moediag.hygiene.sides`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moediag.hygiene.findings import Count, Finding, counted
from moediag.hygiene.rows import Rows
from moediag.run.capture import LARGEST_ROUNDED_LOGP

MOST_ENTROPY_OF_CERTAIN = 1.02
"""Entropy [nat] above which a logp of exactly 0 is not a rounded near-certain token; derived above."""

_ROUNDING = 1e-3
"""Entropies may be negative by rounding of -sum p log p in half precision; below this [nat] they are wrong."""


class Logps:
    """Counts impossible and certain log-probabilities of one arm's response tokens."""

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
            message = (
                f"{self._contradicted.text()} logps of exactly 0 stand beside {MOST_ENTROPY_OF_CERTAIN} nat or more"
            )
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


def _longest_run(hit_T: NDArray[np.bool_], is_first_T: NDArray[np.bool_]) -> int:
    """Longest run of hits inside one sequence; a sequence begins with its prompt, so no run reaches into the next."""
    if not hit_T.any():
        return 0
    gap_T = np.flatnonzero(np.r_[True, ~hit_T | is_first_T, True])
    return int(np.diff(gap_T).max() - 1)
