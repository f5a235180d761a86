"""Exact comparison of two arms' expert sets, without sorting and without Python per row.

Invariants:
    - a set of experts is a bit mask of ceil(E / 64) words, so equality, overlap and order-blindness are
      integer facts, exact for every E;
    - a (token, layer) with an absent id (-1) in either arm is not compared: neither same nor flipped;
    - work goes chunk by chunk over tokens, so temporaries stay near 10 MB whatever T is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moediag.errors import AlignmentError
from moediag.run.align import PairBlock

Bool = NDArray[np.bool_]

NOT_COMPARED: Final = -1
_IDS_PER_CHUNK: Final = 1_000_000
_WORD: Final = 64


@dataclass(frozen=True)
class ExpertComparison:
    """What two arms chose at every (token, layer).

    Args:
        is_compared_TL: both arms have all K ids.
        is_same_TL: the sets are equal; False where not compared.
        is_reorder_TL: equal sets in another order.
        n_common_TL: experts in both sets; 0 where not compared.
    """

    is_compared_TL: Bool
    is_same_TL: Bool
    is_reorder_TL: Bool
    n_common_TL: NDArray[np.int16]

    @property
    def is_flip_TL(self) -> Bool:  # noqa: N802 - the legend suffix
        """The sets differ; False where not compared."""
        return self.is_compared_TL & ~self.is_same_TL

    @property
    def is_complete_T(self) -> Bool:  # noqa: N802 - the legend suffix
        """Tokens compared in every layer."""
        return np.asarray(self.is_compared_TL.all(axis=1))


def compare_block(block: PairBlock) -> ExpertComparison | None:
    """Compare the two arms of a block; None for a dense block."""
    if block.expert_ids_train_TLK is None or block.expert_ids_infer_TLK is None:
        return None
    return compare_experts(block.expert_ids_train_TLK, block.expert_ids_infer_TLK)


def compare_experts(a_TLK: NDArray[np.int16], b_TLK: NDArray[np.int16]) -> ExpertComparison:
    """Compare the expert sets of two arms at every (token, layer).

    Args:
        a_TLK, b_TLK: expert ids 0 .. E-1, distinct within a row; -1 = not routed.

    Raises:
        AlignmentError: the arrays have different shapes.

    Source: ours; exact.
    """
    if a_TLK.shape != b_TLK.shape:
        raise AlignmentError(
            f"expert ids of the two arms have shapes {a_TLK.shape} and {b_TLK.shape}; "
            "were they the same model and tokens?"
        )
    shape = a_TLK.shape[:2]
    out = ExpertComparison(
        np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, np.int16)
    )
    step = max(1, _IDS_PER_CHUNK // max(1, int(np.prod(a_TLK.shape[1:]))))
    for first in range(0, shape[0], step):
        _compare_chunk(a_TLK[first : first + step], b_TLK[first : first + step], out, slice(first, first + step))
    return out


def _compare_chunk(a_TLK: NDArray[np.int16], b_TLK: NDArray[np.int16], out: ExpertComparison, rows: slice) -> None:
    compared_TL = (a_TLK >= 0).all(axis=2) & (b_TLK >= 0).all(axis=2)
    n_experts = int(max(a_TLK.max(initial=0), b_TLK.max(initial=0))) + 1
    same_TL = compared_TL.copy()
    common_TL = np.zeros(compared_TL.shape, np.int16)
    for word in range(-(-n_experts // _WORD)):
        a_TL, b_TL = _mask_word(a_TLK, word), _mask_word(b_TLK, word)
        same_TL &= a_TL == b_TL
        common_TL += np.bitwise_count(a_TL & b_TL)
    out.is_compared_TL[rows] = compared_TL
    out.is_same_TL[rows] = same_TL
    out.is_reorder_TL[rows] = same_TL & (a_TLK != b_TLK).any(axis=2)
    out.n_common_TL[rows] = np.where(compared_TL, common_TL, 0)


def _mask_word(ids_TLK: NDArray[np.int16], word: int) -> NDArray[np.uint64]:
    """Bits of the experts 64 * word .. 64 * word + 63 chosen at every (token, layer)."""
    bit_TLK = np.left_shift(np.uint64(1), (ids_TLK & (_WORD - 1)).astype(np.uint64))
    bit_TLK[(ids_TLK >> 6) != word] = 0  # -1 >> 6 is -1: an absent id sets no bit in any word
    return np.asarray(np.bitwise_or.reduce(bit_TLK, axis=2))
