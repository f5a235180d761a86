"""Exact comparison of two arms' expert sets, without sorting and without Python per row.

Invariants:
    - equality, overlap and order-blindness are facts of integers, exact for every E and K, duplicates included;
    - a (token, layer) with an absent id (-1) in either arm is not compared: neither same nor flipped;
    - work goes chunk by chunk over choices, so temporaries stay below 10 MB whatever T is.

Most choices list the same ids in the same order, so one vectorised ``!=`` settles them; only the others (a few to
some tens of per cent) are compared all against all, in K x K byte comparisons over contiguous columns. That is about
four times faster than a bit mask per choice, and needs no limit on E. What differs is kept sparse: flat indices
``token * L + layer``, ascending, with one row per flip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moediag.errors import AlignmentError
from moediag.run.align import PairBlock

Bool = NDArray[np.bool_]
Int64 = NDArray[np.int64]

NOT_COMPARED: Final = -1
_IDS_PER_CHUNK: Final = 1 << 18
"""Both arms' ids of a chunk stay in a core's second-level cache."""
_CELLS_PER_CHUNK: Final = 1 << 20
"""K x K comparisons held at once."""


@dataclass(frozen=True)
class ExpertComparison:
    """What two arms chose at every (token, layer); N counts flips.

    Args:
        is_compared_TL: both arms have all K ids.
        top_k: K.
        flip_N: flat indices of the choices whose sets differ, ascending.
        reorder_R: flat indices of equal sets in another order, ascending.
        only_train_NK: for every flip, which of train's K ids infer did not choose.
        only_infer_NK: which of infer's K ids train did not choose.
        n_only_train_N, n_only_infer_N: how many those are, 1 .. K.
    """

    is_compared_TL: Bool
    top_k: int
    flip_N: Int64
    reorder_R: Int64
    only_train_NK: Bool
    only_infer_NK: Bool
    n_only_train_N: Int64
    n_only_infer_N: Int64

    @property
    def shape(self) -> tuple[int, int]:
        """(T, L)."""
        return self.is_compared_TL.shape[0], self.is_compared_TL.shape[1]

    @cached_property
    def is_all_compared(self) -> bool:
        """Every choice was compared, as in a healthy capture."""
        return bool(self.is_compared_TL.all())

    @cached_property
    def n_swapped_N(self) -> Int64:  # noqa: N802 - the legend suffix
        """Experts exchanged by every flip, K minus those in both sets: 1 .. K."""
        # the larger side: with a duplicated id (a defect) the two sides miss different numbers
        return np.maximum(self.n_only_train_N, self.n_only_infer_N)

    @property
    def is_flip_TL(self) -> Bool:  # noqa: N802 - the legend suffix
        """The sets differ; False where not compared."""
        return self._mask(self.flip_N)

    @property
    def is_reorder_TL(self) -> Bool:  # noqa: N802 - the legend suffix
        """Equal sets in another order."""
        return self._mask(self.reorder_R)

    @property
    def is_same_TL(self) -> Bool:  # noqa: N802 - the legend suffix
        """The sets are equal; False where not compared."""
        return self.is_compared_TL & ~self.is_flip_TL

    @property
    def n_common_TL(self) -> NDArray[np.int16]:  # noqa: N802 - the legend suffix
        """Experts in both sets; 0 where not compared."""
        common_TL = np.where(self.is_compared_TL, self.top_k, 0).astype(np.int16)
        common_TL.ravel()[self.flip_N] -= self.n_swapped_N.astype(np.int16)
        return common_TL

    @property
    def is_complete_T(self) -> Bool:  # noqa: N802 - the legend suffix
        """Tokens compared in every layer; a model without MoE layers has none."""
        if not self.shape[1]:
            return np.zeros(self.shape[0], bool)
        return np.asarray(self.is_compared_TL.all(axis=1))

    @cached_property
    def n_flipped_T(self) -> Int64:  # noqa: N802 - the legend suffix
        """Flipped layers of every token, among those compared."""
        return np.bincount(self.flip_N // max(1, self.shape[1]), minlength=self.shape[0]).astype(np.int64)

    @cached_property
    def first_flip_T(self) -> Int64:  # noqa: N802 - the legend suffix
        """First flipped layer of every token, L where none flipped."""
        n_tokens, n_layers = self.shape
        first_T = np.full(n_tokens, n_layers, dtype=np.int64)
        # ascending indices: written backwards, the first flip of a token is the one that stays
        first_T[self.flip_N[::-1] // max(1, n_layers)] = self.flip_N[::-1] % max(1, n_layers)
        return first_T

    def _mask(self, index: Int64) -> Bool:
        mask_TL = np.zeros(self.shape, bool)
        mask_TL.ravel()[index] = True
        return mask_TL


def compare_block(block: PairBlock) -> ExpertComparison | None:
    """Compare the two arms of a block; None unless both have expert ids (dense, or ids not captured)."""
    if block.expert_ids_train_TLK is None or block.expert_ids_infer_TLK is None:
        return None
    return compare_experts(block.expert_ids_train_TLK, block.expert_ids_infer_TLK)


def compare_experts(a_TLK: NDArray[np.int16], b_TLK: NDArray[np.int16]) -> ExpertComparison:
    """Compare the expert sets of two arms at every (token, layer).

    Args:
        a_TLK: the train arm's expert ids 0 .. E-1; -1 = not routed.
        b_TLK: the infer arm's.

    Returns:
        The comparison, sparse in what differs.

    Raises:
        AlignmentError: the arrays have different shapes.

    Source: ours; exact.
    """
    if a_TLK.shape != b_TLK.shape:
        raise AlignmentError(
            f"expert ids of the two arms have shapes {a_TLK.shape} and {b_TLK.shape}; "
            "were they the same model and tokens?"
        )
    n_tokens, n_layers, top_k = a_TLK.shape
    a_NK, b_NK = (np.ascontiguousarray(ids).reshape(n_tokens * n_layers, top_k) for ids in (a_TLK, b_TLK))
    compared_N = np.ones(len(a_NK), bool)
    step = max(1, _IDS_PER_CHUNK // max(1, top_k))
    parts = [_empty_part(top_k)]
    for first in range(0, len(a_NK), step):
        rows = slice(first, first + step)
        differ_D = _differing(a_NK[rows], b_NK[rows], compared_N[rows])
        parts += _compare_rows(a_NK[rows], b_NK[rows], differ_D, first)
    arrays = (np.concatenate(array) for array in zip(*parts, strict=True))
    return ExpertComparison(compared_N.reshape(n_tokens, n_layers), top_k, *arrays)


def any_in_row(is_true_NK: Bool) -> Bool:
    """``is_true_NK.any(axis=1)``, several columns at a time: numpy's own loop takes one short row after another."""
    n_rows, n_columns = is_true_NK.shape
    width = next(width for width in (8, 4, 2, 1) if n_columns % width == 0)
    words = np.ascontiguousarray(is_true_NK).view(f"u{width}").reshape(n_rows, n_columns // width if n_columns else 0)
    any_N = np.zeros(n_rows, bool)
    for column in range(words.shape[1]):
        any_N |= words[:, column] != 0
    return any_N


def _differing(a_NK: NDArray[np.int16], b_NK: NDArray[np.int16], compared_N: Bool) -> Int64:
    """Rows routed in both arms that do not list the same ids in the same order; clears ``compared_N`` in place."""
    differ_D = np.flatnonzero(any_in_row(a_NK != b_NK))
    if min(a_NK.min(initial=0), b_NK.min(initial=0)) < 0:
        np.logical_not(any_in_row((a_NK < 0) | (b_NK < 0)), out=compared_N)
        differ_D = differ_D[compared_N[differ_D]]
    return differ_D


def _compare_rows(
    a_NK: NDArray[np.int16], b_NK: NDArray[np.int16], differ_D: Int64, first: int
) -> list[tuple[NDArray[Any], ...]]:
    """The arrays of :class:`ExpertComparison` from ``flip_N`` on, of the rows that may differ as sets."""
    top_k = a_NK.shape[1]
    parts = []
    step = max(1, _CELLS_PER_CHUNK // max(1, top_k * top_k))
    for row_D in (differ_D[start : start + step] for start in range(0, len(differ_D), step)):
        a_DK, b_DK = (ids.take(row_D, axis=0) for ids in (a_NK, b_NK))
        if max(a_DK.max(), b_DK.max()) <= np.iinfo(np.uint8).max:  # bytes compare twice as fast as int16
            a_DK, b_DK = a_DK.astype(np.uint8), b_DK.astype(np.uint8)
        is_easy_D = _is_local_reorder(a_DK, b_DK)
        hard = np.flatnonzero(~is_easy_D)
        is_flip_H, *only = _compare_all(*(np.ascontiguousarray(ids.take(hard, axis=0).T) for ids in (a_DK, b_DK)))
        flip = np.flatnonzero(is_flip_H)
        is_easy_D[hard] = ~is_flip_H
        row_D = row_D + first
        chosen = (hard.take(flip), np.flatnonzero(is_easy_D))
        parts.append((*(row_D.take(index) for index in chosen), *(array.take(flip, axis=0) for array in only)))
    return parts


def _compare_all(a_KD: NDArray[Any], b_KD: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """(sets differ, only in a, only in b, how many only in a, how many only in b), all ids against all ids."""
    equal_KKD = a_KD[:, None] == b_KD[None]
    only = [~equal_KKD.any(axis=axis) for axis in (1, 0)]
    counts = [only_KD.view(np.uint8).sum(axis=0, dtype=np.uint8) for only_KD in only]
    only_DK = (np.ascontiguousarray(only_KD.T) for only_KD in only)
    return (counts[0] | counts[1]) > 0, *only_DK, *(count_D.astype(np.int64) for count_D in counts)


def _is_local_reorder(a_DK: NDArray[Any], b_DK: NDArray[Any]) -> Bool:
    """Rows where every id stands on the other side at the same place or beside it: equal sets, cheaply shown.

    Most reorders are swaps of neighbours. Rows lie end to end in memory, so a shift by one compares neighbours in one
    long loop; what crosses from row to row is cleared.
    """
    n_rows, top_k = a_DK.shape
    a, b = a_DK.reshape(-1), b_DK.reshape(-1)
    right, left = np.zeros(len(a), bool), np.zeros(len(a), bool)
    np.equal(a[:-1], b[1:], out=right[:-1])  # a's id k is b's id k + 1
    np.equal(a[1:], b[:-1], out=left[1:])
    right[top_k - 1 :: top_k] = False
    left[::top_k] = False
    in_b = a == b
    in_a = in_b.copy()
    in_b |= right
    in_b |= left
    in_a[1:] |= right[:-1]
    in_a[:-1] |= left[1:]
    in_b &= in_a
    return ~any_in_row(~in_b.reshape(n_rows, top_k))


def _empty_part(top_k: int) -> tuple[NDArray[Any], ...]:
    none, none_NK = np.zeros(0, np.int64), np.zeros((0, top_k), bool)
    return none, none, none_NK, none_NK, none, none
