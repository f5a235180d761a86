"""One shard of one arm with what the rules need of it, computed once: sets as bits, which rows are routed.

Sets of experts are bit sets, E bits in W words of 64, so that equality, overlap and duplicates cost a few word
operations per (token, layer) whatever K is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moediag.hygiene.chance import ALPHA
from moediag.notation import NO_TOKEN, NOT_ROUTED
from moediag.run.capture import Bool, Capture, TokenRows

Bits = NDArray[np.uint64]
MIN_ROWS = 20
"""Rows below which no pattern of a whole layer is named: 2^-20 = 1e-6 even where each row shows it half the time."""

TOKEN_LAGS = (-3, -2, -1, 1, 2, 3)
"""Offsets of rows and tokens at which the two sides are held against each other."""

_CHUNK = 512


@dataclass(frozen=True)
class Shape:
    """What the model's routing is: L, E, K, whether gate weights are renormalised (None = unknown), and how many of
    the experts, the last, compute nothing."""

    n_layers: int
    n_experts: int
    top_k: int
    renormalize: bool | None = None
    n_zero_experts: int = 0

    @property
    def is_choice(self) -> bool:
        """False where every expert is always chosen, so that ids say nothing."""
        return self.top_k < self.n_experts


@dataclass(frozen=True)
class Rows:
    """Whole sequences of one arm; every derived array is made on first use."""

    tokens: TokenRows
    capture: Capture
    shape: Shape

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def starts(self) -> Bool:
        """(T,) First row of its sequence."""
        return _booleans(np.r_[True, self.tokens.seq_id_T[1:] != self.tokens.seq_id_T[:-1]][: len(self)])

    @cached_property
    def ends(self) -> Bool:
        """(T,) Last row of its sequence."""
        return _booleans(np.r_[self.starts[1:], True][: len(self)])

    def follows(self, lag: int) -> Bool:
        """(T - lag,) True where row t + lag belongs to the sequence of row t."""
        seq_id_T = self.tokens.seq_id_T
        return _booleans(seq_id_T[lag:] == seq_id_T[: len(seq_id_T) - lag])

    @cached_property
    def prefixes(self) -> Bits:
        """(T,) Hash of each row's prefix, its own token included."""
        return prefix_hashes(self.tokens)

    @property
    def ids(self) -> NDArray[Any]:
        """(T, L, K) Expert ids; only of a routed capture."""
        assert self.capture.expert_ids_TLK is not None
        return self.capture.expert_ids_TLK

    @cached_property
    def routed(self) -> Bool:
        """(T, L) K different experts: what a TopK gives; anything else is left to D03 and completeness."""
        return _booleans(n_members(self.sets) == self.shape.top_k)

    @cached_property
    def absent(self) -> Bool:
        """(T, L) No expert id at all."""
        absent_TL = ~self.routed  # looked at closer only where it can be: few rows as a rule
        absent_TL[absent_TL] = (self.ids[absent_TL] == NOT_ROUTED).all(axis=1)
        return absent_TL

    @cached_property
    def gate_totals(self) -> NDArray[np.float32] | None:
        """(T, L) Sum of gate weights."""
        gates_TLK = self.capture.gate_weights_TLK
        return None if gates_TLK is None else over_slots(np.add, gates_TLK)

    @cached_property
    def routed_throughout(self) -> Bool:
        """(T,) Routed in every layer."""
        return _booleans(self.routed.all(axis=1))

    @cached_property
    def sets(self) -> Bits:
        """(T, L, W) Chosen experts as bit sets; ids that are no expert leave no bit."""
        return bit_sets(self.ids, self.shape.n_experts)

    @cached_property
    def set_hashes(self) -> Bits:
        """(T, L) A hash of each set: equal sets have equal hashes, others all but never."""
        hash_TL = np.zeros(self.sets.shape[:2], dtype=np.uint64)
        for word in range(self.sets.shape[2]):
            hash_TL *= np.uint64(0x9E3779B97F4A7C15)
            hash_TL += self.sets[..., word]
            hash_TL ^= hash_TL >> np.uint64(29)
            hash_TL *= np.uint64(0xBF58476D1CE4E5B9)
        return hash_TL

    @cached_property
    def repeats(self) -> Bool:
        """(T - 1, L) The set of the row before, whatever sequence that belongs to."""
        return same_sets(self.sets[1:], self.sets[:-1])

    @cached_property
    def tied(self) -> Bool | None:
        """(T, L) Every score the same, as zero logits give: equal gate weights and no logit margin; None = unknown.

        With K = 1 gate weights say nothing and with K = E margins do; where neither speaks there is no evidence.
        """
        gates_TLK, margin_TL = self.capture.gate_weights_TLK, self.capture.logit_margin_TL
        has_gates = gates_TLK is not None and self.shape.top_k > 1
        has_margin = margin_TL is not None and self.shape.is_choice
        if not (has_gates or has_margin):
            return None
        tied_TL = self.routed.copy()
        if has_gates and gates_TLK is not None:
            tied_TL &= gates_TLK[:, :, 0] == gates_TLK[:, :, -1]
            tied_TL[tied_TL] = (gates_TLK[tied_TL][:, 1:] == gates_TLK[tied_TL][:, :1]).all(axis=1)
        if has_margin and margin_TL is not None:
            tied_TL &= margin_TL == 0
        return tied_TL

    @cached_property
    def first_set(self) -> Bool:
        """(T, L) The set is {0, .., K-1}."""
        return self._is_set(range(self.shape.top_k))

    @cached_property
    def last_set(self) -> Bool:
        """(T, L) The set is {E-K, .., E-1}."""
        return self._is_set(range(self.shape.n_experts - self.shape.top_k, self.shape.n_experts))

    @cached_property
    def counting(self) -> Bool:
        """(T, L) Ids that count on from slot to slot and from the layer before, modulo E: ``arange(L * K) % E``.

        Nowhere where so few slots and experts make that an ordinary row.
        """
        n_steps = self.shape.n_layers * self.shape.top_k - 1
        if n_steps * math.log(self.shape.n_experts) < -math.log(ALPHA):
            return np.zeros(self.ids.shape[:2], dtype=np.bool_)
        # looked at closer only where the first slot counts on from the last of the layer before: few rows as a rule
        before_TL = np.concatenate([self.ids[:, :1, 0] - 1, self.ids[:, :-1, -1]], axis=1)
        step_TL = self.ids[:, :, 0] - before_TL
        counting_TL = ((step_TL == 1) | (step_TL == 1 - self.shape.n_experts)) & self.routed
        slots_NK = self.ids[counting_TL].astype(np.int32)
        counting_TL[counting_TL] = (np.diff(slots_NK, axis=1) % self.shape.n_experts == 1).all(axis=1)
        return _booleans(counting_TL)

    @cached_property
    def filler(self) -> Bool:
        """(T,) Rows that look like filler in all layers: other rules leave them to D03, D04 and D34."""
        filler_T = _booleans(self.ids[:, 0, 0] == 0)
        filler_T[filler_T] = (self.ids[filler_T] == 0).all(axis=(1, 2))
        if self.shape.is_choice:
            filler_T = filler_T | self.first_set.all(axis=1) | self.last_set.all(axis=1) | self.counting.all(axis=1)
        if self.tied is not None:
            filler_T = filler_T | self.tied.all(axis=1)
        return filler_T

    def take_tokens(self, part: slice) -> TokenRows:
        """A part of the token rows; it may cut sequences."""
        columns: dict[str, Any] = {f.name: getattr(self.tokens, f.name) for f in fields(TokenRows)}
        taken: dict[str, Any] = {name: None if column is None else column[part] for name, column in columns.items()}
        return TokenRows(**taken)

    def _is_set(self, experts: range) -> Bool:
        bits_W = bit_sets(np.array([[list(experts)]]), self.shape.n_experts)[0, 0]
        return same_sets(self.sets, bits_W) & self.routed


def bit_sets(ids_TLK: NDArray[Any], n_experts: int) -> Bits:
    """Rows of ids as bit sets of ceil(E / 64) words; ids outside 0 .. E-1 are left out.

    Every word lies by itself in memory, since words are compared and counted one by one.

    Example:
        >>> bit_sets(np.array([[[0, 2]], [[1, -1]]]), 4)[:, 0, 0].tolist()
        [5, 2]
    """
    n_words = -(-n_experts // 64)
    expert_E = np.arange(n_experts)
    bit_WE = np.zeros((n_words, n_experts + 1), dtype=np.uint64)  # one column more: no bit
    bit_WE[expert_E // 64, expert_E] = np.uint64(1) << (expert_E % 64).astype(np.uint64)
    sets_WTL = np.zeros((n_words, *ids_TLK.shape[:2]), dtype=np.uint64)
    for start in range(0, len(ids_TLK), _CHUNK):  # chunks that stay in cache, slots first: three times faster
        ids_KTL = np.moveaxis(ids_TLK[start : start + _CHUNK], 2, 0).astype(np.intp, order="C")
        if ids_KTL.min(initial=0) < 0 or ids_KTL.max(initial=0) > n_experts:
            np.putmask(ids_KTL, (ids_KTL < 0) | (ids_KTL > n_experts), n_experts)
        bits_TL = np.empty(ids_KTL.shape[1:], dtype=np.uint64)
        for word in range(n_words):
            for ids_TL in ids_KTL:
                # no id is outside any more; checked again, take would be half as fast
                sets_WTL[word, start : start + _CHUNK] |= bit_WE[word].take(ids_TL, out=bits_TL, mode="clip")
    return np.moveaxis(sets_WTL, 0, -1)


def same_sets(some: Bits, others: Bits) -> Bool:
    """Whether bit sets are equal, over the last axis."""
    same: Bool = some[..., 0] == others[..., 0]
    for word in range(1, some.shape[-1]):
        same &= some[..., word] == others[..., word]
    return same


def n_members(sets_NW: Bits) -> NDArray[np.int16]:
    """Number of experts in each bit set, over the last axis."""
    count: NDArray[np.int16] = np.bitwise_count(sets_NW[..., 0]).astype(np.int16)
    for word in range(1, sets_NW.shape[-1]):
        count += np.bitwise_count(sets_NW[..., word])
    return count


def over_slots(combine: np.ufunc, values: NDArray[Any]) -> NDArray[Any]:
    """``combine.reduce`` over a short last axis, slot by slot: numpy is five times slower on axes of 2 to 8."""
    total = values[..., 0].copy()
    for start in range(0, len(values), _CHUNK):  # chunks that stay in cache
        part = values[start : start + _CHUNK]
        for slot in range(1, values.shape[-1]):
            combine(total[start : start + _CHUNK], part[..., slot], out=total[start : start + _CHUNK])
    return total


def n_rows_by_layer(hit_TL: Bool) -> NDArray[np.int64]:
    """(L,) Number of hits, over the first axis: bytes are added 255 rows at a time, ten times as fast as numbers."""
    n_whole = len(hit_TL) - len(hit_TL) % 255
    bytes_TL = np.ascontiguousarray(hit_TL).view(np.uint8)
    some_BL = bytes_TL[:n_whole].reshape(-1, 255, hit_TL.shape[1]).sum(axis=1, dtype=np.uint8)
    return np.asarray(some_BL.sum(axis=0, dtype=np.int64) + bytes_TL[n_whole:].sum(axis=0, dtype=np.int64))


def prefix_hashes(tokens: TokenRows) -> NDArray[np.uint64]:
    """Hash of each row's prefix, its own token included; equal prefixes have equal hashes.

    A token whose id is not known is one of its own: nothing shows that two prefixes with it are equal.
    """
    token_id_T = np.where(tokens.token_id_T == NO_TOKEN, -2 - np.arange(len(tokens)), tokens.token_id_T)
    weight_T = (tokens.position_T.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    weight_T = (weight_T ^ (weight_T >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) | np.uint64(1)
    mixed_T = (token_id_T.astype(np.uint64) + np.uint64(1)) * np.uint64(0x94D049BB133111EB)
    sum_T = np.cumsum((mixed_T ^ (mixed_T >> np.uint64(31))) * weight_T, dtype=np.uint64)
    before_T = np.r_[np.uint64(0), sum_T[:-1]]
    start_T = np.maximum.accumulate(np.where(tokens.position_T == 0, np.arange(len(tokens)), 0))
    return np.asarray(sum_T - before_T[start_T], dtype=np.uint64)


def aligned(n: int, lag: int) -> tuple[slice, slice]:
    """Slices of t and t + lag among n."""
    return (slice(0, n - lag), slice(lag, n)) if lag >= 0 else (slice(-lag, n), slice(0, n + lag))


def _booleans(values: Any) -> Bool:
    return np.asarray(values, dtype=np.bool_)
