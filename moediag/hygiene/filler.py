"""D04 and D34: rows and layers whose router saw nothing. What counts as evidence, since hot experts exist:

A set {0, .., K-1} is no evidence: at E = 4, K = 2 every sixth row shows it, and a hot pair may be {0, 1}. Two things
tell a filler row from a popular one. With scores: zero logits tie *everything* (equal gate weights, no margin), in
all layers of the token; ties of bf16 logits are rare and independent of the token's other layers (0.3-1 % of rows
per layer on the trained demo pair), so the rate expected in all layers is the product of the rates among rows that
are not tied throughout. With ids alone: the pattern in all layers at once, against
:func:`moediag.hygiene.chance.joint_rate`. With one layer only: ties fall on {0, .., K-1} far more often than other
rows do; TopK takes the lowest of K+1 tied experts, which makes that set K + 1 times as likely among honest ties.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from moediag.hygiene.chance import ALPHA, exceeds, joint_rate
from moediag.hygiene.findings import Count, Finding, counted, finding
from moediag.hygiene.rows import MIN_ROWS, Rows, Shape

_FLAT = 1e-3
"""Router logits within this of each other count as equal: their entropy is then log E to 1e-7 (range^2 / 8)."""


class Filler:
    """Counts rows and layers of filler of one arm."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        zeros = [np.zeros(shape.n_layers, dtype=np.int64) for _ in range(7)]
        self._routed_L, self._first_L, self._last_L, self._tied_L, self._flat_L, self._logits_L, self._on_L = zeros
        self._tied_apart_L = np.zeros(shape.n_layers, dtype=np.int64)
        self._n_apart = 0
        self._first, self._last, self._tied, self._on = Count(), Count(), Count(), Count()
        self._tied_on = (Count(), Count())  # with one layer: tied rows on the first and the last set
        self._free_on = np.zeros(2, dtype=np.int64)
        self._has_scores = False

    def add(self, rows: Rows) -> None:
        """Count a shard."""
        n = int(rows.routed_throughout.sum())
        self._routed_L += rows.routed.sum(axis=0)
        if self._shape.is_choice:
            for count, hit_TL, hit_L in (
                (self._first, rows.first_set, self._first_L),
                (self._last, rows.last_set, self._last_L),
                (self._on, rows.counting, self._on_L),
            ):
                count.add(rows.tokens, np.asarray(hit_TL.all(axis=1)), n, rows.prefixes)
                hit_L += hit_TL[rows.routed_throughout].sum(axis=0)
        tied_TL = rows.tied
        if tied_TL is not None:
            self._add_ties(rows, tied_TL, n)
        if rows.capture.router_logits_TLE is not None and self._shape.n_experts > 1:
            logits_TLE = rows.capture.router_logits_TLE
            with np.errstate(invalid="ignore"):  # infinite logits are another rule's business
                flat_TL = logits_TLE.max(axis=2) - logits_TLE.min(axis=2) <= _FLAT
            self._flat_L += (flat_TL & rows.routed).sum(axis=0)
            self._logits_L += rows.routed.sum(axis=0)

    def _add_ties(self, rows: Rows, tied_TL: NDArray[np.bool_], n: int) -> None:
        self._has_scores = True
        all_T = np.asarray(tied_TL.all(axis=1))
        self._tied.add(rows.tokens, all_T, n, rows.prefixes)
        self._tied_L += tied_TL.sum(axis=0)
        apart_T = rows.routed_throughout & ~all_T
        self._n_apart += int(apart_T.sum())
        self._tied_apart_L += tied_TL[apart_T].sum(axis=0)
        if self._shape.is_choice and self._shape.n_layers == 1:
            for which, on_T in enumerate((rows.first_set[:, 0], rows.last_set[:, 0])):
                self._tied_on[which].add(rows.tokens, on_T & all_T, int(all_T.sum()), rows.prefixes)
                self._free_on[which] += np.count_nonzero(on_T & apart_T)

    def findings(self, where: str) -> list[Finding]:
        """Flat layers first; filler rows where not every layer is flat."""
        flat_L = self._flat_layers()
        found = [self._flat_finding(where, flat_L)] if flat_L.any() else []
        if not flat_L.all():
            found += self._filler_findings(where)
        return found

    def _flat_layers(self) -> NDArray[np.bool_]:
        """Layers in which every row scores all experts the same."""
        n_L = self._routed_L
        by_logits_L = (self._logits_L == n_L) & (self._flat_L == n_L)
        by_ties_L = self._has_scores & (self._tied_L == n_L)
        # ids alone: a layer that never leaves {0..K-1} is popular by chance only where few sets exist
        is_rare = self._shape.is_choice and 2 * self._shape.n_layers / self._n_sets() < ALPHA
        n_rows = self._first.n_of
        by_ids_L = is_rare & ((self._first_L == n_rows) | (self._last_L == n_rows)) & (n_rows > 0)
        return np.asarray((by_logits_L | by_ties_L | by_ids_L) & (n_L >= MIN_ROWS))

    def _flat_finding(self, where: str, flat_L: NDArray[np.bool_]) -> Finding:
        layers = np.flatnonzero(flat_L).tolist()
        message = (
            f"layers {layers} of {len(flat_L)}: every row scores all experts the same (routing entropy log E), "
            f"{int(self._routed_L.max()):,} rows"
        )
        return finding("D34-flat-router", where, message, n=len(layers), n_of=len(flat_L))

    def _filler_findings(self, where: str) -> list[Finding]:
        tie_rate = self._tie_rate()
        if exceeds(self._tied.n_distinct, self._tied.n_of, tie_rate):
            message = f"{self._tied.text()} rows tie all experts in all layers: equal weights, no margin"
            return [counted("D04-filler-rows", where, message, self._tied, tie_rate)]
        first, last = (
            f"0..{self._shape.top_k - 1}",
            f"{self._shape.n_experts - self._shape.top_k}..{self._shape.n_experts - 1}",
        )
        for which, name in enumerate((first, last)):
            tied, rate = self._tied_on[which], self._rate_among_ties(which)
            if exceeds(tied.n_distinct, tied.n_of, rate, n_tests=2):
                message = f"{tied.text()} tied rows are experts {name}; other rows seldom are"
                return [counted("D04-filler-rows", where, message, tied, rate)]
        for count, hit_L, name in (
            (self._on, self._on_L, "ids that count on from slot to slot (arange modulo E, as slime fills rows)"),
            (self._first, self._first_L, f"experts {first}"),
            (self._last, self._last_L, f"experts {last}"),
        ):
            # ids that count on are never popular: their rate is that of rows which do not do so throughout
            n_full = count.n if count is self._on else 0
            rate = joint_rate(hit_L - n_full, count.n_of - n_full)
            if exceeds(count.n_distinct, count.n_of, rate, n_tests=3) or self._is_all(count):
                message = f"{count.text()} rows are {name} in all {self._shape.n_layers} layers"
                return [counted("D04-filler-rows", where, message, count, rate)]
        return []

    def _tie_rate(self) -> float:
        """Expected rate of rows tied in all layers, from rows tied in some; 1 where one layer cannot tell."""
        if not self._has_scores or self._shape.n_layers == 1:
            return 1.0
        # rule of succession: no tie seen in n rows still leaves a rate of about 1 / n
        return float(np.prod((self._tied_apart_L + 1) / (self._n_apart + 2)))

    def _rate_among_ties(self, which: int) -> float:
        """How often honest ties fall on the first (0) or last (1) set, at most; the last is rarer than we allow."""
        rate = (int(self._free_on[which]) + 1) / (self._n_apart + 2)
        return min(1.0, (self._shape.top_k + 1) * rate)

    def _is_all(self, count: Count) -> bool:
        """Every row shows it, and no popular set falls on these experts in all layers by chance."""
        if count.n < count.n_of or count.n_distinct < MIN_ROWS or not self._shape.is_choice:
            return False
        return 2 * math.pow(self._n_sets(), -self._shape.n_layers) < ALPHA

    def _n_sets(self) -> float:
        return float(math.comb(self._shape.n_experts, self._shape.top_k))
