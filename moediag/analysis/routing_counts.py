"""Routing agreement as mergeable counts: one streaming pass, one row per (prompt, MoE layer).

Invariants:
    - counts are integers, so ``merge(parts)`` equals the whole exactly, wherever and in whatever order blocks are
      counted; gate mass and Jaccard sums are float64 and equal it to rounding;
    - a (token, layer) with an absent id in either arm is not compared; quantities over all layers of a token
      (any-layer share, flips per token, cumulative agreement) use only what is compared in all of them;
    - only flips and reorders are touched one by one, so the cost follows what differs, not what agrees.

Gate weights against routing:
    - only the *train* side's weights enter, so a pair whose infer arm gave ids alone still has its mass;
    - mass is known where the choice was compared and all K weights are finite; a choice without a flip has mass 0;
    - without train weights nothing is known: NaN with n = 0, never 0;
    - the heaviest expert is read off the weights, not off the order of the list: vLLM's CPU and grouped routers list
      in another order than torch's sorted TopK.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moediag.analysis.expert_sets import ExpertComparison, any_in_row
from moediag.analysis.totals import Totals
from moediag.run.align import PairBlock

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
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


@dataclass(frozen=True)
class RoutingTotals(Totals):
    """Counts over (token, layer) choices by prompt (C, ascending ``prompt_id_C``) and MoE layer (L).

    Args:
        prompt_id_C: the prompts seen.
        n_compared_CL, n_same_CL, n_reorder_CL: choices compared, with equal sets, equal but reordered.
        n_top1_CL, n_top1_known_CL: choices with the same heaviest expert, and choices where both weights are known.
        n_common_CL, jaccard_CL: experts in both sets, and abs(A & B) / abs(A | B), summed over choices.
        n_prefix_CL, n_prefix_same_CL: tokens compared, and same, in all layers 0..l.
        n_complete_C, n_any_flip_C: tokens compared in every layer, and those with at least one flip.
        n_flipped_C, n_flipped_square_C: flipped layers of those tokens, summed, and their squares summed.
        mass_CL, n_mass_CL: train's gate weight on experts that infer did not choose, and choices behind it.
        top_k: K.
    """

    prompt_id_C: Int64
    n_compared_CL: Int64
    n_same_CL: Int64
    n_reorder_CL: Int64
    n_top1_CL: Int64
    n_top1_known_CL: Int64
    n_common_CL: Int64
    jaccard_CL: Float64
    n_prefix_CL: Int64
    n_prefix_same_CL: Int64
    n_complete_C: Int64
    n_any_flip_C: Int64
    n_flipped_C: Int64
    n_flipped_square_C: Int64
    mass_CL: Float64
    n_mass_CL: Int64
    top_k: int

    @staticmethod
    def empty(n_layers: int, top_k: int) -> RoutingTotals:
        """Totals of nothing: the neutral element of :meth:`merge`."""
        counts: dict[str, Any] = {}
        for name in (f.name for f in fields(RoutingTotals) if f.name != "top_k"):
            dtype = np.float64 if name in ("mass_CL", "jaccard_CL") else np.int64
            counts[name] = np.zeros((0, n_layers) if name.endswith("_CL") else 0, dtype)
        return RoutingTotals(**counts, top_k=top_k)

    @staticmethod
    def of_block(
        block: PairBlock, seen: ExpertComparison, top_k: int, mass: MisroutedMass | None = None
    ) -> RoutingTotals:
        """Totals of one block, given its expert comparison and, if at hand, its misrouted mass."""
        mass = mass or misrouted_mass(block, seen)
        prompts, row_T = np.unique(block.prompt_id_T, return_inverse=True)
        cells = _Cells(len(prompts), seen.shape[1], row_T.astype(np.int64))
        compared_CL = cells.count_all(seen.is_compared_TL, seen.is_all_compared)
        swapped_N = seen.n_swapped_N.astype(np.float64)
        union_N = np.maximum(top_k + swapped_N, 1)
        common_CL = top_k * compared_CL - cells.count(seen.flip_N, swapped_N).astype(np.int64)
        is_mass_everywhere = mass.is_known_TL is seen.is_compared_TL and seen.is_all_compared
        return RoutingTotals(
            prompt_id_C=prompts.astype(np.int64),
            n_compared_CL=compared_CL,
            n_same_CL=compared_CL - cells.count(seen.flip_N).astype(np.int64),
            n_reorder_CL=cells.count(seen.reorder_R).astype(np.int64),
            **_top1_counts(cells, block, seen, compared_CL),
            n_common_CL=common_CL,
            jaccard_CL=compared_CL - cells.count(seen.flip_N, 1 - (top_k - swapped_N) / union_N),
            mass_CL=cells.count(seen.flip_N, mass.mass_N),
            n_mass_CL=cells.count_all(mass.is_known_TL, is_mass_everywhere),
            top_k=top_k,
            **_prefix_counts(cells, seen),
            **_token_counts(cells, seen),
        )


@dataclass(frozen=True)
class _Cells:
    """Where the choices of a block are counted: prompt row of every token, times layer."""

    n_prompts: int
    n_layers: int
    row_T: Int64

    def count(self, index_N: Int64, weights_N: Float64 | None = None) -> NDArray[Any]:
        """(C, L) sums over the flat choices ``token * L + layer``."""
        # row * L + layer = index + (row - token) * L: one division instead of two
        offset_T = (self.row_T - np.arange(len(self.row_T))) * self.n_layers
        cell_N = index_N + offset_T[index_N // max(1, self.n_layers)]
        size = self.n_prompts * self.n_layers
        return np.bincount(cell_N, weights=weights_N, minlength=size).reshape(self.n_prompts, self.n_layers)

    def count_all(self, is_true_TL: NDArray[np.bool_], is_everywhere: bool) -> Int64:
        """(C, L) counts of a dense mask; one that holds everywhere needs no counting."""
        if is_everywhere:
            return np.repeat(self.per_prompt()[:, None], self.n_layers, axis=1)
        return self.count(np.flatnonzero(is_true_TL)).astype(np.int64)

    def per_prompt(self, values_T: NDArray[Any] | None = None) -> Int64:
        """(C,) sums of an integer per token; the tokens themselves without one. Exact below 2^53."""
        return np.bincount(self.row_T, weights=values_T, minlength=self.n_prompts).astype(np.int64)

    def survivors(self, last_T: Int64) -> Int64:
        """(C, L) tokens whose ``last_T`` (0 .. L) lies above the layer."""
        size = self.n_layers + 1
        count_CL = np.bincount(self.row_T * size + last_T, minlength=self.n_prompts * size)
        reached_CL = count_CL.reshape(self.n_prompts, size)[:, ::-1].cumsum(axis=1)[:, ::-1]
        return reached_CL[:, 1:].astype(np.int64)


def _top1_counts(cells: _Cells, block: PairBlock, seen: ExpertComparison, compared_CL: Int64) -> dict[str, Int64]:
    differs = top1_differences(block, seen)
    if differs is None:
        return dict.fromkeys(("n_top1_CL", "n_top1_known_CL"), np.zeros_like(compared_CL))
    return {"n_top1_CL": compared_CL - cells.count(differs).astype(np.int64), "n_top1_known_CL": compared_CL}


def _prefix_counts(cells: _Cells, seen: ExpertComparison) -> dict[str, Int64]:
    """Tokens compared, and same, in all layers 0..l: by the first layer where each of the two ends."""
    n_tokens, n_layers = seen.shape
    known_T = np.full(n_tokens, n_layers, dtype=np.int64)
    if not seen.is_all_compared:
        complete_T = seen.is_complete_T
        known_T = np.where(complete_T, n_layers, seen.is_compared_TL.argmin(axis=1)).astype(np.int64)
    return {
        "n_prefix_CL": cells.survivors(known_T),
        "n_prefix_same_CL": cells.survivors(np.minimum(known_T, seen.first_flip_T)),
    }


def _token_counts(cells: _Cells, seen: ExpertComparison) -> dict[str, Int64]:
    complete_T = seen.is_complete_T
    n_flipped_T = np.where(complete_T, seen.n_flipped_T, 0)
    return {
        "n_complete_C": cells.per_prompt(complete_T),
        "n_any_flip_C": cells.per_prompt(n_flipped_T > 0),
        "n_flipped_C": cells.per_prompt(n_flipped_T),
        "n_flipped_square_C": cells.per_prompt(np.square(n_flipped_T)),
    }
