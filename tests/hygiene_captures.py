"""Healthy captures of every shape that hygiene must stay quiet on, and the faults it must name.

A row is a function of its prefix, as in a model: samples of one prompt share the rows of what they share.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from records import arm_of, checkpoint_of, new_run

from moediag.hygiene import Finding, check_capture, check_pair
from moediag.run.capture import Capture, TokenRows, split_into_shards
from moediag.run.reader import Run, open_run
from moediag.run.records import RouterSpec
from moediag.run.writer import RunWriter

SHAPES = [  # (E, K, L)
    (8, 2, 3),
    (16, 4, 6),
    (4, 2, 1),
    (2, 1, 2),
    (4, 4, 3),
    (64, 8, 12),
    (128, 8, 48),
    (300, 6, 5),
    (8, 1, 1),
    (2, 1, 1),
    (3, 2, 4),
]
BIG = [shape for shape in SHAPES if shape[0] > shape[1] and shape[2] >= 3]


@dataclass(frozen=True)
class Healthy:
    """What a healthy pair is made of."""

    shape: tuple[int, int, int] = (8, 2, 3)
    n_prompts: int = 12
    samples: int = 1
    prompt_length: int = 12
    response_length: int = 24
    vocabulary: int = 50
    zipf: float = 0.0  # popularity of experts, logit of rank r = -zipf log r
    hot_pair: float = 0.0  # extra logit of experts 0 and 1
    certain_share: float = 0.1  # tokens with logp 0
    repeated_share: float = 0.1  # tokens equal to the one before
    greedy: bool = False  # samples of one prompt are copies
    same_prompts: bool = False
    memory: float = 0.3  # how much of the routing input is carried on from the token before
    by_token: float = 0.5  # how much depends on the token alone
    by_layer: float = 0.0  # how much all layers share: expert e of one layer goes with expert e of the next
    noise: float = 0.1  # of train's router logits
    logp_noise: float = 0.05
    renormalize: bool = True
    bf16: bool = True
    has_scores: bool = True
    has_logits: bool = False
    seed: int = 0


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def make(h: Healthy) -> tuple[TokenRows, Capture, Capture]:
    """(tokens, train, infer) of a healthy pair."""
    rng = np.random.default_rng(h.seed)
    n_experts, _, n_layers = h.shape
    embedding = rng.normal(size=(h.vocabulary, n_layers, n_experts))
    popularity = -h.zipf * np.log1p(np.argsort(rng.random((n_layers, n_experts)), axis=1))
    popularity[:, :2] += h.hot_pair
    parts: list[tuple[Any, ...]] = []
    for prompt_id in range(h.n_prompts):
        source = np.random.default_rng([h.seed, 0 if h.same_prompts else prompt_id])
        prompt = _tokens(source, h, max(1, int(source.integers(h.prompt_length // 2 + 1, h.prompt_length + 1))))
        state, prompt_logits = _logits(source, h, embedding, popularity, prompt, None)
        for sample in range(h.samples):
            own = source if sample == 0 else np.random.default_rng([h.seed, prompt_id, sample])
            own = np.random.default_rng([h.seed, 0 if h.same_prompts else prompt_id, 99]) if h.greedy else own
            response = _tokens(own, h, int(own.integers(h.response_length // 2 + 1, h.response_length + 1)))
            _, logits = _logits(own, h, embedding, popularity, response, state)
            logp = -own.exponential(1.0, len(response))
            logp[own.random(len(response)) < h.certain_share] = 0.0
            parts.append((prompt_id, sample, prompt, response, np.concatenate([prompt_logits, logits]), logp))
    return _assemble(h, parts)


def _tokens(rng: np.random.Generator, h: Healthy, n: int) -> np.ndarray:
    tokens = rng.integers(0, h.vocabulary, n)
    for i in np.flatnonzero(rng.random(n) < h.repeated_share):
        tokens[i] = tokens[max(0, i - 1)]
    return tokens


def _logits(
    rng: np.random.Generator, h: Healthy, embedding: Any, popularity: Any, tokens: Any, state: Any
) -> tuple[Any, np.ndarray]:
    rows = []
    for token in tokens:
        fresh = rng.normal(size=popularity.shape)
        fresh = np.sqrt(1 - h.by_layer**2) * fresh + h.by_layer * rng.normal(size=popularity.shape[1])
        state = fresh if state is None else h.memory * state + np.sqrt(1 - h.memory**2) * fresh
        rows.append(h.by_token * embedding[token] + (1 - h.by_token) * state + popularity)
    return state, np.array(rows)


def _assemble(h: Healthy, parts: list[tuple[Any, ...]]) -> tuple[TokenRows, Capture, Capture]:
    length = [len(prompt) + len(response) for _, _, prompt, response, _, _ in parts]
    tokens = TokenRows(
        seq_id_T=np.repeat(np.arange(len(parts)), length).astype(np.int64),
        prompt_id_T=np.repeat([part[0] for part in parts], length).astype(np.int64),
        sample_index_T=np.repeat([part[1] for part in parts], length).astype(np.int32),
        position_T=np.concatenate([np.arange(n) for n in length]).astype(np.int32),
        token_id_T=np.concatenate([np.r_[part[2], part[3]] for part in parts]).astype(np.int64),
        is_response_T=np.concatenate([np.arange(len(p[2]) + len(p[3])) >= len(p[2]) for p in parts]),
    )
    rng = np.random.default_rng([h.seed, 7])
    logits = np.concatenate([part[4] for part in parts])
    logp = np.concatenate([np.r_[np.full(len(part[2]), np.nan), part[5]] for part in parts])
    # noise moves the token's logit: a near-certain token stays near certain, and no logp leaves (-inf, 0]
    logit = np.where(logp == 0, 20.0, logp - np.log(np.maximum(-np.expm1(logp), 1e-9)))
    logit = np.where(np.isnan(logp), 0.0, logit)
    moved = -np.logaddexp(0, -(logit + h.logp_noise * rng.normal(size=len(logp))))
    moved[moved > -3e-8] = 0.0  # what float32 makes of it
    moved[np.isnan(logp)] = np.nan
    train = capture_of(h, tokens, logits + h.noise * rng.normal(size=logits.shape), moved)
    return tokens, train, capture_of(h, tokens, logits, logp, is_sampler=True)


def capture_of(
    h: Healthy, tokens: TokenRows, logits: np.ndarray, logp: np.ndarray, is_sampler: bool = False
) -> Capture:
    """What an engine with these router logits (T, L, E) and log-probabilities captures.

    Args:
        is_sampler: the last token of each sequence was never consumed, so that it has no route.
    """
    entropy = np.where(logp > -1e-6, 1e-5, np.abs(logp) + 0.1)
    n_experts, top_k, n_layers = h.shape
    capture = Capture(logp.astype(np.float32), entropy.astype(np.float32))
    if not n_layers:
        return capture
    logits = bf16(logits) if h.bf16 else logits.astype(np.float32)
    scores = np.exp(logits.astype(np.float64) - logits.max(axis=2, keepdims=True))
    scores = scores / scores.sum(axis=2, keepdims=True)
    order = np.argsort(-logits, axis=2, kind="stable")
    ids = order[:, :, :top_k].astype(np.int16)
    ranked, ranked_logits = (np.take_along_axis(a, order, axis=2) for a in (scores, logits))
    gates = ranked[:, :, :top_k] / (ranked[:, :, :top_k].sum(axis=2, keepdims=True) if h.renormalize else 1)
    if top_k < n_experts:
        margin, logit_margin = (a[:, :, top_k - 1] - a[:, :, top_k] for a in (ranked, ranked_logits))
    else:
        margin = logit_margin = np.full(ids.shape[:2], np.inf)
    capture = replace(capture, expert_ids_TLK=ids)
    if h.has_scores:
        capture = replace(
            capture,
            gate_weights_TLK=bf16(gates) if h.bf16 else gates.astype(np.float32),
            margin_TL=margin.astype(np.float32),
            logit_margin_TL=logit_margin.astype(np.float32),
            router_logits_TLE=logits.copy() if h.has_logits else None,
        )
    if is_sampler:
        ends = np.array([end - 1 for _, end in tokens.sequence_bounds()])
        for name, array in capture.arrays().items():
            if array.ndim > 1:
                array[ends] = -1 if name == "expert_ids_TLK" else np.nan
    return capture


def random_healthy(seed: int) -> Healthy:
    """One healthy pair of a random kind: shapes, popularity, certainty, repetition, samples, noise."""
    rng = np.random.default_rng([seed, 1])
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    pick = lambda *values: values[int(rng.integers(len(values)))]  # noqa: E731
    is_large = shape[0] * shape[2] > 1000
    return Healthy(
        shape=shape,
        n_prompts=pick(1, 3, 8) if is_large else pick(1, 2, 6, 20),
        samples=pick(1, 1, 2, 4),
        prompt_length=pick(3, 12) if is_large else pick(3, 12, 40),
        response_length=pick(4, 16) if is_large else pick(4, 16, 60),
        vocabulary=pick(3, 50, 1000) if not is_large else 50,
        zipf=pick(0.0, 0.5, 1.0, 2.0),
        hot_pair=pick(0.0, 0.0, 1.0, 3.0, 6.0),
        certain_share=pick(0.0, 0.1, 0.5, 0.95),
        repeated_share=pick(0.0, 0.1, 0.6),
        greedy=pick(False, False, True),
        same_prompts=pick(False, False, True),
        memory=pick(0.0, 0.3, 0.9),
        by_token=pick(0.0, 0.5, 0.9),
        by_layer=pick(0.0, 0.0, 0.5),
        noise=pick(0.0, 0.01, 0.3, 3.0),
        logp_noise=pick(0.0, 0.01, 0.3, 3.0),
        renormalize=pick(True, False),
        bf16=pick(True, True, False),
        has_scores=pick(True, True, False),
        has_logits=pick(False, True),
        seed=seed,
    )


def plant(
    fault: str, h: Healthy, tokens: TokenRows, train: Capture, infer: Capture
) -> tuple[TokenRows, Capture, Capture]:
    """The pair with one fault in it."""
    changed = {name: array.copy() for name, array in infer.arrays().items()}
    other = {name: array.copy() for name, array in train.arrays().items()}
    FAULTS[fault](h, tokens, changed, other)
    return tokens, Capture(**other), Capture(**changed)


def _routing_names(arrays: dict[str, Any]) -> list[str]:
    return [name for name, array in arrays.items() if array.ndim > 1]


def _moved_rows(tokens: TokenRows, array: np.ndarray, lag: int) -> np.ndarray:
    """Row t holds what row t - lag held, within sequences; the last come round to the front."""
    moved = array.copy()
    for start, end in tokens.sequence_bounds():
        moved[start:end] = np.roll(array[start:end], lag, axis=0)
    return moved


def _token_lag(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    for start, end in tokens.sequence_bounds():
        rows = start + np.flatnonzero(tokens.is_response_T[start:end])
        train["logp_T"][rows[1:]] = train["logp_T"][rows[:-1]].copy()


def _row_lag(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    for name in _routing_names(train):
        train[name] = _moved_rows(tokens, train[name], 1)


def _layer_lag(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    for name in _routing_names(train):
        train[name] = np.roll(train[name], 1, axis=1)


def _some(h: Healthy, tokens: TokenRows, share: float) -> np.ndarray:
    last = np.r_[tokens.seq_id_T[1:] != tokens.seq_id_T[:-1], True]
    return np.flatnonzero((np.random.default_rng([h.seed, 5]).random(len(tokens)) < share) & ~last)


def _duplicates(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    infer["expert_ids_TLK"][_some(h, tokens, 0.1), 0, 1] = infer["expert_ids_TLK"][_some(h, tokens, 0.1), 0, 0]


def _all_zero(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    infer["expert_ids_TLK"][_some(h, tokens, 0.1)] = 0


def _partial(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    infer["expert_ids_TLK"][_some(h, tokens, 0.1), -1, -1] = -1


def _range(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    infer["expert_ids_TLK"][_some(h, tokens, 0.1), :, -1] = h.shape[0]


def _filler(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    rows = _some(h, tokens, 0.15)
    infer["expert_ids_TLK"][rows] = np.arange(h.shape[1])
    for name, value in (
        ("gate_weights_TLK", 1 / h.shape[1]),
        ("margin_TL", 0),
        ("logit_margin_TL", 0),
        ("router_logits_TLE", 0),
    ):
        if name in infer:
            infer[name][rows] = (
                np.inf if name in ("margin_TL", "logit_margin_TL") and h.shape[0] == h.shape[1] else value
            )


def _filler_last(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    _filler(h, tokens, infer, train)
    infer["expert_ids_TLK"][_some(h, tokens, 0.15)] = np.arange(h.shape[0] - h.shape[1], h.shape[0])


def _stale(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    for start, end in tokens.sequence_bounds():
        for row in range(start + 1, end - 1):
            if tokens.is_response_T[row] and row % 3:
                for name in _routing_names(infer):
                    infer[name][row] = infer[name][row - 1]


def _stale_always(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    for start, end in tokens.sequence_bounds():
        for name in _routing_names(infer):
            infer[name][start : end - 1] = infer[name][start]


def _stale_block(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    for start, end in tokens.sequence_bounds():
        n = min(5, (end - 1 - start) // 2)
        for name in _routing_names(infer):
            infer[name][start + n : start + 2 * n] = infer[name][start : start + n]


def _absent(infer: Any, rows: np.ndarray) -> None:
    for name in _routing_names(infer):
        infer[name][rows] = -1 if name == "expert_ids_TLK" else np.nan


def _rank_strided(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    _absent(infer, tokens.position_T % 4 != 1)


def _rank_block(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    for start, end in tokens.sequence_bounds():
        half = (end - 1 - start) // 2
        _absent(infer, np.arange(start, start + half))


def _cached_prefix(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    _absent(infer, (tokens.position_T < 16) & (tokens.sample_index_T > 0))


def _logp(value: float) -> Any:
    def change(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
        rows = _some(h, tokens, 0.1)
        rows = np.r_[rows[tokens.is_response_T[rows]], len(tokens) - 1]
        infer["logp_T"][rows] = value

    return change


def _zero_tail(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    for start, end in tokens.sequence_bounds():
        rows = start + np.flatnonzero(tokens.is_response_T[start:end])
        infer["logp_T"][rows[len(rows) // 2 :]] = 0


def _zero_tail_and_entropy(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    _zero_tail(h, tokens, infer, train)
    infer["entropy_T"][(infer["logp_T"] == 0)] = 0


def _stored_in_16_bits(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    infer["logp_T"][:] = infer["logp_T"].astype(np.float16)


def _flat(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    layer = h.shape[2] // 2
    last = np.r_[tokens.seq_id_T[1:] != tokens.seq_id_T[:-1], True]
    infer["expert_ids_TLK"][~last, layer] = np.arange(h.shape[1])
    for name, value in (
        ("gate_weights_TLK", 1 / h.shape[1]),
        ("margin_TL", 0),
        ("logit_margin_TL", 0),
        ("router_logits_TLE", 0),
    ):
        if name in infer and not (name.endswith("margin_TL") and h.shape[0] == h.shape[1]):
            infer[name][~last, layer] = value


def _softmaxed(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    logits = infer["router_logits_TLE"]
    scores = np.exp(logits - logits.max(axis=2, keepdims=True))
    infer["router_logits_TLE"] = bf16(scores / scores.sum(axis=2, keepdims=True))
    ranked = -np.sort(-infer["router_logits_TLE"], axis=2)
    if h.shape[0] > h.shape[1]:  # a consumer of softmaxed logits takes its margins from them
        infer["logit_margin_TL"] = ranked[:, :, h.shape[1] - 1] - ranked[:, :, h.shape[1]]


def _other_sequence(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    response = [start + np.flatnonzero(tokens.is_response_T[start:end]) for start, end in tokens.sequence_bounds()]
    others = [train["logp_T"][rows].copy() for rows in [*response[1:], response[0]]]
    for rows, other in zip(response, others, strict=True):
        train["logp_T"][rows] = np.resize(other, len(rows))


def _temperature(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    train["logp_T"] /= np.float32(0.7)


def _inner_rows(tokens: TokenRows) -> np.ndarray:
    """Rows that have routing on both sides: all but the last of every sequence."""
    return np.flatnonzero(~np.r_[tokens.seq_id_T[1:] != tokens.seq_id_T[:-1], True])


def _layer_at_chance(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    rows = _inner_rows(tokens)
    others = np.random.default_rng([h.seed, 6]).permutation(rows)
    for name in _routing_names(infer):
        infer[name][rows, 0] = infer[name][others, 0]


def _twin_layers(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    for name in _routing_names(infer):
        infer[name][:, -1] = infer[name][:, 0]


def _counting(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    rows = _some(h, tokens, 0.15)
    n = h.shape[1] * h.shape[2]
    flat = np.arange(len(rows) * n) % h.shape[0]
    infer["expert_ids_TLK"][rows] = flat.reshape(len(rows), h.shape[2], h.shape[1])
    for name in ("gate_weights_TLK", "margin_TL", "logit_margin_TL", "router_logits_TLE"):
        infer.pop(name, None)  # a trainer fills ids alone


def _sentinel(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    infer["expert_ids_TLK"][_some(h, tokens, 0.1)] = 255


def _never_bound(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    infer["expert_ids_TLK"][_inner_rows(tokens)] = 0


def _zero_layer(h: Healthy, tokens: TokenRows, infer: Any, train: Any) -> None:
    infer["expert_ids_TLK"][_inner_rows(tokens), h.shape[2] // 2] = 0


FAULTS = {
    "D01-token-lag": _token_lag,
    "D01-other-sequence": _other_sequence,
    "D01-row-lag": _row_lag,
    "D02-layer-lag": _layer_lag,
    "D02-layer-at-chance": _layer_at_chance,
    "D02-twin-layers": _twin_layers,
    "D03-never-bound": _never_bound,
    "D03-zero-layer": _zero_layer,
    "D03-sentinel": _sentinel,
    "D03-duplicate-ids": _duplicates,
    "D03-all-zero": _all_zero,
    "D03-partial-row": _partial,
    "D03-id-range": _range,
    "D04-filler-rows": _filler,
    "D04-filler-rows last": _filler_last,
    "D04-filler-rows counting": _counting,
    "D05-stale-rows": _stale,
    "D05-stale-rows always": _stale_always,
    "D05-stale-rows block": _stale_block,
    "D07-rank-local strided": _rank_strided,
    "D07-rank-local block": _rank_block,
    "D08-cached-prefix": _cached_prefix,
    "D10-temperature": _temperature,
    "D31-nan-logp": _logp(np.nan),
    "D31-impossible-logp": _logp(-np.inf),
    "D31-impossible-logp above": _logp(0.5),
    "D31-zero-logp": _zero_tail,
    "D31-zero-logp and entropy": _zero_tail_and_entropy,
    "D34-flat-router": _flat,
    "rounded-logp": _stored_in_16_bits,
    "softmaxed-logits": _softmaxed,
}


def write_run(path: Path, h: Healthy, tokens: TokenRows, train: Capture, infer: Capture, shard_size: int = 3) -> Run:
    """The pair as a run directory, through the real store."""
    n_experts, top_k, n_layers = h.shape
    n_sequences = len(tokens.sequence_bounds())
    first_T = tokens.sample_index_T == 0
    prompts = [
        tokens.token_id_T[first_T & (tokens.prompt_id_T == i) & ~tokens.is_response_T].tolist()
        for i in range(h.n_prompts)
    ]
    sink = io.BytesIO()
    pd.DataFrame({"prompt_token_ids": prompts, "completion_token_ids": [None] * h.n_prompts}).to_parquet(sink)
    spec = None if h.renormalize is None else RouterSpec(
        family="tiny", score_function="softmax", has_correction_bias=False, n_group=1, topk_group=1, gate="scores",
        renormalize=h.renormalize, scaling_factor=1.0, n_shared_experts=0,
    )  # fmt: skip
    checkpoint = checkpoint_of(range(n_layers), n_experts, top_k, spec)
    shards = tuple(split_into_shards(n_sequences, shard_size))
    run = new_run(path, sink.getvalue(), h.n_prompts, 1, checkpoint, configuration={"seed": h.seed}, shards=shards)
    writer = RunWriter(run)
    for arm, capture in (("infer", infer), ("train", train)):
        writer.begin_arm(arm_of(run, arm, arrays=tuple(capture.arrays())))
        for shard in run.shards:
            keep_T = np.isin(tokens.seq_id_T, list(shard.seq_ids))
            part = rows_of(tokens, keep_T)
            writer.write_capture(arm, shard, part, arrays_of(capture, keep_T), {}, {})
            if arm == "infer":
                writer.write_tokens(shard, part)
    return open_run(path)


def records_of(tokens: TokenRows, train: Capture, infer: Capture, first_row: int = 0) -> list[dict[str, Any]]:
    """The pair as vLLM's own names have it; the last token has no row."""
    records = []
    for start, end in tokens.sequence_bounds():
        response = tokens.is_response_T[start:end]
        ids = tokens.token_id_T[start:end]
        record: dict[str, Any] = {
            "prompt_id": int(tokens.prompt_id_T[start]),
            "prompt_token_ids": ids[~response].tolist(),
            "token_ids": ids[response].tolist(),
        }
        for prefix, capture in (("", infer), ("train_", train)):
            record[f"{prefix}logprobs"] = capture.logp_T[start:end][response].astype(float).tolist()
            record[f"{prefix}routed_experts"] = capture.expert_ids_TLK[start + first_row : end - 1].tolist()  # type: ignore[index]
        records.append(record)
    return records


def write_dump(path: Path, records: list[dict[str, Any]]) -> Path:
    """A dump of one row per sequence."""
    if path.suffix == ".parquet":
        pd.DataFrame(records).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rows_of(tokens: TokenRows, rows: Any) -> TokenRows:
    """Token rows selected or reordered."""
    return TokenRows(**{name: None if value is None else value[rows] for name, value in vars(tokens).items()})


def arrays_of(capture: Capture, rows: Any) -> Capture:
    """A capture's rows selected or reordered."""
    return Capture(**{name: array[rows] for name, array in capture.arrays().items()})


def all_findings(h: Healthy, tokens: TokenRows, train: Capture, infer: Capture) -> list[Finding]:
    """What every rule says of a pair."""
    e, r = h.shape[0], h.renormalize
    found = check_capture(tokens, infer, n_experts=e, arm="infer", renormalize=r)
    found += check_capture(tokens, train, n_experts=e, arm="train", is_sampled=False, renormalize=r)
    return found + check_pair(tokens, train, infer, n_experts=e)
