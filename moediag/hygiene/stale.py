"""D05: the routing of one token stored again for another token of its sequence, at one distance.

Only pairs of *different* tokens count: the same token often takes the same experts (14 % of neighbouring equal tokens
in all six layers of the trained demo pair, 0 of 25,249 unequal ones). Filler rows are left to D03 and D04.

Evidence, at each distance d = 1 .. 64 (d = 1: a step's buffer not refreshed; d = n: a chunk of n rows):
    - with scores, rows equal bit for bit in ids, gate weights and margins, against the same at all other distances
      (a run of identical rows counts at its own distance only);
    - with ids alone, same sets in all layers, against :func:`moediag.hygiene.chance.joint_rate` of neighbours; for
      d > 1 only matches inside runs of at least 3. At L <= 2, or where every set is popular, ids alone cannot tell.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moediag.hygiene.chance import exceeds, exceeds_others, joint_rate
from moediag.hygiene.findings import Count, Finding, counted
from moediag.hygiene.rows import MIN_ROWS, Rows, Shape, over_slots

MAX_LAG = 64
_LEAST_RUN = 3
_CHUNK = 1024


class Stale:
    """Counts repeated rows of one arm by distance."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._sets = [Count() for _ in range(MAX_LAG + 1)]  # by distance; 0 is not used
        self._bits = [Count() for _ in range(MAX_LAG + 1)]
        self._neighbours_L = np.zeros(shape.n_layers, dtype=np.int64)
        self._has_scores = True

    def add(self, rows: Rows) -> None:
        """Count a shard."""
        if len(rows) < 2:
            return
        usable_T = rows.routed_throughout & ~rows.filler
        sets_T = _hash_rows(rows.sets)
        bits_T = _score_hashes(rows)
        self._has_scores &= bits_T is not None
        same_TL = over_slots(np.logical_and, rows.sets[1:] == rows.sets[:-1])
        self._neighbours_L += same_TL[_pairs(rows, usable_T, 1)].sum(axis=0)
        self._add_lags(rows, usable_T, sets_T, self._sets, _LEAST_RUN)
        if bits_T is not None:
            self._add_lags(rows, usable_T, bits_T, self._bits, 1)

    def _add_lags(
        self, rows: Rows, usable_T: NDArray[np.bool_], hash_T: NDArray[np.uint64], counts: list[Count], least_run: int
    ) -> None:
        run_T = np.cumsum(np.r_[True, (hash_T[1:] != hash_T[:-1]) | rows.starts[1:]])
        for lag in range(1, min(MAX_LAG, len(rows) - 1) + 1):
            pair_T = _pairs(rows, usable_T, lag)
            if lag > 1:  # a run of one row repeated is at distance 1, whatever else it matches
                pair_T &= run_T[lag:] != run_T[:-lag]
            hit_T = pair_T & (hash_T[lag:] == hash_T[:-lag])
            if lag > 1 and least_run > 1 and hit_T.any():
                hit_T = _in_runs(hit_T)
            late_T = np.r_[np.zeros(lag, dtype=np.bool_), hit_T]
            counts[lag].add(rows.tokens, late_T, int(np.count_nonzero(pair_T)), rows.prefixes)

    def findings(self, where: str) -> list[Finding]:
        """The most telling distance, if any."""
        by_scores = self._lags_by_scores()
        if by_scores:
            return [self._finding(where, by_scores, self._bits, "ids, gate weights and margins")]
        neighbours = self._sets[1]
        rate = joint_rate(self._neighbours_L, neighbours.n_of)
        by_ids = [
            lag
            for lag, count in enumerate(self._sets)
            if self._shape.n_layers > 2 and exceeds(count.n_distinct, count.n_of, rate, n_tests=MAX_LAG)
        ] or ([1] if self._never_changes(neighbours) else [])
        return [self._finding(where, by_ids, self._sets, "ids", rate)] if by_ids else []

    def _finding(
        self, where: str, lags: list[int], counts: list[Count], what: str, rate: float | None = None
    ) -> Finding:
        lag = max(lags, key=lambda d: counts[d].n)
        message = (
            f"{counts[lag].text()} rows {lag} after another token's repeat its routing in all {self._shape.n_layers} "
            f"layers ({what})"
        )
        return counted("D05-stale-rows", where, message, counts[lag], rate)

    def _lags_by_scores(self) -> list[int]:
        if not self._has_scores:
            return []
        total, n_total = (sum(values) for values in zip(*((c.n, c.n_of) for c in self._bits), strict=True))
        lags = [
            lag
            for lag, count in enumerate(self._bits)
            if exceeds_others(count.n_distinct, count.n_of, total - count.n, n_total - count.n_of, n_tests=MAX_LAG)
        ]
        return lags or ([1] if _is_all(self._bits[1]) else [])

    def _never_changes(self, neighbours: Count) -> bool:
        """All neighbours alike: then no rate can be measured, but four free layers leave no other reading."""
        return self._shape.n_layers >= 4 and self._shape.is_choice and _is_all(neighbours)


def _is_all(count: Count) -> bool:
    return count.n == count.n_of and count.n_distinct >= MIN_ROWS


def _pairs(rows: Rows, usable_T: NDArray[np.bool_], lag: int) -> NDArray[np.bool_]:
    """(T - lag,) pairs of usable rows of one sequence that consumed different tokens."""
    token_T = rows.tokens.token_id_T
    pair_T: NDArray[np.bool_] = rows.follows(lag) & usable_T[lag:] & usable_T[:-lag]
    pair_T &= token_T[lag:] != token_T[:-lag]
    return pair_T


def _hash_rows(values: NDArray[Any]) -> NDArray[np.uint64]:
    """(T, ...) -> (T,) one 64-bit hash per row; equal rows have equal hashes, others all but never."""
    n_rows, n_bytes = len(values), values[0].nbytes
    bytes_TB = np.ascontiguousarray(values).reshape(n_rows, -1).view(np.uint8)
    words_TN = (
        np.pad(bytes_TB, ((0, 0), (0, -n_bytes % 8))).view(np.uint64) if n_bytes % 8 else bytes_TB.view(np.uint64)
    )
    rng = np.random.default_rng(0)  # fixed multipliers: the same rows give the same hash in every shard
    odd_N = rng.integers(0, 2**63, words_TN.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    hash_T = np.empty(n_rows, dtype=np.uint64)
    for start in range(0, n_rows, _CHUNK):
        part = words_TN[start : start + _CHUNK]
        part = part ^ (part >> np.uint64(29))
        part *= odd_N
        hash_T[start : start + _CHUNK] = part.sum(axis=1, dtype=np.uint64)
    return hash_T


def _score_hashes(rows: Rows) -> NDArray[np.uint64] | None:
    """Hash of ids in order, gate weights and margins; None without any score that differs between rows."""
    capture, shape = rows.capture, rows.shape
    parts: list[NDArray[Any]] = []
    if capture.gate_weights_TLK is not None and shape.top_k > 1:
        parts.append(capture.gate_weights_TLK)
    if shape.is_choice:
        parts += [margin for margin in (capture.margin_TL, capture.logit_margin_TL) if margin is not None]
    if not parts:
        return None
    hash_T = _hash_rows(rows.ids)
    for i, part in enumerate(parts):
        hash_T = hash_T * np.uint64(0x9E3779B97F4A7C15 + 2 * i) + _hash_rows(part)
    return hash_T


def _in_runs(hit_T: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Hits that stand in a run of at least _LEAST_RUN hits."""
    edge_T = np.flatnonzero(np.diff(np.r_[False, hit_T, False].astype(np.int8)))
    kept_T = np.zeros(len(hit_T), dtype=bool)
    for start, end in zip(edge_T[::2].tolist(), edge_T[1::2].tolist(), strict=True):
        if end - start >= _LEAST_RUN:
            kept_T[start:end] = True
    return kept_T
