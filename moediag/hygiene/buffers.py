"""Rows that a buffer did not get: never written, not refreshed, or not there at all.

**Filler** (D04, D34), :class:`Filler`: rows and layers whose router saw nothing. A set {0, .., K-1} is no evidence: at
E = 4, K = 2 every sixth row shows it, and a hot pair may be {0, 1}. Two things distinguish a filler row from a popular
one. With scores: zero logits tie *everything* (equal gate weights, no margin), in
all layers of the token; ties of bf16 logits are rare and independent of the token's other layers (0.3-1 % of rows
per layer on the trained demo pair), so the rate expected in all layers is the product of the rates among rows that
are not tied throughout. With ids alone: the pattern in all layers at once, against
:func:`moediag.hygiene.chance.joint_rate`. With one layer only: ties fall on {0, .., K-1} far more often than other
rows do; TopK takes the lowest of K+1 tied experts, which makes that set K + 1 times as likely among honest ties.

**Stale** (D05), :class:`Stale`: the routing of one token stored again for another of its sequence, at one distance.
Only pairs of *different* tokens count: the same token often takes the same experts (14 % of neighbouring equal tokens
in all six layers of the trained demo pair, 0 of 25,249 unequal ones). Filler rows are left to D03 and D04.

Evidence, at each distance d = 1 .. 64 (d = 1: a step's buffer not refreshed; d = n: a chunk of n rows):
    - with scores, rows equal bit for bit in ids, gate weights and margins, against the same at all other distances
      (a run of identical rows counts at its own distance only);
    - with ids alone, same sets in all layers, against :func:`moediag.hygiene.chance.joint_rate` of neighbours; for
      d > 1 only matches inside runs of at least 3. At L <= 2, or where every set is popular, ids alone do not decide.
    What lies behind it is often a size: a prefill chunk, a cache block. Blocks of stale rows that touch multiples of a
    power of two, or of a CUDA graph's size, more often than their lengths explain name that size (:class:`_Blocks`).

**Missing** (D06, D07, D08), :class:`Completeness`: which rows lack routing, and why: the sampled last token, a rank's
share, a cached prefix, or no known pattern. Counts of whole sequences, so that the order of sequences and the shards do
not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moediag.hygiene.chance import ALPHA, exceeds, exceeds_others, joint_rate
from moediag.hygiene.findings import Count, Finding, Tally, counted, finding
from moediag.hygiene.rows import MIN_ROWS, Rows, Shape, n_rows_by_layer, prefix_hashes
from moediag.run.capture import Int64, TokenRows

_FLAT = 1e-3
"""Router logits within this of each other count as equal: their entropy is then log E to 1e-7 (range^2 / 8)."""

MAX_LAG = 64
_LEAST_RUN = 3
_CHUNK = 1024

_SIZES = tuple(2**i for i in range(4, 14))
"""Sizes whose multiples stale rows may begin or end at: cache blocks are 16 tokens and up, prefill chunks up to 8,192
(SGLang's and vLLM's defaults)."""
_GRAPHS = tuple(n for n in (*range(24, 256, 8), *range(272, 512, 16)) if n & (n - 1))
"""Other sizes that both capture CUDA graphs for (vLLM 0.32 config/vllm.py, SGLang server_args.py): a batch is padded to
the next of them. Each is a test of its own, so a chance counts this many times; and they lie so close that all blocks
at one place are one piece of evidence."""
_BY_CHANCE = 0.05
"""Chance below which a size is named in a finding that stands without it; it is shown."""

_RANKS = (2, 3, 4, 6, 8, 16)
_MOST = 0.95
"""Share of a pattern's rows or sequences that must fit it before it is named: the rest may be cut by a batch's end."""

_LEAST_BLOCK = 8
"""Smallest block size that a common divisor is taken for: vLLM's blocks are 16 and up, on some devices 8."""


class Filler(Tally):
    """Counts rows and layers of filler of one arm."""

    _ends: ClassVar = {"_has_scores": max}

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
        self._routed_L += n_rows_by_layer(rows.routed)
        if self._shape.is_choice:
            for count, hit_TL, hit_L in (
                (self._first, rows.first_set, self._first_L),
                (self._last, rows.last_set, self._last_L),
                (self._on, rows.counting, self._on_L),
            ):
                count.add(rows.tokens, np.asarray(hit_TL.all(axis=1)), n, rows.prefixes)
                hit_L += n_rows_by_layer(hit_TL[rows.routed_throughout])
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
        self._tied_L += n_rows_by_layer(tied_TL)
        apart_T = rows.routed_throughout & ~all_T
        self._n_apart += int(apart_T.sum())
        self._tied_apart_L += n_rows_by_layer(tied_TL[apart_T])
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
        """Expected rate of rows tied in all layers, from rows tied in some; 1 where one layer does not decide."""
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


class _Blocks(Tally):
    """Runs of stale rows, and which powers of two their positions touch multiples of."""

    _ends: ClassVar = {"_longest": max}

    def __init__(self) -> None:
        self._n, self._n_positions = 0, 0
        self._touch = dict.fromkeys(_SIZES, 0)
        self._places: set[tuple[int, int]] = set()
        self._longest = (0, 0, 0)  # length, then sequence and first position, negated: the first of equal ones

    def add(self, rows: Rows, late_T: NDArray[np.bool_], alike_T: NDArray[np.bool_], before: int) -> None:
        """Count the blocks of rows that repeat an earlier one.

        Args:
            late_T: rows that repeat another token's.
            alike_T: rows that repeat one, be it of the same token: a block may hold such rows, none consists of them.
            before: rows before a block that may belong to it: of a row and its copies none is known to be the first.
        """
        edge_N = np.flatnonzero(np.diff(np.r_[False, alike_T, False].astype(np.int8)))
        n_late_T = np.r_[0, np.cumsum(late_T)]
        is_stale_N = n_late_T[edge_N[1::2]] > n_late_T[edge_N[::2]]
        start_N, length_N = edge_N[::2][is_stale_N], (edge_N[1::2] - edge_N[::2])[is_stale_N]
        first_N = rows.tokens.position_T[start_N].astype(np.int64)
        seq_N = rows.tokens.seq_id_T[start_N]
        longest = zip(length_N.tolist(), (-seq_N).tolist(), (-first_N).tolist(), strict=True)
        self._longest = max([self._longest, *longest])
        # samples of one prompt may be copies of each other
        is_own_N = rows.tokens.sample_index_T[start_N] == 0
        low_N, high_N = np.maximum(first_N - before, 1)[is_own_N], (first_N + length_N)[is_own_N]
        self._n += len(low_N)
        self._n_positions += int((high_N - low_N + 1).sum())
        for size in self._touch:
            self._touch[size] += _n_touching(size, low_N, high_N)
        self._places.update(zip(low_N.tolist(), high_N.tolist(), strict=True))

    def text(self) -> str:
        """The longest block, and the size that their positions name, if any."""
        length, seq_id, first = self._longest[0], -self._longest[1], -self._longest[2]
        words = f"longest block: {length:,} rows from position {first:,} of sequence {seq_id}"
        if not self._n:
            return words
        mean = self._n_positions / self._n
        touching = {size: (n_touch, self._n, 1) for size, n_touch in self._touch.items()}
        low_N, high_N = np.array(sorted(self._places)).T
        touching |= {size: (_n_touching(size, low_N, high_N), len(low_N), len(_GRAPHS)) for size in _GRAPHS}
        # multiples of a power of two are those of every smaller one: the least chance of all is no more than its value
        chances = {
            size: n_tests * float(stats.binom.sf(n_touch - 1, n, min(1.0, mean / size)))
            for size, (n_touch, n, n_tests) in touching.items()
        }
        size = min(chances, key=lambda one: chances[one])
        if chances[size] < _BY_CHANCE:
            n_touch, n, _ = touching[size]
            what = "blocks touch" if size in _SIZES else "places of blocks touch"
            graph = ", which vLLM and SGLang capture" if size in _GRAPHS else ""
            return (
                f"{words}; {n_touch:,} of {n:,} {what} multiples of {size:,} (by chance {chances[size]:.2g}): is that "
                f"the size of a prefill chunk, cache block or CUDA graph{graph}?"
            )
        at_size = next((one for one in (first, first - 1) if one in _GRAPHS), None)
        if at_size is None:
            return words
        return f"{words}, at {at_size}: vLLM and SGLang capture CUDA graphs of that size (every 8, so one block in 4)"


def _n_touching(size: int, low_N: NDArray[np.int64], high_N: NDArray[np.int64]) -> int:
    """Blocks of positions that hold a multiple of a size."""
    return int((high_N // size > (low_N - 1) // size).sum())


class Stale(Tally):
    """Counts repeated rows of one arm by distance."""

    _ends: ClassVar = {"_has_scores": min}

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._sets = tuple(Count() for _ in range(MAX_LAG + 1))  # by distance; 0 is not used
        self._bits = tuple(Count() for _ in range(MAX_LAG + 1))
        self._set_blocks, self._bit_blocks = (tuple(_Blocks() for _ in range(MAX_LAG + 1)) for _ in range(2))
        self._neighbours_L = np.zeros(shape.n_layers, dtype=np.int64)
        self._has_scores = True

    def add(self, rows: Rows) -> None:
        """Count a shard."""
        if len(rows) < 2:
            return
        usable_T = rows.routed_throughout & ~rows.filler
        sets_T = _hash_rows(rows.set_hashes)
        bits_T = _score_hashes(rows)
        self._has_scores &= bits_T is not None
        self._neighbours_L += n_rows_by_layer(rows.repeats[_pairs(rows, usable_T, 1)])
        self._add_lags(rows, usable_T, sets_T, self._sets, self._set_blocks, _LEAST_RUN)
        if bits_T is not None:
            self._add_lags(rows, usable_T, bits_T, self._bits, self._bit_blocks, 1)

    def _add_lags(
        self,
        rows: Rows,
        usable_T: NDArray[np.bool_],
        hash_T: NDArray[np.uint64],
        counts: Sequence[Count],
        blocks: Sequence[_Blocks],
        least_run: int,
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
            if hit_T.any():
                alike_T = rows.follows(lag) & usable_T[lag:] & usable_T[:-lag] & (hash_T[lag:] == hash_T[:-lag])
                alike_T = np.r_[np.zeros(lag, dtype=np.bool_), alike_T]
                blocks[lag].add(rows, late_T, alike_T, before=int(lag == 1))

    def findings(self, where: str) -> list[Finding]:
        """The most telling distance, if any."""
        by_scores = self._lags_by_scores()
        if by_scores:
            return [self._finding(where, by_scores, self._bits, self._bit_blocks, "ids, gate weights and margins")]
        neighbours = self._sets[1]
        rate = joint_rate(self._neighbours_L, neighbours.n_of)
        by_ids = [
            lag
            for lag, count in enumerate(self._sets)
            if self._shape.n_layers > 2 and exceeds(count.n_distinct, count.n_of, rate, n_tests=MAX_LAG)
        ] or ([1] if self._never_changes(neighbours) else [])
        return [self._finding(where, by_ids, self._sets, self._set_blocks, "ids", rate)] if by_ids else []

    def _finding(
        self,
        where: str,
        lags: list[int],
        counts: Sequence[Count],
        blocks: Sequence[_Blocks],
        what: str,
        rate: float | None = None,
    ) -> Finding:
        lag = max(lags, key=lambda d: counts[d].n)
        message = (
            f"{counts[lag].text()} rows {lag} after another token's repeat its routing in all {self._shape.n_layers} "
            f"layers ({what}); {blocks[lag].text()}"
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
        hash_T[start : start + _CHUNK] = np.einsum("tn,n->t", part ^ (part >> np.uint64(29)), odd_N)
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
    """Hits inside a run of at least _LEAST_RUN hits."""
    edge_T = np.flatnonzero(np.diff(np.r_[False, hit_T, False].astype(np.int8)))
    kept_T = np.zeros(len(hit_T), dtype=bool)
    for start, end in zip(edge_T[::2].tolist(), edge_T[1::2].tolist(), strict=True):
        if end - start >= _LEAST_RUN:
            kept_T[start:end] = True
    return kept_T


class _Gap(NamedTuple):
    length: int
    prefix_hash: int


class Completeness(Tally):
    """Counts absent rows of one arm, shard by shard; where it sampled, the last row of a sequence may lack."""

    def __init__(self, is_sampled: bool) -> None:
        self._is_sampled = is_sampled
        self._absent, self._absent_last = Count(), Count()
        self._absent_L: NDArray[np.int64] | None = None
        self._n_sequences = 0
        self._gaps: list[_Gap] = []
        self._n_leading = 0  # absent rows in a gap at the beginning of a sequence
        self._strided = {n: np.zeros((2, n), dtype=np.int64) for n in _RANKS}  # rows, present rows by position mod n
        self._blocks = dict.fromkeys(_RANKS, 0)  # sequences with one present block of length / n
        self._n_long = dict.fromkeys(_RANKS, 0)

    def add(self, rows: Rows) -> None:
        """Count a shard."""
        absent_TL = rows.absent
        last_TL = absent_TL & rows.ends[:, None]
        n_last = int(rows.ends.sum())
        self._n_sequences += n_last
        n_layers = absent_TL.shape[1]
        self._absent.add(rows.tokens, absent_TL & ~rows.ends[:, None], (len(rows) - n_last) * n_layers)
        self._absent_last.add(rows.tokens, last_TL, n_last * n_layers)
        absent_L = (absent_TL & ~rows.ends[:, None]).sum(axis=0)
        self._absent_L = absent_L if self._absent_L is None else self._absent_L + absent_L
        self._add_patterns(rows, np.asarray(absent_TL.any(axis=1)) & ~rows.ends)

    def _add_patterns(self, rows: Rows, absent_T: NDArray[np.bool_]) -> None:
        used_T = ~rows.ends
        position_T, start_S = rows.tokens.position_T, np.flatnonzero(rows.starts)
        length_S = np.diff(np.r_[start_S, len(rows)])
        for n in _RANKS:
            rest_T = position_T % n
            self._strided[n][0] += np.bincount(rest_T[used_T], minlength=n)
            self._strided[n][1] += np.bincount(rest_T[used_T & ~absent_T], minlength=n)
        present_T = used_T & ~absent_T
        n_present_S = np.add.reduceat(present_T.astype(np.int64), start_S)
        before_T = np.r_[False, present_T[:-1]] & ~rows.starts
        n_blocks_S = np.add.reduceat((present_T & ~before_T).astype(np.int64), start_S)
        for n in _RANKS:
            is_long_S = length_S - 1 >= 2 * n
            fits_S = is_long_S & (n_blocks_S == 1) & (np.abs(n_present_S - length_S / n) <= 1)
            self._n_long[n] += int(is_long_S.sum())
            self._blocks[n] += int(fits_S.sum())
        if absent_T.any():
            self._add_gaps(rows, present_T, absent_T, start_S)

    def _add_gaps(self, rows: Rows, present_T: NDArray[np.bool_], absent_T: NDArray[np.bool_], start_S: Int64) -> None:
        far = np.iinfo(np.int32).max
        first_S = np.minimum.reduceat(np.where(present_T, rows.tokens.position_T, far), start_S)
        gap_S = np.where((first_S > 0) & (first_S < far), first_S, 0)
        hash_T = rows.prefixes
        for start, gap in zip(start_S[gap_S > 0].tolist(), gap_S[gap_S > 0].tolist(), strict=True):
            self._gaps.append(_Gap(gap, int(hash_T[start + gap - 1])))
            self._n_leading += int(absent_T[start : start + gap].sum())

    @property
    def gap_lengths(self) -> set[int]:
        """Lengths whose prefixes must be counted over all sequences for :meth:`findings`."""
        return {gap.length for gap in self._gaps}

    def findings(self, where: str, prefixes: dict[tuple[int, int], int]) -> list[Finding]:
        """What is missing, and the pattern named.

        Args:
            prefixes: number of sequences by (length, hash) of their prefix, from :func:`count_prefixes`.
        """
        if not self._absent.n:
            return self._last_row_findings(where)
        n_layers = 0 if self._absent_L is None else len(self._absent_L)
        message = f"{self._absent.text()} (token, layer) lack expert ids"
        if self._absent_L is not None and 0 < np.count_nonzero(self._absent_L) < n_layers:
            layers = np.flatnonzero(self._absent_L).tolist()
            message += f", only in layers {_ranges(layers)} of 0-{n_layers - 1} (another pipeline rank?)"
        named = self._rank_local(where) or self._cached_prefix(where, prefixes)
        return [counted("completeness", where, message, self._absent), *named]

    def _last_row_findings(self, where: str) -> list[Finding]:
        if not self._absent_last.n or self._is_sampled:
            return []
        if self._absent_last.n == self._absent_last.n_of:
            message = f"the last token of all {self._n_sequences:,} sequences has no routing row"
            return [counted("D06-last-row", where, message, self._absent_last)]
        message = f"{self._absent_last.text()} (last token, layer) lack expert ids"
        return [counted("completeness", where, message, self._absent_last)]

    def _rank_local(self, where: str) -> list[Finding]:
        if self._absent_L is None or self._absent.share == 1:
            return []
        for n in _RANKS:
            rows_R, present_R = self._strided[n]
            share_R = present_R / np.maximum(rows_R, 1)
            rank = int(share_R.argmax())
            others = np.delete(share_R, rank)
            if rows_R.min() >= 4 and share_R[rank] >= _MOST and others.max() <= 1 - _MOST:
                form = f"positions = {rank} mod {n}"
            elif self._n_long[n] >= 4 and self._blocks[n] >= _MOST * self._n_long[n] and not self._same_gap():
                form = f"one block of 1/{n} of each sequence"
            else:
                continue
            message = (
                f"{self._absent.share:.1%} of rows are missing, near {n - 1}/{n}: only {form} present, as when one "
                f"rank of {n} stores its share"
            )
            return [counted("D07-rank-local", where, message, self._absent)]
        return []

    def _same_gap(self) -> bool:
        """All gaps of one length: a shared prefix, not a share of each sequence."""
        return len(self._gaps) > 1 and len(self.gap_lengths) == 1

    def _cached_prefix(self, where: str, prefixes: dict[tuple[int, int], int]) -> list[Finding]:
        n_layers = 1 if self._absent_L is None else int(np.count_nonzero(self._absent_L))
        n_rows = round(self._absent.n / max(1, n_layers))
        if not self._gaps or self._n_leading < _MOST * n_rows:
            return []
        n_shared = sum(prefixes.get((gap.length, gap.prefix_hash), 0) > 1 for gap in self._gaps)
        divisor = math.gcd(*(gap.length for gap in self._gaps))
        block = divisor & -divisor  # largest power of two that divides all
        if n_shared < _MOST * len(self._gaps) and block < _LEAST_BLOCK:
            return []
        size = (
            f"multiples of {block} (block size)" if block >= _LEAST_BLOCK else "of no common block size (a radix cache)"
        )
        message = (
            f"rows are missing only at the beginning of {len(self._gaps):,} of {self._n_sequences:,} sequences, "
            f"{size}; {n_shared:,} of these prefixes are in another sequence too"
        )
        return [
            finding("D08-cached-prefix", where, message, n=len(self._gaps), n_of=self._n_sequences,
                    places=tuple(self._absent.places))
        ]  # fmt: skip


def count_prefixes(tokens: TokenRows, lengths: set[int], counts: dict[tuple[int, int], int]) -> None:
    """Count sequences by the hash of their prefix, for some prefix lengths; adds to ``counts``."""
    is_shared_T = np.isin(tokens.position_T, np.array(sorted(lengths)) - 1)
    hash_T = prefix_hashes(tokens)
    for position, key in zip(tokens.position_T[is_shared_T].tolist(), hash_T[is_shared_T].tolist(), strict=True):
        counts[position + 1, key] = counts.get((position + 1, key), 0) + 1


def _ranges(numbers: list[int]) -> str:
    """``0-2, 5``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
