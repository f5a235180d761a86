"""Where flips happen and which experts they exchange: layer x position, and expert against expert.

Invariants:
    - both totals are integer counts that merge exactly, and their size does not grow with tokens: positions are
      counted in at most 1024 bins whose width doubles when a longer response comes, experts in an (L, E, E) table;
    - only flips are touched one by one;
    - an expert pair is counted for flips that exchange exactly one expert, where who replaced whom is a fact;
      flips that exchange more are counted, not guessed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import EXPERT_SWAPS, FLIPS_BY_LAYER_POSITION
from moediag.analysis.expert_sets import ExpertComparison
from moediag.analysis.totals import Totals
from moediag.run.align import PairBlock

Int64 = NDArray[np.int64]

MAX_FINE_BINS: Final = 1024
MAX_BINS: Final = 16
TOP_SWAPS: Final = 500


@dataclass(frozen=True)
class FlipMap:
    """Choices and flips by position bin (B) and layer; bin b holds positions ``b * width .. (b + 1) * width - 1``."""

    width: int
    n_BL: Int64
    flips_BL: Int64

    @staticmethod
    def empty(n_layers: int) -> FlipMap:
        """Counts of nothing: the neutral element of :meth:`merge`."""
        none_BL = np.zeros((0, n_layers), np.int64)
        return FlipMap(1, none_BL, none_BL)

    @staticmethod
    def of_block(block: PairBlock, seen: ExpertComparison) -> FlipMap:
        """Counts of one block, given its expert comparison."""
        n_layers = seen.shape[1]
        width = _width(int(block.position_T.max(initial=-1)) + 1, MAX_FINE_BINS)
        bin_T = block.position_T.astype(np.int64) // width
        n_bins = int(bin_T.max(initial=-1)) + 1
        token_N, layer_N = np.divmod(seen.flip_N, max(1, n_layers))
        flips = np.bincount(bin_T[token_N] * n_layers + layer_N, minlength=n_bins * n_layers)
        if seen.is_all_compared:
            n_BL = np.repeat(np.bincount(bin_T, minlength=n_bins)[:, None], n_layers, axis=1)
        else:
            token_N, layer_N = np.nonzero(seen.is_compared_TL)
            compared = np.bincount(bin_T[token_N] * n_layers + layer_N, minlength=n_bins * n_layers)
            n_BL = compared.reshape(n_bins, n_layers)
        return FlipMap(width, n_BL.astype(np.int64), flips.reshape(n_bins, n_layers).astype(np.int64))

    @staticmethod
    def merge(parts: Iterable[FlipMap]) -> FlipMap:
        """Counts of all parts together (at least one), at the widest bin that the longest response asks for."""
        some = list(parts)
        width = max(part.width for part in some)
        coarse = [part.at_width(width) for part in some]
        n_bins, n_layers = max(len(part.n_BL) for part in coarse), coarse[0].n_BL.shape[1]
        n_BL, flips_BL = np.zeros((n_bins, n_layers), np.int64), np.zeros((n_bins, n_layers), np.int64)
        for part in coarse:
            n_BL[: len(part.n_BL)] += part.n_BL
            flips_BL[: len(part.n_BL)] += part.flips_BL
        return FlipMap(width, n_BL, flips_BL)

    def at_width(self, width: int) -> FlipMap:
        """The same counts in bins of ``width``, a multiple of this width."""
        group = np.arange(0, len(self.n_BL), width // self.width)
        if not len(group):
            return FlipMap(width, self.n_BL, self.flips_BL)
        return FlipMap(width, np.add.reduceat(self.n_BL, group, axis=0), np.add.reduceat(self.flips_BL, group, axis=0))


@dataclass
class SwapTotals(Totals):
    """Which expert replaced which, by MoE layer.

    Args:
        n_flips_L: flips of the layer; ``n_single_L`` of them exchange exactly one expert.
        n_swaps_LEE: single swaps by (layer, expert only train chose, expert only infer chose).
    """

    n_flips_L: Int64
    n_single_L: Int64
    n_swaps_LEE: NDArray[np.int32]

    @staticmethod
    def empty(n_layers: int, n_experts: int) -> SwapTotals:
        """Counts of nothing."""
        none_L = np.zeros(n_layers, np.int64)
        return SwapTotals(none_L, none_L.copy(), np.zeros((n_layers, n_experts, n_experts), np.int32))

    def add_block(self, block: PairBlock, seen: ExpertComparison) -> None:
        """Count one block, in place, given its expert comparison."""
        n_layers, n_experts = self.n_swaps_LEE.shape[:2]
        layer_N = seen.flip_N % max(1, n_layers)
        single = np.flatnonzero((seen.n_only_train_N == 1) & (seen.n_only_infer_N == 1))
        self.n_flips_L += np.bincount(layer_N, minlength=n_layers)
        self.n_single_L += np.bincount(layer_N[single], minlength=n_layers)
        if not len(single) or block.expert_ids_train_TLK is None or block.expert_ids_infer_TLK is None:
            return
        # one True per row: its flat position, less the rows before it, is its place among the K ids
        first_id_N = (seen.flip_N[single] - np.arange(len(single))) * seen.top_k
        train_N, infer_N = (
            ids_TLK.reshape(-1)[first_id_N + np.flatnonzero(only_NK.take(single, axis=0))].astype(np.int64)
            for ids_TLK, only_NK in (
                (block.expert_ids_train_TLK, seen.only_train_NK),
                (block.expert_ids_infer_TLK, seen.only_infer_NK),
            )
        )
        np.add.at(self.n_swaps_LEE.reshape(-1), (layer_N[single] * n_experts + train_N) * n_experts + infer_N, 1)


def flips_by_layer_position(flips: FlipMap, decoder_layer_L: tuple[int, ...]) -> pd.DataFrame:
    """Flip rate by layer and position in the response: the heat map.

    Args:
        flips: counts of the pair.
        decoder_layer_L: decoder layer of every MoE layer.

    Returns:
        Frame ``flips_by_layer_position``, at most 16 position bins; lower is better. Late positions hold the
        sequences that got so far. Cells without a compared choice are left out.

    Source: ours.
    """
    width = max(flips.width, _width(flips.width * len(flips.n_BL), MAX_BINS))
    coarse = flips.at_width(width)
    bins, layers = (index.ravel() for index in np.indices(coarse.n_BL.shape))
    n, flipped = coarse.n_BL.ravel(), coarse.flips_BL.ravel()
    frame = pd.DataFrame(
        {
            "layer": layers,
            "decoder_layer": np.array(decoder_layer_L, dtype=np.int64)[layers],
            "position_low": bins * width,
            "position_high": (bins + 1) * width - 1,
            "n_choices": n,
            "n_flipped": flipped,
            "flip_rate": flipped / np.where(n == 0, np.nan, n),
        }
    )
    return FLIPS_BY_LAYER_POSITION.validate(frame[frame["n_choices"] > 0].sort_values(["layer", "position_low"]))


def expert_swaps(totals: SwapTotals, decoder_layer_L: tuple[int, ...], top: int = TOP_SWAPS) -> pd.DataFrame:
    """Which experts stand in for each other: the most frequent single swaps.

    A healthy pair swaps near ties, so a pair of experts swaps both ways about equally often; one direction
    only points at a shifted score (a bias, a dtype) of one of the two.

    Args:
        totals: counts of the pair.
        decoder_layer_L: decoder layer of every MoE layer.
        top: rows kept, most frequent first.

    Returns:
        Frame ``expert_swaps``, sorted by count (then layer and experts).

    Source: ours.
    """
    flat = totals.n_swaps_LEE.reshape(-1)
    cell = np.flatnonzero(flat)
    cell = cell[np.lexsort((cell, -flat[cell].astype(np.int64)))][:top]
    layer, train, infer = np.unravel_index(cell, totals.n_swaps_LEE.shape)
    n_flips = totals.n_flips_L[layer]
    frame = pd.DataFrame(
        {
            "layer": layer,
            "decoder_layer": np.array(decoder_layer_L, dtype=np.int64)[layer],
            "expert_train": train,
            "expert_infer": infer,
            "n_swaps": flat[cell],
            "n_reverse": totals.n_swaps_LEE[layer, infer, train],
            "share_of_flips": flat[cell] / np.maximum(n_flips, 1),
            "n_flips": n_flips,
            "n_single_flips": totals.n_single_L[layer],
        }
    )
    return EXPERT_SWAPS.validate(frame)


def _width(n_positions: int, max_bins: int) -> int:
    """Smallest power of two that cuts the positions into at most ``max_bins`` bins."""
    return 1 << max(0, (max(1, n_positions) - 1).bit_length() - (max_bins.bit_length() - 1))
