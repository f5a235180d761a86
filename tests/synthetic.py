"""Synthetic pairs with known content: the seam where tests stand in for two engines."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np

from moediag.run.align import Pair, PairBlock


def make_block(
    n_prompts: int = 12,
    samples: int = 2,
    length: int = 20,
    n_layers: int = 3,
    n_experts: int = 8,
    top_k: int = 2,
    flip_noise: float = 0.1,
    diff_scale: float = 0.05,
    seed: int = 0,
    dense: bool = False,
    first_prompt: int = 0,
) -> PairBlock:
    """One block of whole sequences; experts are the top-K of noisy logits, margins are those of the logits."""
    rng = np.random.default_rng(seed)
    n_sequences = n_prompts * samples
    length_S = rng.integers(max(1, length // 2), length + 1, n_sequences)
    sequence_T = np.repeat(np.arange(n_sequences), length_S)
    n_tokens = len(sequence_T)
    logp_infer_T = -rng.exponential(1.0, n_tokens)
    diff_T = diff_scale * rng.standard_t(3, n_tokens)
    routing = {} if dense else _routing(rng, n_tokens, n_layers, n_experts, top_k, flip_noise)
    return PairBlock(
        seq_id_T=(sequence_T + first_prompt * samples).astype(np.int64),
        prompt_id_T=(sequence_T // samples + first_prompt).astype(np.int64),
        sample_index_T=(sequence_T % samples).astype(np.int32),
        position_T=(np.concatenate([np.arange(n) for n in length_S]) if n_tokens else np.zeros(0)).astype(np.int32),
        token_id_T=rng.integers(0, 1000, n_tokens),
        logp_train_T=(logp_infer_T + diff_T).astype(np.float32),
        logp_infer_T=logp_infer_T.astype(np.float32),
        entropy_train_T=np.full(n_tokens, np.nan, np.float32),
        entropy_infer_T=np.full(n_tokens, np.nan, np.float32),
        **routing,
    )


def _routing(
    rng: np.random.Generator, n_tokens: int, n_layers: int, n_experts: int, top_k: int, noise: float
) -> dict[str, Any]:
    logits = rng.normal(size=(n_tokens, n_layers, n_experts))
    routing: dict[str, Any] = {}
    for side, scores in (("infer", logits), ("train", logits + noise * rng.normal(size=logits.shape))):
        order = np.argsort(-scores, axis=2)
        ids = order[:, :, :top_k]
        ranked = np.take_along_axis(scores, order, axis=2)
        edge = ranked[:, :, top_k] if top_k < n_experts else np.full(ranked.shape[:2], -np.inf)
        margin = (ranked[:, :, top_k - 1] - edge).astype(np.float32)
        weights = np.exp(ranked[:, :, :top_k])
        routing[f"expert_ids_{side}_TLK"] = ids.astype(np.int16)
        routing[f"gate_weights_{side}_TLK"] = (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)
        routing[f"margin_{side}_TL"] = margin / 4
        routing[f"logit_margin_{side}_TL"] = margin
    return routing


def make_pair(*blocks: PairBlock, n_experts: int = 8) -> Pair:
    """A pair over blocks; layers and K are read off the first block."""
    ids = blocks[0].expert_ids_infer_TLK if blocks else None
    n_layers, top_k = (0, 0) if ids is None else ids.shape[1:]
    return Pair(
        name="infer~train",
        minuend="train",
        subtrahend="infer",
        decoder_layer_L=tuple(range(1, n_layers + 1)),
        n_experts=n_experts if n_layers else 0,
        top_k=top_k,
        read_blocks=lambda: iter(blocks),
    )


def swapped(block: PairBlock) -> PairBlock:
    """The block with the two sides exchanged."""
    other = {"train": "infer", "infer": "train"}
    changes = {}
    for field in fields(block):
        for side, opposite in other.items():
            if f"_{side}_" in field.name:
                changes[field.name] = getattr(block, field.name.replace(side, opposite))
    return replace(block, **changes)


def self_block(block: PairBlock) -> PairBlock:
    """The infer arm against itself."""
    other = swapped(block)
    changes = {f.name: getattr(other, f.name) for f in fields(block) if "_train_" in f.name}
    return replace(block, **changes)


def take(block: PairBlock, rows: Any) -> PairBlock:
    """The block with its token rows selected or reordered."""
    present = {f.name: getattr(block, f.name) for f in fields(block) if getattr(block, f.name) is not None}
    return replace(block, **{name: value[rows] for name, value in present.items()})
