"""95 % intervals of quantiles over tokens, clustered by prompt.

Invariants:
    - the value is numpy's linear quantile of all tokens, bit for bit, and values may come in parts, read again and
      again: what is held at a time is one part, counts per prompt, and :data:`GATHERED` values;
    - the interval comes from counts per prompt only;
    - no interval where it would be invented: bounds beyond the outermost tokens, fewer than 8 prompts (64 for p99 and
      beyond), and no *value* beyond p99 unless 20 tokens from 10 prompts lie above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moediag.numbers import count
from moediag.statistics.intervals import MIN_CLUSTERS, Interval, effective_freedom, rate_bounds, too_few
from moediag.statistics.resampling import positive_bounds, standard_error

Float64 = NDArray[np.float64]
Index = NDArray[np.intp]

GATHERED: Final = 1 << 21
"""Values among which order statistics are looked for by partition; of more, counts narrow the range first."""
_BITS: Final = (16, 12, 12, 12, 12)
"""Bits of a float64 by which a range is narrowed in one pass: 65,536 counts by group at first, then few."""
TAIL_MIN_EXCEEDANCES: Final = 20
TAIL_MIN_CLUSTERS: Final = 10
FAR_MIN_CLUSTERS: Final = 64
"""Prompts that an interval of p99 needs: with 32, where prompts differ much, those that make the tail are often not
in the sample, and the interval covers 0.82."""
_FAR: Final = 0.99
_TAIL_FROM: Final = 0.9


@dataclass(frozen=True)
class Values:
    """Some of the values: those of whole prompts.

    Args:
        values_T: any unit, without NaN.
        group_T: 0 .. G-1, or -1 = in no group.
        prompt_row_T: 0 .. n_prompts-1, the prompt of each value among the part's own.
        n_prompts: prompts of the part, some of them perhaps without a value.
    """

    values_T: Float64
    group_T: NDArray[Any]
    prompt_row_T: Index
    n_prompts: int

    def counts(self, n_groups: int, some_T: NDArray[np.bool_]) -> Float64:
        """(C, G) how many of some values, by prompt and group."""
        inside_T = some_T & (self.group_T >= 0)
        cell_T = self.prompt_row_T[inside_T] * n_groups + self.group_T[inside_T]
        count = np.bincount(cell_T, minlength=self.n_prompts * n_groups)
        return count.reshape(self.n_prompts, n_groups).astype(np.float64)


ReadValues = Callable[[], Iterator[Values]]
"""The values from the first to the last, as often as they are called for."""


def quantile_interval(values_T: ArrayLike, cluster_T: NDArray[Any], q: float) -> Interval:
    """Interval of one quantile of values at hand: :func:`quantile_intervals` of one group.

    Args:
        values_T: token values without NaN, any unit.
        cluster_T: cluster (prompt) of every token.
        q: probability, 0 < q < 1.
    """
    clusters, row_T = np.unique(cluster_T, return_inverse=True)
    return quantile_of_rows(np.asarray(values_T, dtype=np.float64), row_T, len(clusters), q)


def quantile_of_rows(values_T: Float64, row_T: Index, n_rows: int, q: float) -> Interval:
    """:func:`quantile_interval` for clusters numbered 0 .. n_rows - 1, some of them perhaps without a token."""
    part = Values(values_T, np.zeros(len(values_T), np.intp), row_T, n_rows)
    return quantile_intervals(lambda: iter([part]), 1, [q])[0][0]


def quantile_intervals(read: ReadValues, n_groups: int, probabilities: Sequence[float]) -> list[list[Interval]]:
    """Quantiles of every group, with the clustered interval of the share of tokens above each.

    Below p90 the interval of the CDF at the estimate is inverted (Woodruff). From p90 on the share above is small and
    skewed between prompts, and Woodruff's bound ends too low (p99 at 64 prompts: 0.89): there the bounds are those
    shares that an estimate as large as this one would not contradict, on a ratio scale and with the tail of
    :func:`~moediag.statistics.resampling.positive_bounds`. Quantiles beyond p99 are not estimated (NaN) unless at
    least 20 tokens from at least 10 prompts lie above: fewer make them a report of a handful of tokens.

    Args:
        read: gives the parts, as often as it is called.
        n_groups: G.
        probabilities: 0 < q < 1.

    Returns:
        By probability, by group: the quantile (linear interpolation, as ``numpy.quantile``) and bounds in the unit of
        the values.

    Source: Woodruff, JASA 47 (1952) 635-646; Francisco and Fuller, Annals of Statistics 19 (1991), for the
    inversion; Korn and Graubard (1998) for the share.
    """
    n_parts: list[Float64] = []
    low_G, high_G = np.full(n_groups, np.inf), np.full(n_groups, -np.inf)
    for part in read():
        n_parts.append(part.counts(n_groups, np.ones(len(part.values_T), np.bool_)))
        inside_T = part.group_T >= 0
        np.minimum.at(low_G, part.group_T[inside_T], part.values_T[inside_T])
        np.maximum.at(high_G, part.group_T[inside_T], part.values_T[inside_T])
    n_CG = np.concatenate(n_parts)
    n_G = n_CG.sum(axis=0).astype(np.int64)
    value_QG = quantiles_of_groups(read, n_G, np.repeat(np.reshape(probabilities, (-1, 1)), n_groups, axis=1))
    above: list[list[Float64]] = [[] for _ in probabilities]
    for part in read():
        for counted, value_G in zip(above, value_QG, strict=True):
            counted.append(part.counts(n_groups, part.values_T > value_G[part.group_T]))
    above_QCG = [np.concatenate(counted) for counted in above]
    share_QG2, reasons = np.full((*value_QG.shape, 2), np.nan), {}
    for at in np.ndindex(value_QG.shape):
        q, g = probabilities[at[0]], at[1]
        known_C = n_CG[:, g] > 0
        above_C, n_C = above_QCG[at[0]][known_C, g], n_CG[known_C, g]
        if not len(n_C):
            reasons[at] = "no data"
        elif reason := _too_thin_a_tail(above_C, q):
            value_QG[at], reasons[at] = np.nan, reason
        elif reason := _why_none(low_G[g] == high_G[g], len(n_C), q):
            reasons[at] = reason
        else:
            low, high = _shares_above(above_C, n_C, 1 - q)
            # a bound of the share beyond the outermost order statistics would be invented, not measured
            if min(low, 1 - high) * n_G[g] >= 1:
                share_QG2[at] = 1 - high, 1 - low
            else:
                reasons[at] = "too few tokens beyond the quantile to bound it"
    low_QG, high_QG = np.split(quantiles_of_groups(read, n_G, np.concatenate(np.moveaxis(share_QG2, 2, 0))), 2)
    n_clusters_G = (n_CG > 0).sum(axis=0).tolist()
    return [
        [
            Interval(float(value), float(low), float(high), n_clusters, reasons.get((i, g), ""))
            for g, (value, low, high, n_clusters) in enumerate(zip(*row, n_clusters_G, strict=True))
        ]
        for i, row in enumerate(zip(value_QG, low_QG, high_QG, strict=True))
    ]


def quantiles_of_groups(read: ReadValues, n_G: NDArray[np.int64], q_QG: Float64) -> Float64:
    """(Q, G) numpy's linear quantiles of every group's values; NaN where the group has none, or q is NaN.

    Args:
        read: gives the parts, as often as it is called.
        n_G: values of every group.
        q_QG: probabilities.
    """
    value_QG = np.full(q_QG.shape, np.nan)
    at = np.nonzero(np.isfinite(q_QG) & (n_G > 0))
    if not len(at[0]):
        return value_QG
    group_R, last_R = at[1], n_G[at[1]] - 1
    rank_R = last_R * q_QG[at]
    below_R = np.floor(rank_R).astype(np.int64)
    both = order_statistics(read, n_G, np.tile(group_R, 2), np.r_[below_R, np.minimum(below_R + 1, last_R)])
    low_R, high_R = np.split(both, 2)
    value_QG[at] = _between(low_R, high_R, rank_R - below_R)
    return value_QG


def order_statistics(read: ReadValues, n_G: NDArray[np.int64], group_R: Index, rank_R: NDArray[np.int64]) -> Float64:
    """(R,) values of given ranks within their groups, 0 = the least, exactly.

    The range that holds a rank is narrowed by counting values by the leading bits of float64 that are open, pass by
    pass, until few enough are left to be gathered.

    Args:
        read: gives the parts, as often as it is called.
        n_G: values of every group.
        group_R, rank_R: which are wanted.
    """
    slots, slot_R = np.unique(group_R, return_inverse=True)
    ranges = _Ranges(slots, np.zeros(len(slots), np.uint64), 64)
    left_R, n_open = rank_R.copy(), int(n_G[slots].sum())
    for bits in _BITS:
        if n_open <= GATHERED:
            break
        n_SB = np.zeros((len(ranges), 1 << bits), np.int64)
        for part in read():
            for slot, keys in ranges.split(part):
                open_keys = (keys >> np.uint64(ranges.shift - bits)) & np.uint64((1 << bits) - 1)
                n_SB[slot] += np.bincount(open_keys.astype(np.intp), minlength=1 << bits)
        up_to_SB = n_SB.cumsum(axis=1)
        bucket_R = np.array([np.searchsorted(up_to_SB[s], n, "right") for s, n in zip(slot_R, left_R, strict=True)])
        left_R = left_R - (up_to_SB - n_SB)[slot_R, bucket_R]
        prefix_R = (ranges.prefix_S[slot_R] << np.uint64(bits)) | bucket_R.astype(np.uint64)
        pairs, first_S, slot_after_R = np.unique(
            np.stack([group_R.astype(np.uint64), prefix_R]), axis=1, return_index=True, return_inverse=True
        )
        n_open = int(n_SB[slot_R[first_S], bucket_R[first_S]].sum())
        slot_R = slot_after_R.reshape(-1)
        ranges = _Ranges(pairs[0].astype(np.intp), pairs[1], ranges.shift - bits)
    if not ranges.shift:  # equal to the last bit
        return _values_of(ranges.prefix_S[slot_R])
    found: list[list[NDArray[np.uint64]]] = [[] for _ in range(len(ranges))]
    for part in read():
        for slot, keys in ranges.split(part):
            found[slot].append(keys)
    key_R = np.zeros(len(rank_R), np.uint64)
    for slot, gathered in enumerate(found):
        some = np.flatnonzero(slot_R == slot)
        key_R[some] = np.partition(np.concatenate(gathered), np.unique(left_R[some]))[left_R[some]]
    return _values_of(key_R)


@dataclass(frozen=True)
class _Ranges:
    """S ranges of values: a group's whose key begins with the bits of a prefix, ``shift`` bits being open."""

    group_S: Index
    prefix_S: NDArray[np.uint64]
    shift: int

    def __len__(self) -> int:
        return len(self.group_S)

    def split(self, part: Values) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Each range with the keys that lie in it."""
        keys_T = _keys_of(part.values_T)
        for group in np.unique(self.group_S).tolist():
            keys = keys_T[part.group_T == group]
            for slot in np.flatnonzero(self.group_S == group).tolist():
                inside = keys if self.shift == 64 else keys[keys >> np.uint64(self.shift) == self.prefix_S[slot]]
                yield slot, inside


_SIGN: Final = np.uint64(1 << 63)


def _keys_of(values_T: Float64) -> NDArray[np.uint64]:
    """Whole numbers in the order of the values."""
    bits_T = (np.asarray(values_T, np.float64) + 0.0).view(np.uint64)  # -0.0 becomes 0.0
    return np.where(bits_T & _SIGN, ~bits_T, bits_T | _SIGN)


def _values_of(keys: NDArray[np.uint64]) -> Float64:
    return np.where(keys & _SIGN, keys & ~_SIGN, ~keys).view(np.float64)


def _between(low: Float64, high: Float64, share: Float64) -> Float64:
    """Linear interpolation to the bits of numpy.quantile."""
    with np.errstate(invalid="ignore"):
        step = high - low
        between = np.where(share >= 0.5, high - step * (1 - share), low + step * share)
    return np.asarray(np.where(step == 0, low, between), dtype=np.float64)


def _too_thin_a_tail(above_C: Float64, q: float) -> str:
    """Reason not to estimate a quantile beyond p99; empty when enough tokens lie above."""
    n_above, n_clusters = int(above_C.sum()), int((above_C > 0).sum())
    if q <= _FAR or (n_above >= TAIL_MIN_EXCEEDANCES and n_clusters >= TAIL_MIN_CLUSTERS):
        return ""
    needed = f"the tail needs {TAIL_MIN_EXCEEDANCES} tokens from {TAIL_MIN_CLUSTERS} prompts"
    return f"{count(n_above, 'token')} from {count(n_clusters, 'prompt')} above it; {needed}"


def _why_none(is_constant: bool, n_clusters: int, q: float) -> str:
    if n_clusters < MIN_CLUSTERS:
        return too_few(n_clusters)
    if is_constant:
        return "all values are equal"
    if q >= _FAR and n_clusters < FAR_MIN_CLUSTERS:
        return too_few(n_clusters, FAR_MIN_CLUSTERS)
    return ""


def _shares_above(above_C: Float64, n_C: Float64, above: float) -> tuple[float, float]:
    """Shares of tokens above that the quantile's bounds have, low and high, around ``above`` = 1 - q."""
    total = np.array([n_C.sum()])
    share = float(above_C.sum() / total[0])
    residual_C1 = (above_C - share * n_C)[:, None]
    if 1 - above < _TAIL_FROM or share <= 0:
        low, high = rate_bounds(residual_C1, n_C[:, None], np.array([above]))
        return float(low[0]), float(high[0])
    low, high = rate_bounds(residual_C1, n_C[:, None], np.array([share]))
    freedom = effective_freedom(residual_C1)
    se = standard_error(residual_C1, total, np.array([len(n_C)]))
    lower, upper = positive_bounds(residual_C1, n_C[:, None], np.array([share]), se, freedom)
    return above * share / float(np.fmax(high, upper)[0]), above * share / float(np.fmin(low, lower)[0])
