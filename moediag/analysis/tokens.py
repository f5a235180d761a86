"""The token frame: one row per response token, the base of every log-probability analysis.

Invariants:
    - routing arrays are read block by block and dropped; what stays is 56 bytes per token (``BYTES_PER_TOKEN``);
    - a token counts as *scored* when both arms gave a finite log-probability, here, in corrections and in series
      (:func:`~moediag.run.capture.is_scored`). NaN is "not scored"; an infinity is a defect to report, not a number
      (rule D31-impossible-logp): both are left out of every statistic and counted, never averaged.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import TOKENS
from moediag.analysis.expert_sets import NOT_COMPARED, ExpertComparison, compare_block
from moediag.analysis.routing_counts import MisroutedMass, misrouted_mass
from moediag.run.align import Pair, PairBlock
from moediag.run.capture import is_scored

Float64 = NDArray[np.float64]

BYTES_PER_TOKEN: Final = sum(np.dtype(column.dtype).itemsize for column in TOKENS.columns)
"""What a token keeps once its block is gone; 64 is the most allowed."""


def token_frame(pair: Pair) -> pd.DataFrame:
    """One row per response token of the pair, in shard order.

    Args:
        pair: two aligned arms; blocks are read once.

    Returns:
        Frame ``tokens``; log-probabilities and entropies in nat, NaN = not scored.
    """
    return concatenate_tokens([token_columns(block, compare_block(block)) for block in pair.blocks()])


def concatenate_tokens(parts: list[dict[str, NDArray[Any]]]) -> pd.DataFrame:
    """The token frame of blocks' columns as :func:`token_columns` gives them; no block, no rows.

    The parts are emptied column by column as they are joined, so that the tokens are never held twice.
    """
    columns = {}
    for column in TOKENS.columns:
        taken = [part.pop(column.name) for part in parts]
        columns[column.name] = np.concatenate(taken) if taken else np.zeros(0, column.dtype)
    return TOKENS.validate(pd.DataFrame(columns, copy=False))


def scored_tokens(tokens: pd.DataFrame) -> pd.DataFrame:
    """The rows of a token frame that both arms scored (finite log-probabilities)."""
    scored: pd.DataFrame = tokens.loc[is_scored(tokens["logp_train"].to_numpy(), tokens["logp_infer"].to_numpy())]
    return scored


def logp_diff(tokens: pd.DataFrame) -> Float64:
    """logp_train - logp_infer of every row in float64 [nat]; 0 is perfect agreement."""
    train_T = tokens["logp_train"].to_numpy().astype(np.float64)
    with np.errstate(invalid="ignore"):  # -inf on both sides is no number, and not scored
        return np.asarray(train_T - tokens["logp_infer"].to_numpy().astype(np.float64))


def token_columns(
    block: PairBlock, seen: ExpertComparison | None, mass: MisroutedMass | None = None
) -> dict[str, NDArray[Any]]:
    """Columns of frame ``tokens`` for one block, in their final dtypes.

    Args:
        block: aligned response tokens.
        seen: its expert comparison; None = dense, or no expert ids.
        mass: its misrouted mass, where it is at hand already.
    """
    n_flipped_T, first_T = _flipped_layers(len(block), seen)
    mass_T = np.full(len(block), np.nan, np.float32)
    if seen is not None:
        mass_T = (mass or misrouted_mass(block, seen)).by_token(seen)
    columns = {
        "seq_id": block.seq_id_T,
        "prompt_id": block.prompt_id_T,
        "sample_index": block.sample_index_T,
        "position": block.position_T,
        "token_id": block.token_id_T,
        "logp_train": block.logp_train_T,
        "logp_infer": block.logp_infer_T,
        "entropy_train": block.entropy_train_T,
        "entropy_infer": block.entropy_infer_T,
        "n_flipped_layers": n_flipped_T,
        "first_flipped_layer": first_T,
        "misrouted_mass": mass_T,
    }
    return {column.name: np.asarray(columns[column.name], column.dtype) for column in TOKENS.columns}


def _flipped_layers(n_tokens: int, seen: ExpertComparison | None) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """(number of flipped layers, first of them) per token; -1 for rows not routed in every layer."""
    absent_T = np.full(n_tokens, NOT_COMPARED, dtype=np.int16)
    if seen is None or not seen.shape[1]:
        return absent_T, absent_T
    # a row known in some layers only would count too few flips: it belongs to neither group
    complete_T, n_flipped_T = seen.is_complete_T, seen.n_flipped_T
    n_known_T = np.where(complete_T, n_flipped_T, NOT_COMPARED).astype(np.int16)
    first_T = np.where(complete_T & (n_flipped_T > 0), seen.first_flip_T, NOT_COMPARED).astype(np.int16)
    return n_known_T, first_T
