"""Which rows lack routing, and why: the sampled last token, a rank's share, a cached prefix, or no known pattern.

D06, D07, D08. Counts of whole sequences, so that the order of sequences and the shards do not matter.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moediag.hygiene.findings import Count, Finding, counted, finding
from moediag.hygiene.rows import Rows, prefix_hashes
from moediag.run.capture import Int64, TokenRows

_RANKS = (2, 3, 4, 6, 8, 16)
_MOST = 0.95
"""Share of a pattern's rows or sequences that must fit it before it is named: the rest may be cut by a batch's end."""

_LEAST_BLOCK = 8
"""Smallest block size that a common divisor is taken for: vLLM's blocks are 16 and up, on some devices 8."""


class _Gap(NamedTuple):
    length: int
    prefix_hash: int


class Completeness:
    """Counts absent rows of one arm, shard by shard; where it sampled, the last row of a sequence may lack."""

    def __init__(self, is_sampled: bool) -> None:
        self._is_sampled = is_sampled
        self._absent, self._absent_last = Count(), Count()
        self._absent_L: NDArray[np.int64] | None = None
        self._n_sequences = 0
        self._gaps: list[_Gap] = []
        self._n_leading = 0  # absent rows that stand in a gap at the beginning of a sequence
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
        """Lengths whose prefixes must be looked up in all sequences: :meth:`findings` wants to know how shared."""
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
            f"{size}; {n_shared:,} of these prefixes stand in another sequence too"
        )
        return [
            finding("D08-cached-prefix", where, message, n=len(self._gaps), n_of=self._n_sequences,
                    places=tuple(self._absent.places))
        ]  # fmt: skip


def count_prefixes(tokens: TokenRows, lengths: set[int], counts: dict[tuple[int, int], int]) -> None:
    """Count sequences by the hash of their prefix, for some prefix lengths; adds to ``counts``."""
    wanted_T = np.isin(tokens.position_T, np.array(sorted(lengths)) - 1)
    hash_T = prefix_hashes(tokens)
    for position, key in zip(tokens.position_T[wanted_T].tolist(), hash_T[wanted_T].tolist(), strict=True):
        counts[position + 1, key] = counts.get((position + 1, key), 0) + 1


def _ranges(numbers: list[int]) -> str:
    """``0-2, 5``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
