"""Dumps of one row per sequence, in vLLM's own words, as token rows and a capture per side.

One row (or JSON line) per sequence: ``prompt_token_ids``, ``token_ids`` (the response), optionally ``logprobs`` (one
float per response token) and ``routed_experts`` ([n_rows][L][K], vLLM's ``CompletionOutput.routed_experts``: rows =
prompt + response - 1), and the same of the other side as ``train_logprobs``, ``train_routed_experts``,
``train_prompt_token_ids``, ``train_token_ids``; ``prompt_id`` where several rows are samples of one prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moediag.errors import DumpError
from moediag.importers.tables import json_records, readable
from moediag.notation import INFER, NOT_ROUTED, TRAIN
from moediag.run.capture import Capture, TokenRows

_SIDES = {INFER: ("logprobs", "routed_experts"), TRAIN: ("train_logprobs", "train_routed_experts")}
_TRAIN_TOKENS = ("train_token_ids", "train_prompt_token_ids")
_MOST_DENSE = 4
"""Dense layers in a row: published models have up to 3 in front (DeepSeek-V3, GLM-4.5) or 4 (Step-3), or one between
two MoE layers. A longer block of zeros is another pipeline rank's."""

_LEAST_SEGMENT = 4
_LEAST_REPEATED = 0.5
"""Share of a segment's rows that must come again for it to be called repeated: a row computed anew may flip."""


@dataclass(frozen=True)
class Dump:
    """Sequences that another tool captured: token rows, and a capture per side that is there.

    Args:
        captures: arm -> its arrays, without slots of dense layers.
        n_experts: E.
        is_dense_L: arm -> which of the dump's layers are slots of dense layers.
        train_token_ids: sequence -> its token ids on the train side, of sequences that have ids of their own there.
    """

    tokens: TokenRows
    captures: dict[str, Capture]
    n_experts: int
    is_dense_L: dict[str, NDArray[np.bool_]]
    train_token_ids: dict[int, NDArray[np.int64]]


def is_sequence_table(names: Collection[str]) -> bool:
    """Whether columns are those of a dump of one row per sequence."""
    return "token_ids" in names or "prompt_token_ids" in names


def read_sequences(path: Path, n_experts: int | None = None, first_row: int = 0) -> Dump:
    """Read a dump into token rows and captures; see the module's docstring for its columns.

    Args:
        path: ``.parquet``, else JSON lines.
        n_experts: E; None = the largest id + 1, which keeps ids >= E from being seen.
        first_row: position of the first routing row in its sequence (1 where a begin-of-text row was left out).

    Raises:
        DumpError: not such a dump; names the row and the column.
    """
    with readable(path):
        records = pq.read_table(path).to_pylist() if path.suffix == ".parquet" else list(json_records(path))
    if not records:
        raise DumpError(f"{path} holds no sequence; expected one row per sequence")
    prompts, responses = (_token_lists(path, records, name) for name in ("prompt_token_ids", "token_ids"))
    tokens = _token_rows(path, records, prompts, responses)
    captures = {}
    for arm, (logprobs, routed) in _SIDES.items():
        if any(record.get(name) is not None for record in records for name in (logprobs, routed)):
            captures[arm] = Capture(
                logp_T=_logps(path, records, tokens, logprobs),
                expert_ids_TLK=_expert_ids(path, records, tokens, routed, first_row),
            )
    if not captures:
        raise DumpError(f"{path} has neither logprobs nor routed_experts; nothing to check")
    is_dense_L = dense_layers(
        {arm: zero_layers(one.expert_ids_TLK) for arm, one in captures.items() if one.expert_ids_TLK is not None}
    )
    for arm, dense_L in is_dense_L.items():
        ids_TLK = captures[arm].expert_ids_TLK
        assert ids_TLK is not None
        captures[arm] = replace(captures[arm], expert_ids_TLK=ids_TLK[:, ~dense_L])
    ids = [capture.expert_ids_TLK for capture in captures.values() if capture.expert_ids_TLK is not None]
    largest = max((int(array.max(initial=NOT_ROUTED)) for array in ids), default=NOT_ROUTED)
    top_k = max((array.shape[2] for array in ids), default=0)
    n_experts = (max(largest + 1, top_k) if n_experts is None else n_experts) if ids else 0
    return Dump(tokens, captures, n_experts, is_dense_L, _train_token_ids(path, records, prompts, responses))


def total_experts(n_experts: int | None, n_zero_experts: int) -> int | None:
    """Ids that a router may give: its experts', and behind them those of zero experts.

    Raises:
        DumpError: zero experts without the number of the others.
    """
    if n_experts is None and n_zero_experts:
        raise DumpError("--zero-experts needs --num-experts: their ids are those behind the experts'")
    return None if n_experts is None else n_experts + n_zero_experts


def _token_lists(path: Path, records: list[dict[str, Any]], name: str) -> list[NDArray[np.int64]]:
    lists = []
    for i, record in enumerate(records):
        value = record.get(name)
        if not isinstance(value, list) or not value or not all(type(token) is int for token in value):
            raise DumpError(f"{path} sequence {i}: {name} should be a list of token ids, found {_short(value)}")
        lists.append(_array(path, i, name, value, np.int64))
    return lists


def _token_rows(
    path: Path, records: list[dict[str, Any]], prompts: list[NDArray[np.int64]], responses: list[NDArray[np.int64]]
) -> TokenRows:
    prompt_ids, samples = [], []
    numbers: dict[Any, int] = {}
    for i, (record, prompt) in enumerate(zip(records, prompts, strict=True)):
        key = record.get("prompt_id", prompt.tobytes())  # rows with the same prompt are samples of it
        if isinstance(key, list | dict):
            raise DumpError(f"{path} sequence {i}: prompt_id should be a number or text, found {_short(key)}")
        prompt_ids.append(numbers.setdefault(key, len(numbers)))
        samples.append(prompt_ids[:-1].count(prompt_ids[-1]))
    length_S = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    return TokenRows(
        seq_id_T=np.repeat(np.arange(len(records)), length_S).astype(np.int64),
        prompt_id_T=np.repeat(prompt_ids, length_S).astype(np.int64),
        sample_index_T=np.repeat(samples, length_S).astype(np.int32),
        position_T=np.concatenate([np.arange(n) for n in length_S]).astype(np.int32),
        token_id_T=np.concatenate([np.r_[p, r] for p, r in zip(prompts, responses, strict=True)]),
        is_response_T=np.concatenate([np.arange(n) >= len(p) for n, p in zip(length_S, prompts, strict=True)]),
    )


def _logps(path: Path, records: list[dict[str, Any]], tokens: TokenRows, name: str) -> NDArray[np.float32]:
    logp_T = np.full(len(tokens), np.nan, np.float32)
    for i, (start, end) in enumerate(tokens.sequence_bounds()):
        value = records[i].get(name)
        if value is None:
            continue
        n_response = int(tokens.is_response_T[start:end].sum())
        if not isinstance(value, list) or len(value) != n_response:
            raise DumpError(
                f"{path} sequence {i}: {name} should hold one number per response token ({n_response}), "
                f"found {_short(value)}"
            )
        logp_T[end - n_response : end] = _array(path, i, name, value, np.float64)
    return logp_T


def _expert_ids(
    path: Path, records: list[dict[str, Any]], tokens: TokenRows, name: str, first_row: int
) -> NDArray[np.int16] | None:
    ids_TLK: NDArray[np.int16] | None = None
    for i, (start, end) in enumerate(tokens.sequence_bounds()):
        value = records[i].get(name)
        if value is None:
            continue
        rows = _array(path, i, name, value, np.int64)
        if rows.ndim != 3 or not rows.size:
            raise DumpError(f"{path} sequence {i}: {name} should be [rows][layers][K], found shape {rows.shape}")
        if ids_TLK is None:
            ids_TLK = np.full((len(tokens), *rows.shape[1:]), NOT_ROUTED, np.int16)
        if rows.shape[1:] != ids_TLK.shape[1:]:
            raise DumpError(
                f"{path} sequence {i}: {name} has (L, K) = {rows.shape[1:]}, the first one {ids_TLK.shape[1:]}"
            )
        if start + first_row + len(rows) > end:
            expected = "expected prompt + response - 1 (see --first-row)"
            raise DumpError(
                f"{path} sequence {i}: {name} has {len(rows)} rows from row {first_row} for {end - start} tokens; "
                f"{repeated_rows(rows, end - start - 1 - first_row) or expected}"
            )
        if np.abs(rows).max() > np.iinfo(np.int16).max:
            raise DumpError(f"{path} sequence {i}: {name} holds {no_id(int(rows.flat[np.abs(rows).argmax()]))}")
        ids_TLK[start + first_row : start + first_row + len(rows)] = rows
    return ids_TLK


def dense_layers(zeros: Mapping[str, NDArray[np.bool_]]) -> dict[str, NDArray[np.bool_]]:
    """Slots of dense layers by side: layers that are expert 0 in every row, where K > 1.

    A layer that only one of two equally deep sides lacks is no dense one, nor is a long block of them, nor all layers:
    those stay, for D03 to name.

    Args:
        zeros: side -> its :func:`zero_layers`.

    Returns:
        The sides that have such slots.
    """
    if len({len(zero_L) for zero_L in zeros.values()}) == 1 and len(zeros) > 1:
        zeros = dict.fromkeys(zeros, np.logical_and(*zeros.values()))
    return {
        side: zero_L
        for side, zero_L in zeros.items()
        if zero_L.any() and not zero_L.all() and _longest(zero_L) <= _MOST_DENSE
    }


def zero_layers(ids_TLK: NDArray[np.int16]) -> NDArray[np.bool_]:
    """(L,) Layers that hold nothing but expert 0 in every row that is there; none where K = 1."""
    present_T = (ids_TLK != NOT_ROUTED).any(axis=(1, 2))
    if ids_TLK.shape[2] == 1 or not present_T.any():
        return np.zeros(ids_TLK.shape[1], dtype=np.bool_)
    return np.asarray((ids_TLK[present_T] == 0).all(axis=(0, 2)))


def _longest(hit_L: NDArray[np.bool_]) -> int:
    """Longest run of hits."""
    return int(np.diff(np.flatnonzero(np.r_[True, ~hit_L, True])).max() - 1)


def repeated_rows(rows: NDArray[Any], n_expected: int) -> str:
    """More rows than expected that hold the first ones twice: a generation that was interrupted, and stored once per
    segment, in words; empty where they do not."""
    seam = len(rows) - n_expected
    n = min(seam, n_expected)
    if n < _LEAST_SEGMENT:
        return ""
    same = (rows[:n] == rows[seam : seam + n]).reshape(n, -1).all(axis=1)
    if same.mean() < _LEAST_REPEATED:
        return ""
    return (
        f"rows {seam}..{seam + n - 1} repeat rows 0..{n - 1}: segments of a generation that was interrupted and "
        f"resumed were joined, each with the whole sequence so far; keep the last {n_expected} rows"
    )


def no_id(value: int) -> str:
    """A value beyond any expert id, and what its bytes look like."""
    if value in (2**16 - 1, 2**32 - 1):
        return f"{value}, which is -1 (not routed) in an unsigned type; store -1, or leave the row out"
    if not 0 <= value < 2**63:
        return f"{value}, which is no expert id"
    size = 4 if value < 2**31 else 8
    held = value.to_bytes(size, "little")
    if size == 8 and value % 2**32 < 2**15:
        read, width, ids = "int64", "int32", [value % 2**32, value >> 32]
    elif not any(held[1::2]):
        read, width, ids = f"int{8 * size}", "uint16", [int(byte) for byte in held[::2]]
    else:
        read, width, ids = f"int{8 * size}", "uint8", list(held)
    return (
        f"{value}, which is no expert id: bytes {list(held)}, as {len(ids)} {width} ids read as one {read}; read the "
        "payload in the width that its sender declares (SGLang: routed_experts_dtype)"
    )


def _array(path: Path, sequence: int, name: str, value: Any, dtype: Any) -> NDArray[Any]:
    try:
        return np.array(value, dtype=dtype)
    except (ValueError, TypeError, OverflowError):
        message = f"{path} sequence {sequence}: {name} is no regular list of numbers: {_short(value)}"
        raise DumpError(message) from None


def _train_token_ids(
    path: Path, records: list[dict[str, Any]], prompts: list[NDArray[np.int64]], responses: list[NDArray[np.int64]]
) -> dict[int, NDArray[np.int64]]:
    """The train side's token ids of sequences that have any; what it leaves out is as on the infer side."""
    found = {}
    for i, record in enumerate(records):
        if any(record.get(name) is not None for name in _TRAIN_TOKENS):
            prompt = record.get("train_prompt_token_ids") or prompts[i].tolist()
            response = record.get("train_token_ids") or responses[i]
            found[i] = _array(path, i, "train_token_ids", [*prompt, *response], np.int64)
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
