"""Faults of what was recorded: an arm's arrays changed as a capture or a pipeline would spoil them.

Arrays are changed in place, by name; rows are token rows. Nothing is drawn that a seed does not fix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moediag.run.capture import TokenRows

Arrays = dict[str, NDArray[Any]]
Spoil = Callable[[TokenRows, Arrays], None]
"""Changes an arm's arrays in place."""


def _routing(arrays: Arrays) -> Iterator[NDArray[Any]]:
    return (array for name, array in arrays.items() if array.ndim > 1)


def _responses(tokens: TokenRows) -> list[NDArray[np.int64]]:
    return [start + np.flatnonzero(tokens.is_response_T[start:end]) for start, end in tokens.sequence_bounds()]


def _drawn(tokens: TokenRows, share: float) -> NDArray[np.int64]:
    """Rows drawn from those that have routing on both sides: all but the last of every sequence."""
    is_last = np.r_[tokens.seq_id_T[1:] != tokens.seq_id_T[:-1], True]
    return np.flatnonzero((np.random.default_rng(5).random(len(tokens)) < share) & ~is_last)


def _inner(tokens: TokenRows) -> NDArray[np.int64]:
    return _drawn(tokens, 1.0)


def _lose(arrays: Arrays, rows: NDArray[Any]) -> None:
    for name, array in arrays.items():
        if array.ndim > 1:
            array[rows] = -1 if name == "expert_ids_TLK" else np.nan


def logps_lag(tokens: TokenRows, arrays: Arrays) -> None:
    """Every log-probability stands one token late."""
    for rows in _responses(tokens):
        arrays["logp_T"][rows[1:]] = arrays["logp_T"][rows[:-1]].copy()


def rows_lag(tokens: TokenRows, arrays: Arrays) -> None:
    """Every routing row stands one row late: of sequences that lie end to end, cut one row too early."""
    bounds = tokens.sequence_bounds()
    for array in _routing(arrays):
        # the last row of a sequence has no route where it was sampled: the one before ends what was recorded
        before = [array[end - 2].copy() for _, end in (bounds[-1], *bounds[:-1])]
        for (start, end), first in zip(bounds, before, strict=True):
            array[start + 1 : end] = array[start : end - 1].copy()
            array[start] = first


def layers_lag(tokens: TokenRows, arrays: Arrays) -> None:
    """Every layer's record stands one layer late."""
    for array in _routing(arrays):
        array[:] = np.roll(array, 1, axis=1)


def other_routers_layer(tokens: TokenRows, arrays: Arrays) -> None:
    """The first layer holds what a router of the same habits chose for other tokens."""
    rows = _inner(tokens)
    others = np.random.default_rng(6).permutation(rows)
    for array in _routing(arrays):
        array[rows, 0] = array[others, 0]


def twin_layers(tokens: TokenRows, arrays: Arrays) -> None:
    """The last layer's slot holds the first layer's record."""
    for array in _routing(arrays):
        array[:, -1] = array[:, 0]


def never_bound(tokens: TokenRows, arrays: Arrays) -> None:
    """Every row of every layer names expert 0."""
    arrays["expert_ids_TLK"][_inner(tokens)] = 0


def zero_layer(tokens: TokenRows, arrays: Arrays) -> None:
    """One layer names expert 0 in every row."""
    arrays["expert_ids_TLK"][_inner(tokens), arrays["expert_ids_TLK"].shape[1] // 2] = 0


def zero_rows(tokens: TokenRows, arrays: Arrays) -> None:
    """A tenth of the rows names expert 0 alone."""
    arrays["expert_ids_TLK"][_drawn(tokens, 0.1)] = 0


def twice_named(tokens: TokenRows, arrays: Arrays) -> None:
    """A tenth of the rows names one expert twice in the first layer."""
    rows, ids_TLK = _drawn(tokens, 0.1), arrays["expert_ids_TLK"]
    ids_TLK[rows, 0, 1] = ids_TLK[rows, 0, 0]


def partial_rows(tokens: TokenRows, arrays: Arrays) -> None:
    """A tenth of the rows has no last expert in the last layer."""
    arrays["expert_ids_TLK"][_drawn(tokens, 0.1), -1, -1] = -1


def filler_rows(tokens: TokenRows, arrays: Arrays) -> None:
    """A sixth of the rows names experts 0 to K-1, of equal weights."""
    rows, top_k = _drawn(tokens, 0.15), arrays["expert_ids_TLK"].shape[2]
    arrays["expert_ids_TLK"][rows] = np.arange(top_k)
    for name, value in (("gate_weights_TLK", 1 / top_k), ("margin_TL", 0), ("logit_margin_TL", 0)):
        if name in arrays:
            arrays[name][rows] = value


def stale_rows(tokens: TokenRows, arrays: Arrays) -> None:
    """Two of three response rows hold the row before."""
    for rows in _responses(tokens):
        for row in rows[:-1]:
            if row % 3:
                for array in _routing(arrays):
                    array[row] = array[row - 1]


def stale_block(tokens: TokenRows, arrays: Arrays) -> None:
    """In every other sequence, one row stands in place of the twenty that follow it."""
    for rows in _responses(tokens)[::2]:
        for array in _routing(arrays):
            array[rows[3:23]] = array[rows[2]]


def doubled_rows(tokens: TokenRows, arrays: Arrays) -> None:
    """In every sequence, a block of rows stands twice: segments of an interrupted generation, joined."""
    for start, end in tokens.sequence_bounds():
        n = min(16, (end - 1 - start) // 2)
        for array in _routing(arrays):
            array[start + n : start + 2 * n] = array[start : start + n]


def rank_local(tokens: TokenRows, arrays: Arrays) -> None:
    """One rank of four kept its own rows."""
    _lose(arrays, np.flatnonzero(tokens.position_T % 4 != 1))


def cached_prefix(tokens: TokenRows, arrays: Arrays) -> None:
    """The first sixteen rows of every sequence but the first are missing: a cached block of a shared prefix."""
    _lose(arrays, np.flatnonzero((tokens.position_T < 16) & (tokens.seq_id_T != tokens.seq_id_T[0])))


def lost_rows(tokens: TokenRows, arrays: Arrays) -> None:
    """One row of a hundred is missing."""
    _lose(arrays, _drawn(tokens, 0.01))


def other_sequences_logps(tokens: TokenRows, arrays: Arrays) -> None:
    """Every sequence has its neighbour's log-probabilities."""
    rows = _responses(tokens)
    for own, other in zip(rows, [arrays["logp_T"][one].copy() for one in [*rows[1:], rows[0]]], strict=True):
        arrays["logp_T"][own] = np.resize(other, len(own))


def other_sequences_rows(tokens: TokenRows, arrays: Arrays) -> None:
    """Two sequences have each other's routing rows."""
    (a, a_end), (b, b_end) = tokens.sequence_bounds()[:2]
    n = min(a_end - a, b_end - b) - 1
    for array in _routing(arrays):
        array[a : a + n], array[b : b + n] = array[b : b + n].copy(), array[a : a + n].copy()


def nan_rows(tokens: TokenRows, arrays: Arrays) -> None:
    """A tenth of the log-probabilities is NaN."""
    rows = _drawn(tokens, 0.1)
    arrays["logp_T"][rows[tokens.is_response_T[rows]]] = np.nan


def zero_tail(tokens: TokenRows, arrays: Arrays) -> None:
    """The last eighth of every response has log-probability 0."""
    for rows in _responses(tokens):
        arrays["logp_T"][rows[len(rows) - len(rows) // 8 :]] = 0


def bfloat16_logps(tokens: TokenRows, arrays: Arrays) -> None:
    """Log-probabilities are kept in bfloat16."""
    bits = np.ascontiguousarray(arrays["logp_T"]).view(np.uint32).astype(np.uint64)
    kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    arrays["logp_T"][:] = np.where(np.isnan(arrays["logp_T"]), np.nan, kept)


def nan_gates(tokens: TokenRows, arrays: Arrays) -> None:
    """A hundredth of the rows has gate weights of NaN."""
    arrays["gate_weights_TLK"][_drawn(tokens, 0.01)] = np.nan
