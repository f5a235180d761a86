"""Which rows of a table are trained response tokens: loss masks under the frameworks' own names.

Invariants:
    - a mask that a known framework wrote is used, or the table is refused: it is never passed over;
    - a token mask says which tokens count; factors (a mask of whole sequences, of tool results) multiply it;
    - what no mask rules out and looks like padding is a finding, with the count.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moediag.errors import DumpError
from moediag.hygiene.chance import ALPHA
from moediag.hygiene.findings import Finding
from moediag.hygiene.rules import WARNING

Bool = NDArray[np.bool_]

TOKEN_MASKS: Final = {
    "is_response": "moediag",
    "is_trained": "moediag",
    "response_mask": "verl, SkyRL",
    "completion_mask": "TRL",
    "loss_mask": "prime-rl, slime, miles, SkyRL, AReaL, verl",
    "loss_masks": "slime, miles",
    "token_mask": "NeMo-RL",
    "token_loss_mask": "NeMo-RL",
    "action_mask": "OpenRLHF",
}
"""Column -> who calls the mask of trained response tokens so."""

FACTORS: Final = {
    "sample_mask": "NeMo-RL",
    "sample_loss_mask": "NeMo-RL",
    "tool_mask": "TRL",
    "env_mask": "TRL",
}
"""Column -> who multiplies the token mask by it: NeMo-RL's masks of whole sequences (token_mask * sample_mask), and
TRL's of tool results (completion_mask * tool_mask; env_mask is its name in rollout functions)."""


@dataclass(frozen=True)
class LossMasks:
    """The mask columns of a table.

    Args:
        token: masks of tokens, of which one counts.
        factors: masks that multiply it.
        where: the table, for messages.
        advice: what to do where token masks differ.
    """

    token: tuple[str, ...]
    factors: tuple[str, ...]
    where: str
    advice: str

    @classmethod
    def among(
        cls, names: Collection[str], where: str, asked: str | None = None, advice: str = "keep one of them"
    ) -> LossMasks:
        """The masks among a table's columns.

        Args:
            asked: the token mask to use; None = the known one.

        Raises:
            DumpError: there is no column ``asked``.
        """
        if asked is not None and asked not in names:
            raise DumpError(f"{where} has no column {asked} to mask with; found {', '.join(names)}")
        token = (asked,) if asked is not None else tuple(name for name in TOKEN_MASKS if name in names)
        return cls(token, tuple(name for name in FACTORS if name in names and name != asked), where, advice)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read, as flags."""
        return (*self.token, *self.factors)

    def response(self, flags: dict[str, Bool]) -> tuple[Bool | None, tuple[str, ...]]:
        """Which rows are trained response tokens, and what was taken for that; None = the table does not say.

        Raises:
            DumpError: two token masks that differ.
        """
        if not self.columns:
            return None, ()
        for other in self.token[1:]:
            is_other_T = flags[other] != flags[self.token[0]]
            if is_other_T.any():
                raise DumpError(
                    f"{self.where}: the loss masks {self.token[0]} and {other} differ in {int(is_other_T.sum()):,} "
                    f"rows, first row {int(np.argmax(is_other_T))}; {self.advice}"
                )
        same = f" ({' and '.join(self.token)} are equal)" if len(self.token) > 1 else ""
        product = " * ".join([*self.token[:1], *self.factors])
        note = () if self.columns == ("is_response",) else (f"loss mask: {product}{same}",)
        return np.logical_and.reduce([flags[name] for name in self.columns]), note


def unmasked_padding(is_zero_T: Bool, start_S: NDArray[np.intp], where: str) -> list[Finding]:
    """Blocks of rows of exactly 0 on both sides at the ends of sequences, in a table that names no mask.

    Certain tokens are exactly 0 on both sides, too: a block counts when it is longer than such tokens, as often as they
    are elsewhere in these sequences, would make one in a million tables.

    Args:
        is_zero_T: whether both log-probabilities are exactly 0, as they were read; sequence by sequence, in order.
        start_S: first row of every sequence.
        where: the table.

    Source: ours; the million is that of every other rule (:data:`~moediag.hygiene.chance.ALPHA`).
    """
    here_T = np.arange(len(is_zero_T))
    end_S = np.append(start_S[1:], len(is_zero_T))
    first_S = np.minimum(np.minimum.reduceat(np.where(is_zero_T, len(here_T), here_T), start_S), end_S)
    last_S = np.maximum.reduceat(np.where(is_zero_T, -1, here_T), start_S)
    head_S, tail_S = first_S - start_S, np.where(first_S < end_S, end_S - 1 - last_S, 0)
    n_ends = int((head_S + tail_S).sum())
    rate = (is_zero_T.sum() - n_ends + 1) / (len(is_zero_T) - n_ends + 2)  # Laplace's: none seen is not never
    longest = int(max(head_S.max(), tail_S.max()))
    if longest < math.log(ALPHA / (2 * len(end_S))) / math.log(rate):
        return []
    message = (
        f"{n_ends:,} of {len(is_zero_T):,} rows are exactly 0 on both sides, in blocks of up to {longest:,} at the "
        "ends of sequences, and the table names no loss mask: prompt or padding counts as tokens in perfect agreement, "
        "and makes every mean and share too small; leave these rows out, or give their mask (is_response, or "
        "--mask COLUMN)"
    )
    return [Finding(WARNING, "D31-zero-logp", where, message, n=n_ends, n_of=len(is_zero_T))]
