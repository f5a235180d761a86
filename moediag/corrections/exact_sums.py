"""Sums by sequence that do not depend on the order of the rows.

Invariants:
    - the sum of a sequence is the same, bit for bit, however its rows are ordered and whatever stands beside it: a
      sequence on the bound of a filter is kept or dropped by its tokens, not by how a table happened to be sorted or
      cut into parts;
    - the error is that of rounding twice, plus at most n * 2^-85 for n tokens.

Floating-point addition is not associative. Values are therefore cut into slices on one fixed grid of powers of two,
so coarse that sums of a slice are exact integers; only the slices' sums are added, from the smallest up. Sequences that
do not fit the grid (a value of 4096 and more, or more than a million tokens) are summed one by one by ``math.fsum``.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_LARGEST: Final = 2.0**12
"""Log-ratios of this size do not occur in captures; k3 reaches it at a log-ratio of 8.3."""
_MOST: Final = 2**20
_UNITS: Final = (2.0**-20, 2.0**-52, 2.0**-84)
"""2^20 values below 2^12 are below 2^32: on a grid of 2^-20 the sum has 52 bits, and so below."""


def sums_by_sequence(values_T: Float64, row_T: NDArray[np.intp], n_T_S: NDArray[np.int64]) -> Float64:
    """Sum of every sequence's values, whatever their order.

    Args:
        values_T: finite values.
        row_T: 0 .. S-1, the sequence of every value.
        n_T_S: number of values of every sequence.

    Returns:
        (S,) sums; infinite where they exceed float64.

    Source: pre-rounding, Demmel and Nguyen, "Fast Reproducible Floating-Point Summation", ARITH 21 (2013).

    Example:
        >>> values = np.array([1e16, 1.0, -1e16])
        >>> sums_by_sequence(values, np.zeros(3, np.intp), np.array([3])).tolist()
        [1.0]
    """
    is_wild_T = ~(np.abs(values_T) < _LARGEST)
    is_wild_S = n_T_S > _MOST
    if not (is_wild_T.any() or is_wild_S.any()):
        return _sums_on_grid(values_T, row_T, len(n_T_S))
    is_wild_S[row_T[is_wild_T]] = True
    in_wild_T = is_wild_S[row_T]
    total_S = _sums_on_grid(np.where(in_wild_T, 0.0, values_T), row_T, len(n_T_S))
    total_S[is_wild_S] = _sums_one_by_one(values_T[in_wild_T], row_T[in_wild_T])
    return total_S


def _sums_on_grid(values_T: Float64, row_T: NDArray[np.intp], n_rows: int) -> Float64:
    rest_T, sums_S = values_T, []
    for unit in _UNITS:
        # adding and taking away 1.5 * 2^52 units rounds to a whole number of units
        shift = 1.5 * 2.0**52 * unit
        slice_T = rest_T + shift
        slice_T -= shift
        sums_S.append(np.bincount(row_T, weights=slice_T, minlength=n_rows))
        rest_T = np.subtract(rest_T, slice_T, out=slice_T)
        if not rest_T.any():
            break
    total_S = sums_S.pop()
    while sums_S:
        total_S = total_S + sums_S.pop()
    return np.asarray(total_S, dtype=np.float64)


def _sums_one_by_one(values_T: Float64, row_T: NDArray[np.intp]) -> Float64:
    """Exact sums of the sequences that occur, in ascending order of their row."""
    order_T = np.argsort(row_T, kind="stable")
    first_S = np.flatnonzero(np.diff(row_T[order_T], prepend=-1))
    return np.array([_sum(part) for part in np.split(values_T[order_T], first_S[1:])])


def _sum(values_T: Float64) -> float:
    try:
        return math.fsum(values_T)
    except OverflowError:
        return math.fsum(values_T / _MOST) * _MOST
