"""D03: rows that no TopK can give. Chance plays no part: one such row is an error."""

from __future__ import annotations

import numpy as np

from moediag.hygiene.findings import Count, Finding, counted
from moediag.hygiene.rows import Rows, Shape
from moediag.notation import NOT_ROUTED


class Identifiers:
    """Counts impossible id rows of one arm."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._duplicate, self._zero, self._partial, self._range = Count(), Count(), Count(), Count()
        self._most = NOT_ROUTED
        self._range_K = np.zeros(shape.top_k, dtype=np.int64)

    def add(self, rows: Rows) -> None:
        """Count a shard."""
        n = rows.absent.size
        odd_TL = ~rows.routed & ~rows.absent  # few, if any
        ids_NK = rows.ids[odd_TL]
        outside_NK = (ids_NK >= self._shape.n_experts) | (ids_NK < NOT_ROUTED)
        has_none_N, is_outside_N = (ids_NK == NOT_ROUTED).any(axis=1), outside_NK.any(axis=1)
        # with K = 1 a row of expert 0 is a choice like any other; one layer of zeros is a duplicate like any other
        zero_T = (rows.ids[odd_TL.any(axis=1)] == 0).all(axis=(1, 2))
        is_zero_N = np.repeat(zero_T, odd_TL[odd_TL.any(axis=1)].sum(axis=1))
        is_repeated_N = ~has_none_N & ~is_outside_N & ~is_zero_N
        for count, is_hit_N in (
            (self._partial, has_none_N),
            (self._range, is_outside_N),
            (self._zero, is_zero_N),
            (self._duplicate, is_repeated_N),
        ):
            hit_TL = odd_TL.copy()
            hit_TL[odd_TL] = is_hit_N
            count.add(rows.tokens, hit_TL, n)
        self._most = max(self._most, int(ids_NK.max(initial=NOT_ROUTED)))
        self._range_K += outside_NK.sum(axis=0)

    def findings(self, where: str) -> list[Finding]:
        """One finding per kind of impossible row."""
        found = []
        if self._duplicate.n:
            message = f"{self._duplicate.text()} (token, layer) name an expert twice"
            found.append(counted("D03-duplicate-ids", where, message, self._duplicate))
        if self._zero.n:
            message = f"{self._zero.text()} (token, layer) are all expert 0"
            found.append(counted("D03-all-zero", where, message, self._zero))
        if self._partial.n:
            message = f"{self._partial.text()} (token, layer) hold -1 beside real ids"
            found.append(counted("D03-partial-row", where, message, self._partial))
        if self._range.n:
            slots = np.flatnonzero(self._range_K).tolist()
            one_slot = len(slots) == 1 and self._shape.top_k > 1
            kind = f"always in slot {slots[0]}: a fused shared expert" if one_slot else "in any slot: physical ids"
            message = (
                f"{self._range.text()} (token, layer) have ids outside 0-{self._shape.n_experts - 1} (largest "
                f"{self._most}, {kind})"
            )
            found.append(counted("D03-id-range", where, message, self._range))
        return found
