"""Response tokens of whole sequences in canonical order: what statistics of corrections are computed from.

Invariants:
    - rows are ordered by (sequence, position) and a sequence's rows stand together, so a chunk of whole sequences is a
      slice, no index is needed, and nothing depends on how a table happened to be sorted;
    - chunks are views: going through a batch costs no memory beyond the chunk's own terms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moediag.corrections.terms import Float64, Terms
from moediag.errors import MoediagError
from moediag.run.capture import is_scored

CHUNK_TOKENS: Final = 65_536
"""Half a megabyte per float64 array: a chunk's dozen arrays stay in the second-level cache."""


@dataclass(frozen=True)
class Batch:
    """Response tokens of S whole sequences of C prompts.

    Args:
        logp_train_T, logp_infer_T: log-probabilities at theta_old [nat]; not finite = not scored.
        row_T: 0 .. S-1, the sequence of every token; ascending, every sequence has at least one row.
        seq_id_S: id of every sequence.
        prompt_row_S: 0 .. C-1, the prompt of every sequence.
        position_T: position of every token in its response.
        advantage_T: advantage of every token [1]; None = not known.
        entropy_T: next-token entropy on the infer side [nat]; NaN = not known.
        logp_train_new_T: log-probabilities of the policy being trained, pi_train(theta) [nat].
        n_flipped_layers_T: MoE layers whose expert set differs behind the token; -1 = not known.
        reward_S: reward of every sequence [1].

    Raises:
        MoediagError: arrays that do not fit each other, or rows out of order.
    """

    logp_train_T: Float64
    logp_infer_T: Float64
    row_T: NDArray[np.intp]
    seq_id_S: NDArray[Any]
    prompt_row_S: NDArray[np.intp]
    position_T: NDArray[np.int64]
    advantage_T: Float64 | None = None
    entropy_T: Float64 | None = None
    logp_train_new_T: Float64 | None = None
    n_flipped_layers_T: NDArray[np.int64] | None = None
    reward_S: Float64 | None = None

    def __post_init__(self) -> None:
        for letter, n_rows in (("T", len(self.row_T)), ("S", len(self.seq_id_S))):
            for name, array in self._arrays(letter):
                if array.shape != (n_rows,):
                    raise MoediagError(f"a batch wants {name} of shape ({n_rows},), found {array.shape}")
        step_T = np.diff(self.row_T)
        n_seen = int(self.row_T[-1]) + 1 if len(self) else 0
        if n_seen != len(self.seq_id_S) or (len(self) and self.row_T[0] != 0) or ((step_T != 0) & (step_T != 1)).any():
            raise MoediagError(
                "a batch wants row_T to count 0, 0, ..., S-1 without a gap: sort by sequence and position"
            )

    def __len__(self) -> int:
        return len(self.row_T)

    @property
    def n_sequences(self) -> int:
        """S."""
        return len(self.seq_id_S)

    @cached_property
    def n_prompts(self) -> int:
        """C: prompts with a sequence."""
        return len(np.unique(self.prompt_row_S))

    @cached_property
    def start_S(self) -> NDArray[np.intp]:  # noqa: N802 - the legend suffix
        """First row of every sequence."""
        return np.searchsorted(self.row_T, np.arange(self.n_sequences)).astype(np.intp)

    @cached_property
    def is_scored_T(self) -> NDArray[np.bool_]:  # noqa: N802
        """Which tokens have a ratio: both log-probabilities are finite."""
        return is_scored(self.logp_train_T, self.logp_infer_T)

    @cached_property
    def is_scored_S(self) -> NDArray[np.bool_]:  # noqa: N802
        """Which sequences have a scored token."""
        return np.bincount(self.row_T[self.is_scored_T], minlength=self.n_sequences) > 0

    @property
    def n_scored_prompts(self) -> int:
        """Prompts with a scored token."""
        return len(np.unique(self.prompt_row_S[self.is_scored_S]))

    def chunks(self, n_tokens: int = CHUNK_TOKENS) -> Iterator[Batch]:
        """Parts of whole sequences with about ``n_tokens`` tokens each, and at least one sequence.

        Prompts keep their numbers, so sums by prompt can be added up over the parts.
        """
        start_S = np.append(self.start_S, len(self))
        first = 0
        while first < self.n_sequences:
            last = int(np.searchsorted(start_S, start_S[first] + n_tokens, side="right")) - 1
            last = min(max(last, first + 1), self.n_sequences)
            yield self._part(slice(first, last), slice(int(start_S[first]), int(start_S[last])))
            first = last

    def scored(self) -> tuple[Terms, NDArray[np.bool_]]:
        """Terms of the scored tokens, and which rows these are.

        Raises:
            MoediagError: a scored token whose advantage is not a number.
        """
        is_scored_T = self.is_scored_T
        some = slice(None) if is_scored_T.all() else is_scored_T
        advantage_T = None if self.advantage_T is None else self.advantage_T[some]
        if advantage_T is not None and not np.isfinite(advantage_T).all():
            raise MoediagError(
                f"{int((~np.isfinite(advantage_T)).sum())} scored tokens have an advantage that is not a number: leave "
                "their sequences out, or give no advantages"
            )
        arrays = (self.logp_train_T[some], self.logp_infer_T[some], self.row_T[some])
        return Terms(*arrays, self.n_sequences, advantage_T), is_scored_T

    def _arrays(self, letter: str) -> list[tuple[str, NDArray[Any]]]:
        named = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, array) for name, array in named if array is not None and name.endswith(f"_{letter}")]

    def _part(self, sequences: slice, rows: slice) -> Batch:
        parts = {name: array[sequences] for name, array in self._arrays("S")}
        parts |= {name: array[rows] for name, array in self._arrays("T")}
        parts["row_T"] = parts["row_T"] - sequences.start
        return replace(self, **parts)
