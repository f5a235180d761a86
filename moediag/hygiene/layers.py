"""D02 of single layers: one layer whose record is another router's, and two layers with one record.

A layer at chance is judged against the other layers of the same pair: agreement beyond what popularity of experts
gives, as a share of what could be. Noisy engines agree little in every layer, and then nothing is said.
"""

from __future__ import annotations

import numpy as np

from moediag.hygiene.chance import N_GROUPS, exceeds, group_of, mean_is_positive
from moediag.hygiene.findings import Count, Finding, finding
from moediag.hygiene.lags import popularity
from moediag.hygiene.rows import MIN_ROWS, Rows, Shape, n_members

_LEAST_LAYERS = 3
"""With two layers neither is the odd one out."""

_AT_CHANCE = 0.25
"""A layer is at chance when it agrees beyond chance by less than this share of what the median layer does."""

_LEAST_ROOM = 0.05
"""Where popular experts alone give more than 1 - this agreement, a layer says nothing."""


class LayerAtChance:
    """Overlap of the two sides' expert sets in every layer."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        n_layers = shape.n_layers
        self._n_GL, self._overlap_GL = np.zeros((N_GROUPS, n_layers)), np.zeros((N_GROUPS, n_layers))
        self._squares_L = np.zeros(n_layers)
        self._chosen_LE = np.zeros((2, n_layers, shape.n_experts))
        self._n_copies = 1

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        tokens = train.tokens
        self._n_copies = max(self._n_copies, int(tokens.sample_index_T.max(initial=0)) + 1)
        group_T = group_of(tokens.prompt_id_T, tokens.position_T)
        both_TL = train.routed & infer.routed
        overlap_TL = n_members(train.sets & infer.sets) / self._shape.top_k
        for layer in range(self._shape.n_layers):
            both_T = both_TL[:, layer]
            overlap, group = overlap_TL[both_T, layer], group_T[both_T]
            self._n_GL[:, layer] += np.bincount(group, minlength=N_GROUPS)
            self._overlap_GL[:, layer] += np.bincount(group, overlap, minlength=N_GROUPS)
            self._squares_L[layer] += float((overlap**2).sum())
            for side, rows in enumerate((train, infer)):
                ids_TLK = rows.ids[both_T, layer : layer + 1]
                self._chosen_LE[side, layer] += popularity(ids_TLK, self._shape.n_experts)[0]

    def findings(self, where: str) -> list[Finding]:
        """Layers at chance while most agree."""
        n_L = self._n_GL.sum(axis=0)
        if self._shape.n_layers < _LEAST_LAYERS or not self._shape.is_choice or n_L.min() < MIN_ROWS:
            return []
        overlap_L = self._overlap_GL.sum(axis=0) / n_L
        train_LE, infer_LE = self._chosen_LE / n_L[:, None]
        chance_L = (train_LE * infer_LE).sum(axis=1) / self._shape.top_k
        room_L = 1 - chance_L
        usual = float(np.median((overlap_L - chance_L) / np.maximum(room_L, _LEAST_ROOM)))
        least_L = chance_L + _AT_CHANCE * usual * room_L  # of a layer that is not at chance
        layers = [
            layer
            for layer in np.flatnonzero((room_L > _LEAST_ROOM) & (overlap_L < least_L)).tolist()
            if self._is_below(layer, float(least_L[layer]))
        ]
        if not layers or usual <= 0:
            return []
        worst = min(layers, key=lambda layer: float(overlap_L[layer] - chance_L[layer]))
        others = np.delete(overlap_L, layers)
        message = (
            f"layers {layers} of {self._shape.n_layers}: {overlap_L[worst]:.1%} of experts shared in layer {worst}, "
            f"chance {chance_L[worst]:.1%}; {others.min():.1%} to {others.max():.1%} in the other layers"
        )
        return [finding("D02-layer-at-chance", where, message, n=len(layers), n_of=self._shape.n_layers,
                        base_rate=float(chance_L[worst]))]  # fmt: skip

    def _is_below(self, layer: int, least: float) -> bool:
        n_G, sum_G = self._n_GL[:, layer], self._overlap_GL[:, layer]
        n, total = float(n_G.sum()), float(sum_G.sum())
        squares = n * least**2 - 2 * least * total + float(self._squares_L[layer])
        return mean_is_positive(n_G, least * n_G - sum_G, squares, self._n_copies, self._shape.n_layers)


class TwinLayers:
    """A hash of every layer's sets over all rows: equal hashes are equal layers.

    Two layers may agree by popularity alone, as neighbouring rows of one layer do, or because one follows the other.
    Ours: by chance they differ in at least half as many rows as neighbours do.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._hash_L = np.zeros(shape.n_layers, dtype=np.uint64)
        self._rows, self._n_neighbours = Count(), 0
        self._neighbours_L = np.zeros(shape.n_layers, dtype=np.int64)

    def add(self, rows: Rows) -> None:
        """Add a shard."""
        used_T = rows.routed_throughout & ~rows.filler
        self._rows.add(rows.tokens, used_T, len(rows), rows.prefixes)
        sets_TLW = rows.sets
        weight_T = rows.prefixes * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
        for word in range(sets_TLW.shape[2]):
            mixed_TL = (sets_TLW[used_T, :, word] + np.uint64(word + 1)) * np.uint64(0xBF58476D1CE4E5B9)
            mixed_TL ^= mixed_TL >> np.uint64(29)
            self._hash_L += (mixed_TL * weight_T[used_T, None]).sum(axis=0, dtype=np.uint64)
        pair_T = used_T[1:] & used_T[:-1] & rows.follows(1)
        self._n_neighbours += int(pair_T.sum())
        same_TL = (sets_TLW[1:][pair_T] == sets_TLW[:-1][pair_T]).all(axis=2)
        self._neighbours_L += same_TL.sum(axis=0)

    def findings(self, where: str) -> list[Finding]:
        """Layers that are copies of each other."""
        n_layers, n_rows = self._shape.n_layers, self._rows.n_distinct
        if n_rows < MIN_ROWS or not self._shape.is_choice:
            return []
        alike_L = (self._neighbours_L + 1) / (self._n_neighbours + 2)
        groups = [np.flatnonzero(self._hash_L == key).tolist() for key in np.unique(self._hash_L)]
        n_pairs = n_layers * (n_layers - 1) // 2
        twins = sorted(
            layers
            for layers in groups
            if len(layers) > 1 and exceeds(n_rows, n_rows, (1 + float(alike_L[layers[0]])) / 2, n_pairs)
        )
        if not twins:
            return []
        words = "; ".join(" and ".join(map(str, layers)) for layers in twins)
        message = f"layers {words} of {n_layers} have the same experts in all {self._rows.n:,} rows"
        return [finding("D02-twin-layers", where, message, n=sum(map(len, twins)), n_of=n_layers)]
