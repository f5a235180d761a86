"""Counts of choices and flips by margin: one streaming pass, exact, mergeable, in bounded memory.

Invariants:
    - margins are one arm's, ``side``: infer's where infer has them, else train's (a native observer gives ids alone);
    - a margin is known by its key: a float32's sign, exponent and top 11 mantissa bits. Bin edges are values where
      keys begin, so a bin is an exact function of the key and one table look-up replaces a search;
    - exact ties (0) are a bin of their own, and so are negative logit margins (a bias or group rule overruled them);
    - :class:`MarginTotals` holds integer counts only, so ``merge(parts)`` equals the whole exactly;
    - 8 MB per group of counts by key, however many choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from moediag.analysis.expert_sets import ExpertComparison, compare_block
from moediag.errors import MoediagError
from moediag.run.align import Pair, PairBlock

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Side = Literal["infer", "train"]

SPACES: Final = ("choice", "logit")
_KEY_SHIFT: Final = 12  # 32 - 12 = 20 bits: sign, 8 exponent, 11 mantissa
N_KEYS: Final = 1 << (32 - _KEY_SHIFT)
_ZERO_KEY: Final = 1 << (31 - _KEY_SHIFT)
_CHOICES_PER_CHUNK: Final = 1 << 18


def _key_edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values rounded up to where a key begins: to a relative 2^-11 at most."""
    bits = values.astype(np.float32).view(np.uint32)
    step = np.uint32(1 << _KEY_SHIFT)
    return np.asarray(((bits + step - 1) // step * step).astype(np.uint32).view(np.float32), dtype=np.float64)


_EDGES: Final = _key_edges(10.0 ** (np.arange(-24, 9) / 4))  # 1e-6 .. 100, four bins per decade
BIN_LOW: Final = np.r_[-np.inf, 0.0, 0.0, _EDGES]
BIN_HIGH: Final = np.r_[0.0, 0.0, _EDGES, np.inf]
TIE_BIN: Final = 1
N_BINS: Final = len(BIN_LOW)


@dataclass(frozen=True)
class MarginTotals:
    """Counts of choices and flips by margin, in one score space.

    Args:
        side: whose margins; None until a block had some.
        prompt_id_C: the prompts seen, ascending.
        n_CB, flips_CB: choices, and those that flipped, by prompt and margin bin.
        n_LB, flips_LB: the same by MoE layer and margin bin.
        n_Q, flips_Q: the same by key, for quantiles.
    """

    side: Side | None
    prompt_id_C: Int64
    n_CB: Int64
    flips_CB: Int64
    n_LB: Int64
    flips_LB: Int64
    n_Q: Int64
    flips_Q: Int64

    @staticmethod
    def empty(n_layers: int) -> MarginTotals:
        """Totals of nothing: the neutral element of :meth:`merge`."""
        none_CB, none_LB = np.zeros((0, N_BINS), np.int64), np.zeros((n_layers, N_BINS), np.int64)
        none_Q = np.zeros(N_KEYS, np.int64)
        return MarginTotals(None, np.zeros(0, np.int64), none_CB, none_CB, none_LB, none_LB.copy(), none_Q,
                            none_Q.copy())  # fmt: skip

    def add_block(self, block: PairBlock, seen: ExpertComparison, space: str) -> MarginTotals:
        """These totals and one block's, given its expert comparison; a block without this side's margins adds nothing.

        The per-layer and per-key counts are added *in place* (8 MB each): use only the returned totals.
        """
        side = self.side or margin_side(block, space)
        margin_TL = None if side is None else margins_of(block, space, side)
        if margin_TL is None or not len(block):
            return self
        prompts, row_T = np.unique(block.prompt_id_T, return_inverse=True)
        counts = np.zeros((2, len(prompts), N_BINS), np.int64)
        into = (self.n_LB, self.flips_LB), (self.n_Q, self.flips_Q)
        for index_N, first_N, is_flips in _choices(seen, row_T.astype(np.int64)):
            key_N, kept_N = _keys(margin_TL.reshape(-1)[index_N])
            cell_N = (first_N if kept_N is None else first_N[kept_N]) + _bin_of_key()[key_N]
            cells = _count(cell_N, (len(prompts), seen.shape[1], N_BINS))
            counts[is_flips] += cells.sum(axis=1)
            into[0][is_flips].__iadd__(cells.sum(axis=0))
            _add_keys(into[1][is_flips], key_N)
        all_prompts, n_CB, flips_CB = _merge_prompts(
            [(self.prompt_id_C, self.n_CB, self.flips_CB), (prompts.astype(np.int64), counts[0], counts[1])]
        )
        return MarginTotals(side, all_prompts, n_CB, flips_CB, self.n_LB, self.flips_LB, self.n_Q, self.flips_Q)

    @staticmethod
    def merge(parts: Iterable[MarginTotals]) -> MarginTotals:
        """Totals of all parts together (at least one); a prompt may appear in several.

        Raises:
            MoediagError: the parts hold margins of different sides.
        """
        some = list(parts)
        sides = {part.side for part in some if part.side is not None}
        if len(sides) > 1:
            raise MoediagError("margins of two sides do not add up; merge totals of one side only")
        prompts, n_CB, flips_CB = _merge_prompts([(p.prompt_id_C, p.n_CB, p.flips_CB) for p in some])
        summed = {
            name: np.sum([getattr(part, name) for part in some], axis=0)
            for name in ("n_LB", "flips_LB", "n_Q", "flips_Q")
        }
        return MarginTotals(next(iter(sides), None), prompts, n_CB, flips_CB, **summed)


def margin_totals(pair: Pair) -> dict[str, MarginTotals]:
    """Counts of the whole pair by score space, in one pass over its blocks."""
    totals = {space: MarginTotals.empty(pair.n_layers) for space in SPACES}
    for block in pair.blocks():
        if (seen := compare_block(block)) is not None:
            totals = {space: totals[space].add_block(block, seen, space) for space in SPACES}
    return totals


def margin_side(block: PairBlock, space: str) -> Side | None:
    """Whose margins to use: infer's, else train's, else nobody's."""
    sides: tuple[Side, ...] = ("infer", "train")
    return next((side for side in sides if margins_of(block, space, side) is not None), None)


def margins_of(block: PairBlock, space: str, side: Side) -> Float32 | None:
    """The margins of one side in one score space, if captured."""
    margin_TL: Float32 | None = getattr(block, f"{'margin' if space == 'choice' else 'logit_margin'}_{side}_TL")
    return margin_TL


def key_value(key: int) -> float:
    """The middle of a key's interval; the key of 0 (and of subnormals near it) gives 0."""
    if key in (_ZERO_KEY, _ZERO_KEY - 1):
        return 0.0
    ordered = (key << _KEY_SHIFT) | (1 << (_KEY_SHIFT - 1))
    bits = ordered ^ (1 << 31) if ordered >> 31 else ~ordered & 0xFFFFFFFF
    value = float(np.array([bits], dtype=np.uint32).view(np.float32)[0])
    if np.isnan(value):  # no NaN is ever counted: an exponent of all ones is an infinite margin (K = E)
        return float("inf") if ordered >> 31 else float("-inf")
    return value


def _choices(seen: ExpertComparison, row_T: Int64) -> Iterator[tuple[Any, Int64, int]]:
    """(flat choices, first bin of the prompt and layer of each, 0 = all compared or 1 = flipped), chunk by chunk.

    Chunks of all choices are slices where everything was compared: no index is made for what needs none.
    """
    n_tokens, n_layers = seen.shape
    step = max(1, _CHOICES_PER_CHUNK // max(1, n_layers))
    layer_L = np.arange(n_layers) * N_BINS
    for first in range(0, n_tokens, step):
        rows = slice(first, min(first + step, n_tokens))
        first_bin_N = (row_T[rows, None] * (n_layers * N_BINS) + layer_L).reshape(-1)
        if seen.is_all_compared:
            yield slice(rows.start * n_layers, rows.stop * n_layers), first_bin_N, 0
        else:
            kept = np.flatnonzero(seen.is_compared_TL[rows])
            yield kept + rows.start * n_layers, first_bin_N[kept], 0
    for first in range(0, len(seen.flip_N), _CHOICES_PER_CHUNK):
        flip_N = seen.flip_N[first : first + _CHOICES_PER_CHUNK]
        yield flip_N, (row_T[flip_N // n_layers] * n_layers + flip_N % n_layers) * N_BINS, 1


def _keys(margin_N: Float32) -> tuple[NDArray[np.uint32], NDArray[np.bool_] | None]:
    """Order-preserving integer keys of float32 margins without their 12 lowest mantissa bits; NaN is left out.

    Returns:
        Keys, and which margins they are of; None = all.
    """
    kept_N = None
    lowest = margin_N.min(initial=np.inf)
    if np.isnan(lowest):
        kept_N = ~np.isnan(margin_N)
        margin_N = margin_N[kept_N]
        lowest = margin_N.min(initial=np.inf)
    bits_N = (margin_N + np.float32(0)).view(np.uint32)  # -0.0 is a tie like any other
    if lowest >= 0:
        ordered_N = bits_N | np.uint32(1 << 31)
    else:
        ordered_N = np.where(bits_N >> 31, ~bits_N, bits_N | np.uint32(1 << 31))
    return ordered_N >> np.uint32(_KEY_SHIFT), kept_N


@cache
def _bin_of_key() -> NDArray[np.int8]:
    """Margin bin of every key: 0 negative, 1 exact tie, 2.. positive by edges."""
    keys = np.arange(N_KEYS, dtype=np.int64)
    bits = (keys << _KEY_SHIFT).astype(np.uint32) & np.uint32(0x7FFFFFFF)
    with np.errstate(invalid="ignore"):  # keys beyond infinity are NaN patterns, which no margin has
        lowest = bits.view(np.float32).astype(np.float64)
        bin_Q = np.searchsorted(_EDGES, lowest, side="right") + 2
    bin_Q[keys < _ZERO_KEY] = 0
    # positive subnormals share the key of 0: below 2^-126 a float32 margin is 0 for every purpose
    bin_Q[_ZERO_KEY] = TIE_BIN
    return bin_Q.astype(np.int8)  # a megabyte: it stays in cache


def _count(index_N: NDArray[Any], shape: tuple[int, ...]) -> Int64:
    return np.bincount(index_N, minlength=int(np.prod(shape))).astype(np.int64, copy=False).reshape(shape)


def _add_keys(count_Q: Int64, key_N: NDArray[np.uint32]) -> None:
    """Count keys in place, over the range that they span: a few tens of thousands of the million."""
    if len(key_N):
        lowest, highest = int(key_N.min()), int(key_N.max())
        count_Q[lowest : highest + 1] += np.bincount(key_N - np.uint32(lowest), minlength=highest - lowest + 1)


def _merge_prompts(parts: list[tuple[Int64, Int64, Int64]]) -> tuple[Int64, Int64, Int64]:
    prompts, row_P = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    merged = np.zeros((2, len(prompts), N_BINS), np.int64)
    for i in (0, 1):
        np.add.at(merged[i], row_P, np.concatenate([part[i + 1] for part in parts]))
    return prompts, merged[0], merged[1]
