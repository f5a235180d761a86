"""From what taps kept to the arrays of a capture, for all engines: margins, the order of the token table, completeness.

Levels say how much is kept: ``ids`` (expert ids only), ``margins`` (ids, gate weights and both margins, the
default), ``full`` (router logits as well). Margins are computed from the unrounded logits before those are dropped;
where no rule is shown there are none, and the logits are kept in their place.

Invariants: every position of a sequence that the engine consumed has exactly one row in every layer; a row
that was computed again (preemption) counts once, the first; token ids must be those of the token table.
Nothing incomplete ever becomes a :class:`Capture`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moediag.engines.routers import UNKNOWN, ModelRouting, margins
from moediag.errors import CaptureError
from moediag.notation import NOT_ROUTED
from moediag.run.capture import Capture, TokenRows

if TYPE_CHECKING:
    import torch

IDS, MARGINS, FULL = "ids", "margins", "full"

EFFECTIVE, EFFECTIVE_ON_INPUT = "effective", "effective, on the expert's input"
"""What arm.json says of gate weights: the coefficient with which an expert's output enters the block's output, after
normalisation and scaling, wherever the engine applies them; or the factor of its input (llama4). Arms of earlier
versions say nothing: there vLLM's lack a factor that is applied after the experts."""

_CHUNK = 1024  # rows whose margins are computed at a time: 1024 x 48 layers x 128 experts x 4 B = 25 MB per temporary

ROUTING = ("expert_ids_TLK", "gate_weights_TLK", "margin_TL", "logit_margin_TL", "router_logits_TLE")


def kept_by(level: str) -> tuple[str, ...]:
    """What the taps have to copy at a level: ``ids``, ``weights``, ``logits``."""
    return ("ids",) if level == IDS else ("ids", "weights", "logits")


def gate_weights_words(level: str, spec: ModelRouting, on_input: bool) -> str | None:
    """What arm.json says of an arm's gate weights; None where none are kept, or no formula explains them."""
    if level == IDS or spec.gate == UNKNOWN:
        return None
    return EFFECTIVE_ON_INPUT if on_input else EFFECTIVE


def routing_arrays(
    kept: dict[str, torch.Tensor], spec: ModelRouting, bias_LE: torch.Tensor | None, level: str
) -> dict[str, torch.Tensor]:
    """Arrays of a capture, on the host.

    Args:
        kept: ``ids`` (L, N, K) and, above level ``ids``, ``weights`` (L, N, K) and ``logits`` (L, N, E), layers first.
        bias_LE: correction bias per MoE layer; needed where the family has one.
        level: ``ids``, ``margins`` or ``full``.

    Returns:
        Arrays by legend name, rows first.
    """
    import torch

    rows = {"expert_ids_TLK": kept["ids"].to(torch.int16)}
    if level != IDS:
        rows["gate_weights_TLK"] = kept["weights"]
        if spec.has_rule:
            rows["margin_TL"], rows["logit_margin_TL"] = _margins(kept["logits"], kept["ids"], spec, bias_LE)
    if level == FULL or (level != IDS and not spec.has_rule):
        rows["router_logits_TLE"] = kept["logits"]
    return {name: row.transpose(0, 1).to("cpu", copy=True).contiguous() for name, row in rows.items()}


def _margins(
    logits_LNE: torch.Tensor, ids_LNK: torch.Tensor, spec: ModelRouting, bias_LE: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    bias = None if bias_LE is None else bias_LE[:, None].to(logits_LNE.device)
    chunks = [slice(first, first + _CHUNK) for first in range(0, logits_LNE.shape[1], _CHUNK)]
    parts = [margins(logits_LNE[:, chunk], ids_LNK[:, chunk], spec, bias) for chunk in chunks]
    return torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts], dim=1)


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
    return {name: _placed(rows[name], source_T, target_T, len(tokens)) for name in ROUTING if name in rows}


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
