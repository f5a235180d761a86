"""The token frame: one row per response token, the base of every log-probability analysis.

Invariants:
    - routing arrays are read block by block and dropped; what stays is 56 bytes per token (``BYTES_PER_TOKEN``);
    - a token counts as *scored* when both arms gave a finite log-probability, here, in corrections and in series
      (:func:`~moediag.run.capture.is_scored`). NaN is "not scored"; an infinity is a defect to report, not a number
      (rule D31-impossible-logp): both are left out of every statistic and counted, never averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

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


@dataclass(frozen=True)
class Tokens:
    """The tokens of a frame that both arms scored: filter, differences, prompts and sequences, each computed once.

    T rows are scored tokens in the order of the frame, in float64 where they are log-probabilities; N rows are the
    frame's own.

    Args:
        frame: N response tokens: columns of frame ``tokens``, of which logp_train, logp_infer [nat] and prompt_id are
            always there.
    """

    frame: pd.DataFrame

    @classmethod
    def of(cls, tokens: AnyTokens) -> Tokens:
        """The view of a frame; a view is its own."""
        return tokens if isinstance(tokens, Tokens) else cls(tokens)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def is_scored_N(self) -> NDArray[np.bool_]:  # noqa: N802 - the legend suffix
        """Which rows both arms scored."""
        return is_scored(self.frame["logp_train"].to_numpy(), self.frame["logp_infer"].to_numpy())

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The frame's rows of scored tokens."""
        scored: pd.DataFrame = self.frame if self.is_scored_N.all() else self.frame.loc[self.is_scored_N]
        return scored

    def column(self, name: str) -> NDArray[Any]:
        """(T,) values of a column, in its own dtype."""
        return self.rows[name].to_numpy()

    @cached_property
    def logp_train_T(self) -> Float64:  # noqa: N802
        """Train's log-probabilities [nat]."""
        return self.column("logp_train").astype(np.float64)

    @cached_property
    def logp_infer_T(self) -> Float64:  # noqa: N802
        """Infer's log-probabilities [nat]."""
        return self.column("logp_infer").astype(np.float64)

    @cached_property
    def diff_T(self) -> Float64:  # noqa: N802
        """logp_train - logp_infer [nat]; 0 is perfect agreement."""
        return self.logp_train_T - self.logp_infer_T

    @cached_property
    def abs_diff_T(self) -> Float64:  # noqa: N802
        """abs(logp_diff) [nat]."""
        return np.abs(self.diff_T)

    @cached_property
    def diff_N(self) -> Float64:  # noqa: N802
        """logp_train - logp_infer of every row of the frame [nat]; NaN = not scored."""
        diff_N = np.full(len(self.frame), np.nan)
        diff_N[self.is_scored_N] = self.diff_T
        return diff_N

    @cached_property
    def _prompts(self) -> tuple[NDArray[Any], NDArray[np.intp]]:
        ids_C, row_T = np.unique(self.column("prompt_id"), return_inverse=True)
        return ids_C, row_T

    @property
    def prompt_row_T(self) -> NDArray[np.intp]:  # noqa: N802
        """0 .. C-1, the prompt of every token, ascending by prompt id."""
        return self._prompts[1]

    @property
    def n_prompts(self) -> int:
        """C: prompts with a scored token."""
        return len(self._prompts[0])

    def by_prompt(self, values_T: ArrayLike) -> Float64:
        """(C,) sums over the tokens of each prompt."""
        sums_C = np.bincount(self.prompt_row_T, weights=np.asarray(values_T, np.float64), minlength=self.n_prompts)
        return np.asarray(sums_C, dtype=np.float64)

    @cached_property
    def n_by_prompt(self) -> Float64:
        """(C,) tokens of each prompt."""
        return np.bincount(self.prompt_row_T, minlength=self.n_prompts).astype(np.float64)

    @cached_property
    def _sequences(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        _, first_S, row_T = np.unique(self.column("seq_id"), return_index=True, return_inverse=True)
        return first_S, row_T

    @property
    def row_T(self) -> NDArray[np.intp]:  # noqa: N802
        """0 .. S-1, the sequence of every token, ascending by sequence id."""
        return self._sequences[1]

    @property
    def n_sequences(self) -> int:
        """S: sequences with a scored token."""
        return len(self._sequences[0])

    def by_sequence(self, values_T: ArrayLike) -> Float64:
        """(S,) sums over the tokens of each sequence."""
        sums_S = np.bincount(self.row_T, weights=np.asarray(values_T, np.float64), minlength=self.n_sequences)
        return np.asarray(sums_S, dtype=np.float64)

    @cached_property
    def n_S(self) -> Float64:  # noqa: N802
        """Tokens of each sequence."""
        return np.bincount(self.row_T, minlength=self.n_sequences).astype(np.float64)

    @cached_property
    def diff_S(self) -> Float64:  # noqa: N802
        """Log of each sequence's product ratio: the sum of its differences [nat]."""
        return self.by_sequence(self.diff_T)

    @cached_property
    def prompt_row_S(self) -> NDArray[np.intp]:  # noqa: N802
        """0 .. C-1, the prompt of each sequence."""
        return self.prompt_row_T[self._sequences[0]]


AnyTokens = pd.DataFrame | Tokens
"""A token frame, or its view where several statistics share it."""


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
