"""Gate weights against routing: misrouted mass, and whether the heaviest expert is the same.

Invariants:
    - only the *train* side's weights enter, so a pair whose infer arm gave ids alone still has its mass;
    - mass is known where the choice was compared and all K weights are finite; a choice without a flip has mass 0;
    - without train weights nothing is known: NaN with n = 0, never 0;
    - the heaviest expert is read off the weights, not off the order of the list: vLLM's CPU and grouped routers list
      in another order than torch's sorted TopK.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moediag.analysis.expert_sets import ExpertComparison, any_in_row
from moediag.run.align import PairBlock

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

_SAMPLE: Final = 4096
"""Choices of a block that show whether an engine lists experts by weight; if they do, the first id is the heaviest."""


@dataclass(frozen=True)
class MisroutedMass:
    """Mass of every flip of a block.

    Args:
        is_known_TL: choices whose mass is known, flipped or not; all False without train weights.
        mass_N: mass of the flips, in the order of ``ExpertComparison.flip_N``; 0 where not known [gate weight].
    """

    is_known_TL: Bool
    mass_N: Float64

    def by_token(self, seen: ExpertComparison) -> NDArray[np.float32]:
        """Mass summed over the layers of every token; NaN unless known in all of them."""
        n_tokens, n_layers = seen.shape
        if not n_layers:
            return np.full(n_tokens, np.nan, np.float32)
        mass_T = np.bincount(seen.flip_N // n_layers, weights=self.mass_N, minlength=n_tokens)
        return np.where(self.is_known_TL.all(axis=1), mass_T, np.nan).astype(np.float32)


def misrouted_mass(block: PairBlock, seen: ExpertComparison) -> MisroutedMass:
    """Mass of every flip of a block, given its expert comparison.

    Args:
        block: aligned response tokens.
        seen: its expert comparison.

    Returns:
        Mass in the unit of the gate weights; 0 is best.

    Source: ours.
    """
    weights_TLK, mass_N = block.gate_weights_train_TLK, np.zeros(len(seen.flip_N))
    if weights_TLK is None:
        return MisroutedMass(np.zeros(seen.shape, bool), mass_N)
    weights_NK = np.ascontiguousarray(weights_TLK).reshape(-1, seen.top_k)
    known_TL = seen.is_compared_TL
    for first in range(0, len(weights_NK), step := 1 << 15):  # chunks that stay in cache
        is_lost_NK = ~np.isfinite(weights_NK[first : first + step])
        if is_lost_NK.any():
            known_TL = known_TL.copy() if known_TL is seen.is_compared_TL else known_TL
            known_TL.ravel()[first : first + step] &= ~any_in_row(is_lost_NK)
    kept = np.flatnonzero(known_TL.ravel()[seen.flip_N])
    weights = weights_NK.take(seen.flip_N[kept], axis=0).astype(np.float64)
    # einsum, because a plain sum takes one short row after another
    mass_N[kept] = np.einsum("nk,nk->n", weights, seen.only_train_NK.take(kept, axis=0).astype(np.float64))
    return MisroutedMass(known_TL, mass_N)


def top1_differences(block: PairBlock, seen: ExpertComparison) -> NDArray[np.int64] | None:
    """Flat indices of the compared choices whose heaviest expert differs; None unless both arms have gate weights."""
    heaviest = []
    for side in ("train", "infer"):
        ids_TLK, weights_TLK = (getattr(block, f"{name}_{side}_TLK") for name in ("expert_ids", "gate_weights"))
        if weights_TLK is None:
            return None
        ids_NK, weights_NK = ids_TLK.reshape(-1, seen.top_k), weights_TLK.reshape(-1, seen.top_k)
        some = weights_NK[:: max(1, len(weights_NK) // _SAMPLE)]
        if (some[:, :1] >= some).all():
            heaviest.append(ids_NK[:, 0])
        else:
            heaviest.append(ids_NK[np.arange(len(ids_NK)), weights_NK.argmax(axis=1)])
    return np.flatnonzero((heaviest[0] != heaviest[1]) & seen.is_compared_TL.reshape(-1))
