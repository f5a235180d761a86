"""Alignment: two captures of the same tokens become a pair, token by token.

Invariants:
    - only :func:`align` makes a :class:`PairBlock` from captures, and it refuses other tokens;
    - a block holds *response* tokens only; its routing arrays hold each token's **routing row**, the row of
      the token before it (see :mod:`moediag.notation`), so index t means the same token everywhere;
    - the sign is train minus infer whatever the order the arms were requested in. For two arms of one
      side, the first requested plays ``train`` (the minuend) and the second ``infer``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moediag.errors import AlignmentError
from moediag.notation import NOT_ROUTED
from moediag.run.capture import Capture, Float32, Int16, Int32, Int64, TokenRows

_NO_ROW: Final = -1


@dataclass(frozen=True)
class PairBlock:
    """Aligned response tokens of whole sequences; T counts response tokens.

    Args:
        seq_id_T, prompt_id_T, sample_index_T: whose token it is.
        position_T: position in the response, 0 = first response token; tool tokens count, though they are not here.
        token_id_T: the token scored; -1 = its id is not known.
        logp_train_T, logp_infer_T: log-probability of that token given its prefix [nat]; NaN = not scored.
        entropy_train_T, entropy_infer_T: entropy of the next-token distribution [nat]; NaN = not to be had.
        expert_ids_train_TLK, expert_ids_infer_TLK: experts used while consuming the token before; -1 = none.
        gate_weights_*_TLK, margin_*_TL, logit_margin_*_TL: as in :class:`~moediag.run.capture.Capture`.
        router_logits_*_TLE: raw router logits, where both captures kept them and they were requested.
    """

    seq_id_T: Int64
    prompt_id_T: Int64
    sample_index_T: Int32
    position_T: Int32
    token_id_T: Int64
    logp_train_T: Float32
    logp_infer_T: Float32
    entropy_train_T: Float32
    entropy_infer_T: Float32
    expert_ids_train_TLK: Int16 | None = None
    expert_ids_infer_TLK: Int16 | None = None
    gate_weights_train_TLK: Float32 | None = None
    gate_weights_infer_TLK: Float32 | None = None
    margin_train_TL: Float32 | None = None
    margin_infer_TL: Float32 | None = None
    logit_margin_train_TL: Float32 | None = None
    logit_margin_infer_TL: Float32 | None = None
    router_logits_train_TLE: Float32 | None = None
    router_logits_infer_TLE: Float32 | None = None

    def __len__(self) -> int:
        return len(self.seq_id_T)


@dataclass(frozen=True)
class Pair:
    """Two arms of one run, read block by block in bounded memory.

    Args:
        name: e.g. ``infer~train``.
        minuend, subtrahend: arm names; ``logp_diff`` = minuend - subtrahend.
        decoder_layer_L: decoder layer of every MoE layer; empty for a dense model.
        n_experts, top_k: E and K, 0 for a dense model.
        read_blocks: gives a fresh iterator over the blocks, in shard order.
        left_out: what cannot be compared (``routing``) -> why.
    """

    name: str
    minuend: str
    subtrahend: str
    decoder_layer_L: tuple[int, ...]
    n_experts: int
    top_k: int
    read_blocks: Callable[[], Iterator[PairBlock]]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def is_routed(self) -> bool:
        """True when both arms have routing rows."""
        return bool(self.decoder_layer_L)

    @property
    def n_layers(self) -> int:
        """L, the number of MoE layers."""
        return len(self.decoder_layer_L)

    def blocks(self) -> Iterator[PairBlock]:
        """Iterate over the aligned blocks; may be called again for another pass."""
        return self.read_blocks()


def align(tokens: TokenRows, train: Capture, infer: Capture, where: str, with_logits: bool = False) -> PairBlock:
    """Align two captures of the same token rows, keeping the response tokens under the loss mask.

    Args:
        tokens: the T token rows that both captures scored.
        train: minuend capture, rows as in ``tokens``.
        infer: subtrahend capture, rows as in ``tokens``.
        where: what is aligned, for the error message.
        with_logits: copy router logits, too: E numbers per choice that only predictions of flips read.

    Raises:
        AlignmentError: row counts differ, or one capture is routed and the other is not.
    """
    for side, capture in (("train", train), ("infer", infer)):
        if len(capture.logp_T) != len(tokens):
            raise AlignmentError(
                f"{where}: the {side} capture has {len(capture.logp_T)} rows for {len(tokens)} tokens; capture it again"
            )
    if train.is_routed != infer.is_routed:
        raise AlignmentError(f"{where}: one capture has expert ids and the other has none; were they the same model?")
    row_T = np.flatnonzero(tokens.is_scored_T)
    # A sequence whose prompt is not known begins with its response: nothing routed its first token that is known of.
    routing_row_T = np.where(tokens.position_T[row_T] > 0, row_T - 1, _NO_ROW)
    begins_T = tokens.is_response_T & (np.r_[True, ~tokens.is_response_T[:-1]] | (tokens.position_T == 0))
    first_response_T = np.maximum.accumulate(np.where(begins_T, np.arange(len(tokens)), 0))[row_T]
    return PairBlock(
        seq_id_T=tokens.seq_id_T[row_T],
        prompt_id_T=tokens.prompt_id_T[row_T],
        sample_index_T=tokens.sample_index_T[row_T],
        position_T=(row_T - first_response_T).astype(np.int32),
        token_id_T=tokens.token_id_T[row_T],
        logp_train_T=train.logp_T[row_T],
        logp_infer_T=infer.logp_T[row_T],
        entropy_train_T=_entropies(train, row_T),
        entropy_infer_T=_entropies(infer, row_T),
        expert_ids_train_TLK=_rows(train.expert_ids_TLK, routing_row_T),
        expert_ids_infer_TLK=_rows(infer.expert_ids_TLK, routing_row_T),
        gate_weights_train_TLK=_rows(train.gate_weights_TLK, routing_row_T),
        gate_weights_infer_TLK=_rows(infer.gate_weights_TLK, routing_row_T),
        margin_train_TL=_rows(train.margin_TL, routing_row_T),
        margin_infer_TL=_rows(infer.margin_TL, routing_row_T),
        logit_margin_train_TL=_rows(train.logit_margin_TL, routing_row_T),
        logit_margin_infer_TL=_rows(infer.logit_margin_TL, routing_row_T),
        router_logits_train_TLE=_rows(train.router_logits_TLE, routing_row_T) if with_logits else None,
        router_logits_infer_TLE=_rows(infer.router_logits_TLE, routing_row_T) if with_logits else None,
    )


def _entropies(capture: Capture, row_T: Int64) -> Float32:
    if capture.entropy_T is None:
        return np.full(len(row_T), np.nan, np.float32)
    return capture.entropy_T[row_T]


def _rows(array: NDArray[Any] | None, row_T: Int64) -> NDArray[Any] | None:
    if array is None:
        return None
    rows = array[row_T]
    absent_T = row_T == _NO_ROW
    if absent_T.any():
        rows[absent_T] = NOT_ROUTED if np.issubdtype(array.dtype, np.integer) else np.nan
    return rows
