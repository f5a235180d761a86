"""One pass over a pair's blocks: everything that needs (token, layer, K) arrays, as mergeable partial results.

Invariants:
    - a block is read once, its experts compared once, and nothing of its routing arrays survives it; a token keeps
      :data:`~moediag.analysis.tokens.BYTES_PER_TOKEN` bytes, everything else is counts whose size depends on layers,
      experts, prompts and the longest response only;
    - ``merge(parts)`` equals the whole: integers exactly, gate mass and Jaccard sums to float64 rounding. Parts may be
      made by other processes, in any order; blocks of a part are whole sequences;
    - arrays that an arm did not capture (None) leave out what needs them and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.expert_sets import compare_block
from moediag.analysis.flip_maps import FlipMap, SwapTotals
from moediag.analysis.margins import SPACES, MarginTotals
from moediag.analysis.routing_counts import RoutingTotals, misrouted_mass
from moediag.analysis.tokens import concatenate_tokens, token_columns
from moediag.run.align import Pair, PairBlock


@dataclass
class RoutingPass:
    """Partial results of a pair's routing, grown block by block.

    Args:
        n_layers, n_experts, top_k: L, E and K; 0 for a dense model, whose blocks add nothing here.
        totals: agreement by prompt and layer.
        margins: choices and flips by margin, per score space.
        flips: flips by layer and position.
        swaps: experts exchanged, by layer.
    """

    n_layers: int
    n_experts: int
    top_k: int
    parts: list[RoutingTotals] = field(default_factory=list)
    margins: dict[str, MarginTotals] = field(default_factory=dict)
    flips: FlipMap | None = None
    swaps: SwapTotals | None = None

    def add(self, block: PairBlock) -> dict[str, NDArray[Any]]:
        """Count one block; returns its columns of the token frame."""
        seen = compare_block(block) if self.n_layers else None
        if seen is None:
            return token_columns(block, None)
        mass = misrouted_mass(block, seen)
        self.parts.append(RoutingTotals.of_block(block, seen, self.top_k, mass))
        if len(self.parts) > 64:  # merged now and then: shards are many, prompts are what should count
            self.parts = [RoutingTotals.merge(self.parts)]
        for space in SPACES:
            self.margins.setdefault(space, MarginTotals.empty(self.n_layers)).add_block(block, seen, space)
        self.flips = FlipMap.merge([self.flips or FlipMap.empty(self.n_layers), FlipMap.of_block(block, seen)])
        self.swaps = self.swaps or SwapTotals.empty(self.n_layers, self.n_experts)
        self.swaps.add_block(block, seen)
        return token_columns(block, seen, mass)

    @property
    def totals(self) -> RoutingTotals:
        """Agreement by prompt and layer of all blocks so far."""
        return RoutingTotals.merge([RoutingTotals.empty(self.n_layers, self.top_k), *self.parts])

    @property
    def known_margins(self) -> dict[str, MarginTotals]:
        """Margins by score space, of the spaces that an arm captured."""
        return {space: totals for space, totals in self.margins.items() if totals.side is not None}

    @staticmethod
    def merge(some: Iterable[RoutingPass]) -> RoutingPass:
        """All parts together (at least one), of the same model."""
        passes = list(some)
        margins = {}
        for space in SPACES:
            if totals := [one.margins[space] for one in passes if space in one.margins]:
                margins[space] = MarginTotals.merge(totals)
        flips = [one.flips for one in passes if one.flips is not None]
        swaps = [one.swaps for one in passes if one.swaps is not None]
        return RoutingPass(
            passes[0].n_layers,
            passes[0].n_experts,
            passes[0].top_k,
            [part for one in passes for part in one.parts],
            margins,
            FlipMap.merge(flips) if flips else None,
            SwapTotals.merge(swaps) if swaps else None,
        )


def read_pair(pair: Pair) -> tuple[pd.DataFrame, RoutingPass]:
    """The token frame and the routing counts of a pair, in one pass over its blocks.

    Args:
        pair: two aligned arms; also an engine against itself, which makes these the floor's numbers.

    Returns:
        Frame ``tokens`` and the routing counts; for a dense model the counts are empty.
    """
    routing = RoutingPass(pair.n_layers, pair.n_experts, pair.top_k)
    tokens = concatenate_tokens([routing.add(block) for block in pair.blocks()])
    return tokens, routing
