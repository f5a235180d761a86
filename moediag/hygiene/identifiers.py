"""D03: rows that no TopK can give. Chance plays no part: one such row is an error."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moediag.hygiene.findings import Count, Finding, counted, finding
from moediag.hygiene.rows import Rows, Shape
from moediag.notation import NOT_ROUTED

UNSIGNED_NOT_ROUTED = 255
"""-1 in an unsigned byte."""


class Identifiers:
    """Counts impossible id rows of one arm."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._duplicate, self._zero, self._partial, self._range = Count(), Count(), Count(), Count()
        self._sentinel = Count()
        self._zero_by_layer = [Count() for _ in range(shape.n_layers)]  # beside real ids in other layers
        self._n_zero_L = np.zeros(shape.n_layers, dtype=np.int64)
        self._n_present_L = np.zeros(shape.n_layers, dtype=np.int64)
        self._n_of = 0
        self._twice_E = np.zeros(shape.n_experts, dtype=np.int64)
        self._most, self._least = NOT_ROUTED, NOT_ROUTED
        self._range_K = np.zeros(shape.top_k, dtype=np.int64)

    def add(self, rows: Rows) -> None:
        """Count a shard."""
        self._n_of += rows.absent.size
        self._n_present_L += (~rows.absent).sum(axis=0)
        odd_TL = ~rows.routed & ~rows.absent  # few, if any
        ids_NK = rows.ids[odd_TL]
        outside_NK = (ids_NK >= self._shape.n_experts) | (ids_NK < NOT_ROUTED)
        has_none_N, is_outside_N = (ids_NK == NOT_ROUTED).any(axis=1), outside_NK.any(axis=1)
        is_sentinel_N = (ids_NK == UNSIGNED_NOT_ROUTED).sum(axis=1) >= min(2, self._shape.top_k)
        is_sentinel_N &= ~has_none_N & (is_outside_N | (self._shape.top_k > 1))
        # with K = 1 a row of expert 0 is a choice like any other
        is_zero_N = (ids_NK == 0).all(axis=1)
        zero_T = (rows.ids[odd_TL.any(axis=1)] == 0).all(axis=(1, 2))
        is_zero_throughout_N = np.repeat(zero_T, odd_TL[odd_TL.any(axis=1)].sum(axis=1))
        is_repeated_N = ~has_none_N & ~is_outside_N & ~is_zero_N & ~is_sentinel_N
        for count, is_hit_N in (
            (self._partial, has_none_N),
            (self._sentinel, is_sentinel_N),
            (self._range, is_outside_N & ~is_sentinel_N),
            (self._zero, is_zero_throughout_N),
            (self._duplicate, is_repeated_N),
        ):
            count.add(rows.tokens, _at(odd_TL, is_hit_N), odd_TL.size)
        self._n_zero_L += _at(odd_TL, is_zero_N).sum(axis=0)
        self._add_zero_layers(rows, _at(odd_TL, is_zero_N & ~is_zero_throughout_N))
        self._twice_E += _named_twice(ids_NK[is_repeated_N], self._shape.n_experts)
        self._most = max(self._most, int(ids_NK[~is_sentinel_N].max(initial=NOT_ROUTED)))
        self._least = min(self._least, int(ids_NK.min(initial=NOT_ROUTED)))
        self._range_K += outside_NK[~is_sentinel_N].sum(axis=0)

    def _add_zero_layers(self, rows: Rows, zero_TL: NDArray[np.bool_]) -> None:
        for layer in np.flatnonzero(zero_TL.any(axis=0)).tolist():
            of_layer_TL = np.zeros_like(zero_TL)
            of_layer_TL[:, layer] = zero_TL[:, layer]
            self._zero_by_layer[layer].add(rows.tokens, of_layer_TL, 0)

    def findings(self, where: str) -> list[Finding]:
        """One finding per kind of impossible row."""
        never_L = (self._n_zero_L == self._n_present_L) & (self._n_zero_L > 0)
        if never_L.all() and self._shape.top_k > 1:
            message = f"every row of all {len(never_L)} layers is expert 0, {self._zero.n_of:,} (token, layer)"
            return [finding("D03-never-bound", where, message, n=self._zero.n, n_of=self._zero.n_of)]
        found = [self._zero_layers(where, never_L)] if never_L.any() else []
        some = [count for count, is_never in zip(self._zero_by_layer, never_L, strict=True) if not is_never]
        duplicate = Count.merged([self._duplicate, *some], self._n_of)
        if duplicate.n:
            message = f"{duplicate.text()} (token, layer) name an expert twice{self._always_zero(some)}"
            found.append(counted("D03-duplicate-ids", where, message, duplicate))
        for rule, count, text in (
            ("D03-all-zero", self._zero, "are all expert 0"),
            ("D03-partial-row", self._partial, "hold -1 beside real ids"),
            ("D03-sentinel", self._sentinel, f"hold {UNSIGNED_NOT_ROUTED} more than once: -1 in an unsigned byte"),
            ("D03-id-range", self._range, f"have ids outside 0-{self._shape.n_experts - 1} ({self._range_words()})"),
        ):
            if count.n:
                found.append(counted(rule, where, f"{count.text()} (token, layer) {text}", count))
        return found

    def _zero_layers(self, where: str, never_L: NDArray[np.bool_]) -> Finding:
        layers = np.flatnonzero(never_L).tolist()
        message = (
            f"layers {layers} of {len(never_L)} are expert 0 in every row, {int(self._n_zero_L.max()):,} rows; the "
            "other layers hold real ids"
        )
        return finding("D03-zero-layer", where, message, n=len(layers), n_of=len(never_L))

    def _always_zero(self, zero_by_layer: list[Count]) -> str:
        """A hint where expert 0 alone is named twice."""
        others = int(self._twice_E[1:].sum())
        is_zero_alone = not others and (int(self._twice_E[0]) or any(count.n for count in zero_by_layer))
        return (
            ", always expert 0 (a zero expert written as 0, as LongCat's, or a buffer of zeros)"
            if is_zero_alone
            else ""
        )

    def _range_words(self) -> str:
        if self._least < NOT_ROUTED:
            return f"smallest {self._least}, as {self._least + 256} in a signed byte"
        slots = np.flatnonzero(self._range_K).tolist()
        one_slot = len(slots) == 1 and self._shape.top_k > 1
        kind = (
            f"always in slot {slots[0]}: a fused shared expert"
            if one_slot
            else "in any slot: zero experts or physical ids"
        )
        return f"largest {self._most}, {kind}"


def _at(odd_TL: NDArray[np.bool_], is_hit_N: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Hits among the odd (token, layer) at their places."""
    hit_TL = odd_TL.copy()
    hit_TL[odd_TL] = is_hit_N
    return hit_TL


def _named_twice(ids_NK: NDArray[np.int16], n_experts: int) -> NDArray[np.int64]:
    """(E,) how often each expert is a repetition within its row."""
    ordered_NK = np.sort(ids_NK, axis=1)
    again = ordered_NK[:, 1:][ordered_NK[:, 1:] == ordered_NK[:, :-1]]
    return np.bincount(again, minlength=n_experts)
