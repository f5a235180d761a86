"""Expert ids: rows that no TopK gives, and rows or layers in the place of others.

- **Impossible rows** (D03), :class:`Identifiers`: chance plays no part, one such row is an error.
- **Shifted rows and layers** (D01, D02), :class:`RowLag`, :class:`LayerLag`: evidence is a *difference* between the
  agreement of the two sides at an offset and at 0, each row its own control, with its error over groups of rows
  (:mod:`moediag.hygiene.chance`): noisy engines agree little anywhere, and then there is no finding. Layers are
  compared after subtracting what their expert popularity alone gives, since a hot expert is shared by rows that have
  nothing else in common.
- **Single layers** (D02), :class:`LayerAtChance`, :class:`TwinLayers`: one layer whose record is another router's,
  and two layers with one record. A layer at chance is judged against the other layers of the same pair: agreement
  beyond what popularity of experts gives, as a share of what could be.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moediag.hygiene.chance import N_GROUPS, exceeds, group_of, mean_is_positive
from moediag.hygiene.findings import Count, Finding, Tally, counted, finding
from moediag.hygiene.rows import MIN_ROWS, TOKEN_LAGS, Rows, Shape, aligned, n_members, n_rows_by_layer
from moediag.notation import NOT_ROUTED
from moediag.run.capture import TokenRows

_CHUNK = 512

UNSIGNED_NOT_ROUTED = 255
"""-1 in an unsigned byte."""

MAX_LAYER_LAG = 8
"""Largest layer offset tried: models have at most 3 leading dense layers; 8 leaves room for a stage's offset."""

_LEAST_OF_TWO = 0.5
"""Agreement beyond chance, as a share of what could be, that the second of two layers needs for the first to be the odd
one out: hidden states are right there. Ours; where the second does not agree they may differ from the first on."""

_SURE = 0.97
"""Share of experts in common, over a sequence, from which on its sides are not shifted against each other: what is left
for any shift to gain is noise. Ours; engines in bfloat16 share 0.99."""

_AT_CHANCE = 0.25
"""A layer is at chance when it agrees beyond chance by less than this share of what the median layer does."""

_LEAST_ROOM = 0.05
"""Where popular experts alone give more than 1 - this agreement, a layer says nothing."""


class Identifiers(Tally):
    """Counts impossible id rows of one arm."""

    _ends: ClassVar = {"_most": max, "_least": min}

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._duplicate, self._zero, self._partial, self._range = Count(), Count(), Count(), Count()
        self._sentinel = Count()
        self._zero_by_layer = tuple(Count() for _ in range(shape.n_layers))  # beside real ids in other layers
        self._n_zero_L = np.zeros(shape.n_layers, dtype=np.int64)
        self._n_present_L = np.zeros(shape.n_layers, dtype=np.int64)
        self._n_of = 0
        self._twice_E = np.zeros(shape.n_experts, dtype=np.int64)
        self._most, self._least = NOT_ROUTED, NOT_ROUTED
        self._range_K = np.zeros(shape.top_k, dtype=np.int64)

    def add(self, rows: Rows) -> None:
        """Count a shard."""
        self._n_of += rows.absent.size
        self._n_present_L += n_rows_by_layer(~rows.absent)
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
        if self._shape.n_zero_experts:  # a zero expert may be written as expert 0, with a weight of 0
            is_repeated_N[is_repeated_N] = _is_other_than_zero_twice(ids_NK[is_repeated_N])
        for count, is_hit_N in (
            (self._partial, has_none_N),
            (self._sentinel, is_sentinel_N),
            (self._range, is_outside_N & ~is_sentinel_N),
            (self._zero, is_zero_throughout_N),
            (self._duplicate, is_repeated_N),
        ):
            count.add(rows.tokens, _at(odd_TL, is_hit_N), odd_TL.size)
        self._n_zero_L += _at(odd_TL, is_zero_N).sum(axis=0)
        if not self._shape.n_zero_experts:
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


def _is_other_than_zero_twice(ids_NK: NDArray[np.int16]) -> NDArray[np.bool_]:
    """Rows in which an expert other than 0 is named twice."""
    ordered_NK = np.sort(ids_NK, axis=1)
    return np.asarray(((ordered_NK[:, 1:] == ordered_NK[:, :-1]) & (ordered_NK[:, 1:] != 0)).any(axis=1))


def _named_twice(ids_NK: NDArray[np.int16], n_experts: int) -> NDArray[np.int64]:
    """(E,) how often each expert is a repetition within its row."""
    ordered_NK = np.sort(ids_NK, axis=1)
    again = ordered_NK[:, 1:][ordered_NK[:, 1:] == ordered_NK[:, :-1]]
    return np.bincount(again, minlength=n_experts)


class RowLag(Tally):
    """Overlap of the two sides' expert sets by row offset, within sequences."""

    _ends: ClassVar = {"_n_copies": max}

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._n_G = {lag: np.zeros(N_GROUPS) for lag in TOKEN_LAGS}
        self._gain_G = {lag: np.zeros(N_GROUPS) for lag in TOKEN_LAGS}
        self._squares = dict.fromkeys(TOKEN_LAGS, 0.0)
        self._at = dict.fromkeys(TOKEN_LAGS, 0.0)
        self._n_copies = 1

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        tokens = train.tokens
        self._n_copies = max(self._n_copies, int(tokens.sample_index_T.max(initial=0)) + 1)
        group_T = group_of(tokens.prompt_id_T, tokens.position_T)
        size = self._shape.n_layers * self._shape.top_k
        both_T = train.routed_throughout & infer.routed_throughout
        at0_T = _overlap(train, infer, slice(None), slice(None)) / size
        both_T = _in_doubt(tokens, both_T, at0_T)
        for lag in TOKEN_LAGS if both_T.any() else ():
            here, there = aligned(len(tokens), lag)
            good_T = train.follows(abs(lag)) & both_T[here] & train.routed_throughout[there]
            at_T = _overlap(train, infer, there, here)[good_T] / size
            gain_T, group = at_T - at0_T[here][good_T], group_T[here][good_T]
            self._n_G[lag] += np.bincount(group, minlength=N_GROUPS)
            self._gain_G[lag] += np.bincount(group, gain_T, minlength=N_GROUPS)
            self._squares[lag] += float((gain_T**2).sum())
            self._at[lag] += float(at_T.sum())

    def findings(self, where: str) -> list[Finding]:
        """The offset of the largest overlap, where it is not 0 by more than chance."""
        n = {lag: float(self._n_G[lag].sum()) for lag in TOKEN_LAGS}
        lags = [lag for lag in TOKEN_LAGS if n[lag]]
        if not lags or not self._shape.is_choice:
            return []
        best = max(lags, key=lambda lag: float(self._gain_G[lag].sum()) / n[lag])
        if not mean_is_positive(
            self._n_G[best], self._gain_G[best], self._squares[best], self._n_copies, len(TOKEN_LAGS)
        ):
            return []
        at = self._at[best] / n[best]
        at0 = at - float(self._gain_G[best].sum()) / n[best]
        message = f"train's experts agree with infer's at row offset {best:+d} ({at:.1%} shared), not at 0 ({at0:.1%})"
        return [finding("D01-row-lag", where, f"{message}, {int(n[best]):,} rows", n_of=int(n[best]))]


def _in_doubt(tokens: TokenRows, both_T: NDArray[np.bool_], shared_T: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Rows, of those that both sides routed, of sequences in which the sides do not share nearly all experts.

    In the others no shift is looked for.

    Args:
        shared_T: share of experts that both sides have, in the same rows and layers.
    """
    row_T = np.cumsum(tokens.position_T == 0) - 1
    n_S = np.bincount(row_T[both_T], minlength=row_T[-1] + 1)
    is_sure_S = np.bincount(row_T[both_T], shared_T[both_T], minlength=len(n_S)) >= _SURE * n_S
    return np.asarray(both_T & ~is_sure_S[row_T], dtype=np.bool_)


class LayerLag(Tally):
    """Overlap of infer's layer l and train's layer l + o, beyond what expert popularity gives."""

    _ends: ClassVar = {"_n_copies": max}

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        most = min(MAX_LAYER_LAG, shape.n_layers - 1)
        self._n_G = np.zeros(N_GROUPS)
        self._gain_G = {lag: np.zeros(N_GROUPS) for lag in range(-most, most + 1) if lag}
        self._squares = dict.fromkeys(self._lags, 0.0)
        self._at = dict.fromkeys([0, *self._lags], 0.0)
        self._chosen_LE = np.zeros((2, shape.n_layers, shape.n_experts))
        self._n_copies = 1

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        if not self._lags:
            return
        tokens = train.tokens
        self._n_copies = max(self._n_copies, int(tokens.sample_index_T.max(initial=0)) + 1)
        good_T = train.routed_throughout & infer.routed_throughout
        good_T = _in_doubt(tokens, good_T, self._overlap([train.sets, infer.sets], 0))
        if not good_T.any():
            return
        group_T = group_of(tokens.prompt_id_T[good_T], tokens.position_T[good_T])
        sets = [rows.sets[good_T] for rows in (train, infer)]
        self._n_G += np.bincount(group_T, minlength=N_GROUPS)
        for side, rows in enumerate((train, infer)):
            self._chosen_LE[side] += popularity(rows.ids[good_T], self._shape.n_experts)
        at0_T = self._overlap(sets, 0)
        self._at[0] += float(at0_T.sum())
        for lag in self._lags:
            at_T = self._overlap(sets, lag)
            gain_T = at_T - at0_T
            self._at[lag] += float(at_T.sum())
            self._gain_G[lag] += np.bincount(group_T, gain_T, minlength=N_GROUPS)
            self._squares[lag] += float((gain_T**2).sum())

    @property
    def _lags(self) -> list[int]:
        return list(self._gain_G)

    def _overlap(self, sets: list[NDArray[np.uint64]], lag: int) -> NDArray[np.float64]:
        """(T,) mean share of experts that infer's layer l and train's layer l + lag have in common."""
        here, there = aligned(self._shape.n_layers, lag)
        train_TLW, infer_TLW = sets
        shared_T = _n_shared(train_TLW[:, there] & infer_TLW[:, here])
        return np.asarray(shared_T / ((self._shape.n_layers - abs(lag)) * self._shape.top_k))

    def _chance(self, lag: int, n: float) -> float:
        here, there = aligned(self._shape.n_layers, lag)
        train_LE, infer_LE = self._chosen_LE / n
        return float((train_LE[there] * infer_LE[here]).sum(axis=1).mean()) / self._shape.top_k

    def findings(self, where: str) -> list[Finding]:
        """The layer offset that wins while the diagonal is near chance."""
        n = float(self._n_G.sum())
        if not self._lags or not n or not self._shape.is_choice:
            return []
        beyond = {lag: self._at[lag] / n - self._chance(lag, n) for lag in self._at}
        best = max(self._lags, key=lambda lag: beyond[lag])
        if beyond[0] > beyond[best] / 2:  # the diagonal is not near chance
            return []
        shift = self._chance(best, n) - self._chance(0, n)  # gains are taken beyond popularity
        total = float(self._gain_G[best].sum())
        squares = self._squares[best] - 2 * shift * total + n * shift**2
        if not mean_is_positive(
            self._n_G, self._gain_G[best] - shift * self._n_G, squares, self._n_copies, len(self._lags)
        ):
            return []
        message = (
            f"train's layer l{best:+d} agrees with infer's layer l ({self._at[best] / n:.1%} shared, chance "
            f"{self._chance(best, n):.1%}); the same layer does not ({self._at[0] / n:.1%}, chance "
            f"{self._chance(0, n):.1%})"
        )
        return [finding("D02-layer-lag", where, message, n_of=int(n), base_rate=self._chance(0, n))]


def _overlap(train: Rows, infer: Rows, train_rows: slice, infer_rows: slice) -> NDArray[np.int64]:
    """(T,) experts in common, summed over layers."""
    return _n_shared(train.sets[train_rows] & infer.sets[infer_rows])


def _n_shared(shared_TLW: NDArray[np.uint64]) -> NDArray[np.int64]:
    return np.asarray(n_members(shared_TLW).sum(axis=1, dtype=np.int64))


def popularity(
    ids_TLK: NDArray[np.int16], n_experts: int, used_TL: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """(L, E) how often each expert was chosen.

    Args:
        used_TL: where to look; None = everywhere.
    """
    n_layers = ids_TLK.shape[1]
    is_whole = used_TL is None or bool(used_TL.all())
    counts_LE = np.zeros((n_layers, n_experts), np.int64)
    for first in range(0, len(ids_TLK), _CHUNK):  # chunks that stay in cache, all layers at once: twice as fast
        part = slice(first, first + _CHUNK)
        cell_TLK = ids_TLK[part] + (np.arange(n_layers) * n_experts)[:, None]
        flat = cell_TLK if is_whole or used_TL is None else cell_TLK[used_TL[part]]
        counts_LE += np.bincount(flat.ravel(), minlength=n_layers * n_experts).reshape(n_layers, n_experts)
    return counts_LE


class LayerAtChance(Tally):
    """Overlap of the two sides' expert sets in every layer."""

    _ends: ClassVar = {"_n_copies": max}

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        n_layers = shape.n_layers
        self._n_GL, self._shared_GL = np.zeros((2, N_GROUPS, n_layers), dtype=np.int64)  # rows, experts in common
        self._squares_L = np.zeros(n_layers, dtype=np.int64)
        self._chosen_LE = np.zeros((2, n_layers, shape.n_experts))
        self._n_copies = 1

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        tokens = train.tokens
        self._n_copies = max(self._n_copies, int(tokens.sample_index_T.max(initial=0)) + 1)
        group_T = group_of(tokens.prompt_id_T, tokens.position_T)
        both_TL = train.routed & infer.routed
        shared_TL = n_members(train.sets & infer.sets) * both_TL
        first_N = np.flatnonzero(np.r_[True, group_T[1:] != group_T[:-1]][: len(group_T)])  # groups lie in runs
        np.add.at(self._n_GL, group_T[first_N], np.add.reduceat(both_TL, first_N, axis=0, dtype=np.int64))
        np.add.at(self._shared_GL, group_T[first_N], np.add.reduceat(shared_TL, first_N, axis=0, dtype=np.int64))
        self._squares_L += np.square(shared_TL, dtype=np.int32).sum(axis=0, dtype=np.int64)
        for side, rows in enumerate((train, infer)):
            self._chosen_LE[side] += popularity(rows.ids, self._shape.n_experts, both_TL)

    def findings(self, where: str) -> list[Finding]:
        """Layers at chance while most agree."""
        n_L = self._n_GL.sum(axis=0).astype(np.float64)
        if self._shape.n_layers < 2 or not self._shape.is_choice or n_L.min() < MIN_ROWS:
            return []
        overlap_L = self._shared_GL.sum(axis=0) / self._shape.top_k / n_L
        train_LE, infer_LE = self._chosen_LE / n_L[:, None]
        chance_L = (train_LE * infer_LE).sum(axis=1) / self._shape.top_k
        room_L = 1 - chance_L
        beyond_L = (overlap_L - chance_L) / np.maximum(room_L, _LEAST_ROOM)
        usual = float(np.median(beyond_L)) if len(beyond_L) > 2 else float(beyond_L[1])
        if len(beyond_L) == 2 and usual < _LEAST_OF_TWO:
            return []
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
        n_G, sum_G = self._n_GL[:, layer], self._shared_GL[:, layer] / self._shape.top_k
        n, total = float(n_G.sum()), float(sum_G.sum())
        squares = n * least**2 - 2 * least * total + float(self._squares_L[layer]) / self._shape.top_k**2
        return mean_is_positive(n_G, least * n_G - sum_G, squares, self._n_copies, self._shape.n_layers)


class TwinLayers(Tally):
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
        weight_T = (rows.prefixes * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)) * used_T
        self._hash_L += np.einsum("t,tl->l", weight_T, rows.set_hashes)
        pair_T = used_T[1:] & used_T[:-1] & rows.follows(1)
        self._n_neighbours += int(pair_T.sum())
        self._neighbours_L += n_rows_by_layer(rows.repeats[pair_T])

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
