"""Dumps that moediag did not make, in vLLM's own words, as token rows and captures for the same rules.

One row (or JSON line) per sequence: ``prompt_token_ids``, ``token_ids`` (the response), optionally ``logprobs`` (one
float per response token) and ``routed_experts`` ([n_rows][L][K], vLLM's ``CompletionOutput.routed_experts``: rows =
prompt + response - 1), and the same of the other side as ``train_logprobs``, ``train_routed_experts``,
``train_prompt_token_ids``, ``train_token_ids``; ``prompt_id`` where several rows are samples of one prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moediag.errors import DumpError
from moediag.hygiene.check import Inspection, check_capture, check_pair
from moediag.hygiene.findings import Finding, Place, by_level, finding
from moediag.hygiene.rules import RULES
from moediag.notation import INFER, NOT_ROUTED, TRAIN
from moediag.run.capture import Capture, TokenRows

_SIDES = {INFER: ("logprobs", "routed_experts"), TRAIN: ("train_logprobs", "train_routed_experts")}
_CONTEXT = 3


@dataclass(frozen=True)
class Dump:
    """A foreign capture: token rows, a capture per side that is there, and what tells the sides' tokens apart."""

    tokens: TokenRows
    captures: dict[str, Capture]
    n_experts: int
    differing: list[Finding]


def check_dump(path: Path, n_experts: int | None = None, first_row: int = 0) -> Inspection:
    """Apply the rules to a dump; see the module's docstring for its columns.

    Args:
        path: ``.parquet``, or JSON lines.
        n_experts: E; None = the largest id + 1, which keeps ids >= E from being seen.
        first_row: position of the first routing row in its sequence (1 where a begin-of-text row was left out).

    Raises:
        DumpError: not such a dump; names the row and the column.
    """
    dump = read_dump(path, n_experts, first_row)
    found = list(dump.differing)
    for arm, capture in dump.captures.items():
        alone = check_capture(dump.tokens, capture, n_experts=dump.n_experts, arm=arm)
        is_scored = bool(np.isfinite(capture.logp_T).any())  # a side without any logprobs was dumped without them
        found += [item for item in alone if is_scored or item.rule != "D31-nan-logp"]
    if set(dump.captures) == set(_SIDES) and not dump.differing:
        train, infer = dump.captures[TRAIN], dump.captures[INFER]
        if train.is_routed == infer.is_routed:
            found += check_pair(dump.tokens, train, infer, n_experts=dump.n_experts)
    return Inspection(by_level(found), len(RULES), len(dump.tokens) * len(dump.captures))


def read_dump(path: Path, n_experts: int | None = None, first_row: int = 0) -> Dump:
    """Read a dump into token rows and captures.

    Raises:
        DumpError: not such a dump; names the row and the column.
    """
    records = list(_records(path))
    if not records:
        raise DumpError(f"{path} holds no sequence; wanted one row per sequence")
    prompts, responses = (_token_lists(path, records, name) for name in ("prompt_token_ids", "token_ids"))
    tokens = _token_rows(path, records, prompts, responses)
    captures = {}
    for arm, (logprobs, routed) in _SIDES.items():
        if any(record.get(name) is not None for record in records for name in (logprobs, routed)):
            captures[arm] = Capture(
                logp_T=_logps(path, records, tokens, logprobs),
                entropy_T=np.full(len(tokens), np.nan, np.float32),
                expert_ids_TLK=_expert_ids(path, records, tokens, routed, first_row),
            )
    if not captures:
        raise DumpError(f"{path} has neither logprobs nor routed_experts; nothing to check")
    ids = [capture.expert_ids_TLK for capture in captures.values() if capture.expert_ids_TLK is not None]
    largest = max((int(array.max(initial=NOT_ROUTED)) for array in ids), default=NOT_ROUTED)
    top_k = max((array.shape[2] for array in ids), default=0)
    n_experts = (max(largest + 1, top_k) if n_experts is None else n_experts) if ids else 0
    return Dump(tokens, captures, n_experts, _differing_tokens(path, records, prompts, responses))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            yield from pq.read_table(path).to_pylist()
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise DumpError(f"{path} line {number}: wanted a JSON object, found {type(record).__name__}")
                yield record
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DumpError(f"{path} cannot be read as a dump: {error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, DumpError):
            raise
        raise DumpError(f"{path} line {number}: no JSON ({error}); wanted JSON lines or .parquet") from None


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
            raise DumpError(
                f"{path} sequence {i}: {name} has {len(rows)} rows from row {first_row} for {end - start} tokens; "
                "wanted prompt + response - 1 (see --first-row)"
            )
        if np.abs(rows).max() > np.iinfo(np.int16).max:
            raise DumpError(f"{path} sequence {i}: {name} holds {rows.max()}, which is no expert id")
        ids_TLK[start + first_row : start + first_row + len(rows)] = rows
    return ids_TLK


def _array(path: Path, sequence: int, name: str, value: Any, dtype: Any) -> NDArray[Any]:
    try:
        return np.array(value, dtype=dtype)
    except (ValueError, TypeError, OverflowError):
        message = f"{path} sequence {sequence}: {name} is no regular list of numbers: {_short(value)}"
        raise DumpError(message) from None


def _differing_tokens(
    path: Path, records: list[dict[str, Any]], prompts: list[NDArray[np.int64]], responses: list[NDArray[np.int64]]
) -> list[Finding]:
    """D32: the first token id that differs, with its neighbours on both sides."""
    places, first = [], ""
    n_compared = 0
    for i, record in enumerate(records):
        if record.get("train_token_ids") is None and record.get("train_prompt_token_ids") is None:
            continue
        n_compared += 1
        ours = np.r_[prompts[i], responses[i]]
        prompt = record.get("train_prompt_token_ids") or prompts[i].tolist()
        other = _array(
            path, i, "train_token_ids", [*prompt, *(record.get("train_token_ids") or responses[i])], np.int64
        )
        shared = min(len(ours), len(other))
        differ = np.flatnonzero(ours[:shared] != other[:shared])
        if not len(differ) and len(ours) == len(other):
            continue
        at = int(differ[0]) if len(differ) else shared
        places.append(Place(i, at))
        around = slice(max(0, at - _CONTEXT), at + _CONTEXT + 1)
        first = first or f"infer ... {ours[around].tolist()}, train ... {other[around].tolist()}"
    if not places:
        return []
    message = f"{len(places):,} of {n_compared:,} sequences have other token ids on the train side: {first}"
    return [
        finding("D32-token-ids", f"{INFER}~{TRAIN}", message, n=len(places), n_of=n_compared, places=tuple(places[:5]))
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
