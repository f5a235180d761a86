"""Rows as an engine's steps gave them, put in the order of the token table, and asserted complete.

Invariants: every position of a sequence that the engine consumed has exactly one row in every layer; a row
that was computed again (preemption) counts once, the first; token ids must be those of the token table.
Nothing incomplete ever becomes a :class:`Capture`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moediag.errors import CaptureError
from moediag.notation import NOT_ROUTED
from moediag.run.capture import Capture, TokenRows

_ROUTING = ("expert_ids_TLK", "gate_weights_TLK", "margin_TL", "logit_margin_TL", "router_logits_TLE")


def token_rows(seq_ids: range, samples: list[tuple[int, int, list[int], list[int]]]) -> TokenRows:
    """Token table of sequences given as (prompt_id, sample_index, prompt ids, response ids)."""
    lengths = [len(prompt) + len(response) for _, _, prompt, response in samples]
    repeat = np.repeat
    return TokenRows(
        seq_id_T=repeat(np.array(seq_ids, dtype=np.int64), lengths),
        prompt_id_T=repeat(np.array([s[0] for s in samples], dtype=np.int64), lengths),
        sample_index_T=repeat(np.array([s[1] for s in samples], dtype=np.int32), lengths),
        position_T=_joined([np.arange(n, dtype=np.int32) for n in lengths], np.int32),
        token_id_T=_joined([np.array([*s[2], *s[3]], dtype=np.int64) for s in samples], np.int64),
        is_response_T=_joined([np.arange(n) >= len(s[2]) for n, s in zip(lengths, samples, strict=True)], np.bool_),
    )


def order_rows(
    tokens: TokenRows, rows: dict[str, NDArray[Any]], request_seq_ids: list[int], needs_last_row: bool
) -> dict[str, NDArray[Any]]:
    """Put an engine's rows in the order of the token table.

    Args:
        rows: ``request_T``, ``position_T``, ``token_id_T`` and routing arrays, in the engine's order.
        request_seq_ids: sequence id of every request number.
        needs_last_row: False when the engine never consumed the last token of a sequence (it was sampled).

    Returns:
        The routing arrays, one row per token row; ids -1 and scores NaN where there is no row.

    Raises:
        CaptureError: a row is missing, or was computed for another token.
    """
    seq_T = np.array(request_seq_ids, dtype=np.int64)[rows["request_T"]]
    target_T = _target_rows(tokens, seq_T, rows["position_T"])
    source_T = np.flatnonzero(target_T >= 0)
    # np.unique keeps the first occurrence: a preempted request's recomputed rows come later.
    target_T, first = np.unique(target_T[source_T], return_index=True)
    source_T = source_T[first]
    _check_identity(tokens, rows["token_id_T"][source_T], target_T)
    _check_complete(tokens, target_T, needs_last_row)
    return {name: _placed(rows[name], source_T, target_T, len(tokens)) for name in _ROUTING if name in rows}


def recomputed_rows(tokens: TokenRows, rows: dict[str, NDArray[Any]], request_seq_ids: list[int]) -> dict[str, int]:
    """How many rows the engine computed more than once (preemption), and for how many of them it chose otherwise.

    The first computation is the one behind the sampled token; what came later rebuilt the KV cache.
    """
    seq_T = np.array(request_seq_ids, dtype=np.int64)[rows["request_T"]]
    target_T = _target_rows(tokens, seq_T, rows["position_T"])
    _, first, inverse = np.unique(target_T, return_index=True, return_inverse=True)
    is_again_T = (first[inverse] != np.arange(len(target_T))) & (target_T >= 0)
    n_otherwise = 0
    if "expert_ids_TLK" in rows and is_again_T.any():
        sets_TLK = np.sort(rows["expert_ids_TLK"], axis=2)
        n_otherwise = int((sets_TLK[is_again_T] != sets_TLK[first[inverse][is_again_T]]).any(axis=(1, 2)).sum())
    return {"n_rows_recomputed": int(is_again_T.sum()), "n_recomputed_otherwise": n_otherwise}


def capture_of(logp_T: NDArray[Any], entropy_T: NDArray[Any] | None, routing: dict[str, NDArray[Any]]) -> Capture:
    """A capture in memory dtypes from an engine's arrays."""
    scores = {name: array.astype(np.float32) for name, array in routing.items() if name != "expert_ids_TLK"}
    ids = routing.get("expert_ids_TLK")
    return Capture(
        logp_T=logp_T.astype(np.float32),
        entropy_T=None if entropy_T is None else entropy_T.astype(np.float32),
        expert_ids_TLK=None if ids is None else ids.astype(np.int16),
        **scores,
    )


def _target_rows(tokens: TokenRows, seq_N: NDArray[Any], position_N: NDArray[Any]) -> NDArray[Any]:
    """Row of the token table for each (sequence, position); -1 where the table has none."""
    start_S, end_S = np.array(tokens.sequence_bounds(), dtype=np.int64).reshape(-1, 2).T
    which_N = np.searchsorted(tokens.seq_id_T[start_S], seq_N)
    target_N = start_S[which_N] + position_N
    return np.where(target_N < end_S[which_N], target_N, -1)


def _check_identity(tokens: TokenRows, token_id_N: NDArray[Any], target_N: NDArray[Any]) -> None:
    differ = np.flatnonzero(tokens.token_id_T[target_N] != token_id_N)
    if len(differ):
        row = int(target_N[differ[0]])
        raise CaptureError(
            f"the engine consumed other tokens than it returned: {len(differ)} rows differ, first in sequence "
            f"{tokens.seq_id_T[row]} at position {tokens.position_T[row]}; nothing was stored"
        )


def _check_complete(tokens: TokenRows, target_N: NDArray[Any], needs_last_row: bool) -> None:
    needed_T = np.ones(len(tokens), dtype=bool)
    if not needs_last_row:
        needed_T[[end - 1 for _, end in tokens.sequence_bounds()]] = False
    needed_T[target_N] = False
    missing = np.flatnonzero(needed_T)
    if len(missing):
        row = int(missing[0])
        raise CaptureError(
            f"incomplete capture: {len(missing)} of {len(tokens)} rows were never seen, first in sequence "
            f"{tokens.seq_id_T[row]} at position {tokens.position_T[row]} (graphs, prefix cache or another "
            "code path bypassed the taps); nothing was stored"
        )


def _placed(array: NDArray[Any], source_N: NDArray[Any], target_N: NDArray[Any], n_rows: int) -> NDArray[Any]:
    fill = NOT_ROUTED if np.issubdtype(array.dtype, np.integer) else np.nan
    placed = np.full((n_rows, *array.shape[1:]), fill, dtype=array.dtype)
    placed[target_N] = array[source_N]
    return placed


def _joined(parts: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
