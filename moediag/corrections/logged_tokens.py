"""Rows of a log brought into canonical order, response tokens only, with what no log holds refused.

Invariants:
    - every refusal is one line that counts the rows and names the first of them;
    - log-probabilities are taken as they are, but those above 0 by rounding, and what a reader has to know of them is
      said (:func:`checked_logps`, which series over steps use, too).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moediag.analysis.tokens import is_scored
from moediag.corrections.table_files import Columns, Ids
from moediag.errors import DumpError
from moediag.hygiene.logps import LARGEST_ROUNDED_LOGP

Float64 = NDArray[np.float64]

IS_RESPONSE: Final = "is_response"
LOGPS: Final[tuple[str, ...]] = ("logp_train", "logp_infer", "logp_train_new")

_N_LOOKED_AT: Final = 1000
_FEW: Final = 8
"""Different values that by chance are not all short: a float32 is a float16 once in 2^13."""


def canonical_order(columns: Columns, where: str) -> NDArray[np.intp]:
    """The order of rows by (sequence, position).

    Raises:
        DumpError: two rows of one place.
    """
    row_N, position_N = columns["seq_id"].row_T, columns["position"]
    order_N = np.arange(len(row_N))
    steps, forward = np.diff(row_N), np.diff(position_N)
    if not ((steps > 0) | ((steps == 0) & (forward > 0))).all():
        order_N = np.lexsort((position_N, row_N))
        steps, forward = np.diff(row_N[order_N]), np.diff(position_N[order_N])
        twice = np.flatnonzero((steps == 0) & (forward == 0))
        if len(twice):
            first = order_N[twice[0]]
            name = columns["seq_id"].values_N[row_N[first]]
            raise DumpError(
                f"{where}: {len(twice):,} rows stand at a place of another, first seq_id {name} position "
                f"{position_N[first]}; every (seq_id, position) wants one row"
            )
    if (row_N < 0).any():
        raise DumpError(f"{where}: {int((row_N < 0).sum()):,} rows have no seq_id")
    return order_N


def checked_logps(
    columns: Mapping[str, Float64], where: str, place: Callable[[NDArray[np.bool_]], str]
) -> tuple[dict[str, Float64], tuple[str, ...]]:
    """Log-probabilities of response tokens as they are to be used, and what a reader has to know of them.

    Args:
        columns: name -> values as they were read [nat]; ``logp_train`` and ``logp_infer`` among them.
        where: what they were read from.
        place: the first of some tokens, in words.

    Returns:
        The columns, with 0 for what is above 0 by rounding, and as float32 where the digits are float32's; and notes:
        rounded, impossible and coarse values.

    Raises:
        DumpError: log-probabilities that no model gives.
    """
    checked, notes = {}, []
    for name, values_T in columns.items():
        is_bad_T = values_T > LARGEST_ROUNDED_LOGP
        if is_bad_T.any():
            raise DumpError(
                f"{where}: {name} is above 0 in {int(is_bad_T.sum()):,} rows, first {place(is_bad_T)} "
                f"({values_T[is_bad_T][0]:g}); log-probabilities are at most 0: are these logits or probabilities?"
            )
        n_above = int((values_T > 0).sum())
        if n_above:
            notes.append(f"{n_above:,} of {len(values_T):,} {name} are above 0 by rounding, at most "
                         f"{values_T[values_T > 0].max():.2g} nat, and taken as 0")  # fmt: skip
        checked[name] = _float32_again(np.minimum(values_T, 0.0))
        if coarse := _coarse_words(checked[name]):
            notes.append(f"{name} {coarse}")
    is_inf_T = {side: np.isinf(checked[side]) for side in LOGPS[:2]}
    n_impossible = int(np.logical_or(*is_inf_T.values()).sum())
    if n_impossible:
        sides = ", ".join(f"{int(is_T.sum()):,} in {side}" for side, is_T in is_inf_T.items())
        notes.append(f"{n_impossible:,} of {len(is_inf_T[LOGPS[0]]):,} response tokens have a log-probability of -inf "
                     f"({sides}): a sampled token has no probability of 0, so they are left out of every statistic "
                     "and get weight 0 (D31-impossible-logp)")  # fmt: skip
    return checked, tuple(notes)


def _float32_again(values_T: Float64) -> Float64:
    """Float32 numbers that were written in their shortest digits (pandas' csv) as they were; others as they are."""
    known_T = values_T[np.isfinite(values_T)][:_N_LOOKED_AT]
    with np.errstate(over="ignore"):
        single_T = known_T.astype(np.float32)
        if [float(str(value)) for value in single_T] != known_T.tolist():
            return values_T
        return values_T.astype(np.float32).astype(np.float64)


def _coarse_words(values_T: Float64) -> str:
    """What format log-probabilities were stored in, if one that is too coarse for them; by the values, for a table of
    float64 tells of no rounding before."""
    known_T = values_T[np.isfinite(values_T) & (values_T != 0)]
    with np.errstate(over="ignore"):
        single_T = known_T.astype(np.float32)
        is_brain = not (single_T.view(np.uint32) & 0xFFFF).any() and (single_T == known_T).all()
        is_half = (known_T.astype(np.float16) == known_T).all()
    if not (is_brain or is_half) or len(np.unique(known_T[:_N_LOOKED_AT])) < _FEW:
        return ""
    name, step = ("bfloat16", 2.0**-5) if is_brain else ("float16", 2.0**-8)
    return (
        f"was stored in {name}: a step is {step:.2g} nat from -4 to -8 and {2 * step:.2g} nat from -8 to -16, so that "
        "differences of that size are rounding, not mismatch; export float32"
    )


@dataclass(frozen=True)
class LoggedTokens:
    """Response tokens in canonical order.

    Args:
        columns: all rows' columns; where: what they were read from, for messages.
        input_row_T: row of every token.
        row_T: 0 .. S-1, its sequence; seq_id_S: the sequence's name; start_S: its first token.
        logps: name -> log-probabilities of the tokens, as they are to be used.
        logp_notes: what there is to know of them.
    """

    columns: Columns
    where: str
    input_row_T: NDArray[np.intp]
    row_T: NDArray[np.intp]
    seq_id_S: NDArray[Any]
    start_S: NDArray[np.intp]
    logps: dict[str, Float64] = field(default_factory=dict)
    logp_notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, columns: Columns, where: str) -> LoggedTokens:
        """The response tokens among the rows.

        Raises:
            DumpError: two rows of one place, no response token, or log-probabilities that no model gives.
        """
        order_N = canonical_order(columns, where)
        if IS_RESPONSE in columns:
            order_N = order_N[columns[IS_RESPONSE][order_N]]
        if not len(order_N):
            raise DumpError(f"{where} holds no response token")
        sequences: Ids = columns["seq_id"]
        name_T = sequences.row_T[order_N]
        is_first_T = np.r_[True, np.diff(name_T) != 0]
        start_S = np.flatnonzero(is_first_T)
        row_T = np.cumsum(is_first_T) - 1
        tokens = cls(columns, where, order_N, row_T, sequences.values_N[name_T[start_S]], start_S)
        raw: dict[str, Float64] = {name: tokens.raw(name) for name in LOGPS if name in columns}
        logps, notes = checked_logps(raw, where, tokens.place)
        if not is_scored(logps["logp_train"], logps["logp_infer"]).any():
            raise DumpError(f"{where}: no response token has both log-probabilities; there is nothing to correct")
        return replace(tokens, logps=logps, logp_notes=notes)

    def get(self, name: str) -> NDArray[Any] | None:
        """A column's values of the tokens; None where there is none."""
        return self.columns[name][self.input_row_T] if name in self.columns else None

    def raw(self, name: str) -> Float64:
        """A column that is there, as it is in the table, as float64."""
        return np.asarray(self.columns[name][self.input_row_T], dtype=np.float64)

    @property
    def is_scored_T(self) -> NDArray[np.bool_]:  # noqa: N802 - the legend suffix
        """Tokens that have a ratio."""
        return is_scored(self.logps["logp_train"], self.logps["logp_infer"])

    @property
    def is_zero_T(self) -> NDArray[np.bool_]:  # noqa: N802 - the legend suffix
        """Tokens whose log-probabilities are exactly 0 on both sides in the table; one that was rounded to 0 is not."""
        return np.asarray((self.raw("logp_train") == 0) & (self.raw("logp_infer") == 0))

    @property
    def position_T(self) -> NDArray[np.int64]:  # noqa: N802 - the legend suffix
        """Position in the response, 0 = first response token."""
        position_T = np.asarray(self.columns["position"])[self.input_row_T].astype(np.int64)
        return np.asarray(position_T - position_T[self.start_S][self.row_T])

    @property
    def prompt_row_S(self) -> NDArray[np.intp]:  # noqa: N802
        """0 .. C-1, the prompt of every sequence; every sequence its own where no prompt is known."""
        if "prompt_id" not in self.columns:
            return np.arange(len(self.seq_id_S))
        row_T = self.columns["prompt_id"].row_T[self.input_row_T]
        return np.asarray(np.unique(self._constant(row_T, "prompt_id"), return_inverse=True)[1], dtype=np.intp)

    def notes(self) -> tuple[str, ...]:
        """What a reader has to know of these rows."""
        said = []
        n_rows, n_tokens = len(self.columns["position"]), len(self.row_T)
        if n_rows > n_tokens:
            said.append(f"{n_rows - n_tokens:,} of {n_rows:,} rows are no response token (weight 0)")
        n_unscored = int(np.logical_or.reduce([np.isnan(self.logps[name]) for name in LOGPS[:2]]).sum())
        if n_unscored:
            said.append(f"{n_unscored:,} of {n_tokens:,} response tokens lack a log-probability (not scored, weight 0)")
        said += self.logp_notes
        if "prompt_id" not in self.columns:
            said.append("no prompt_id: every sequence counts as a prompt of its own, which makes intervals too short "
                        "where several are samples of one prompt")  # fmt: skip
        return tuple(said)

    def place(self, is_T: NDArray[np.bool_]) -> str:
        """The first of some tokens, in words."""
        first = int(np.argmax(is_T))
        position = self.columns["position"][self.input_row_T[first]]
        return f"seq_id {self.seq_id_S[self.row_T[first]]} position {position}"

    def by_sequence(self, name: str) -> Float64:
        """A number that is the same for all tokens of a sequence.

        Raises:
            DumpError: it changes within one, or is missing.
        """
        values_T = self.raw(name)
        if not np.isfinite(values_T).all():
            is_bad_T = ~np.isfinite(values_T)
            raise DumpError(
                f"{self.where}: {name} is missing in {int(is_bad_T.sum()):,} rows, first {self.place(is_bad_T)}"
            )
        return self._constant(values_T, name)

    def _constant(self, values_T: NDArray[Any], name: str) -> NDArray[Any]:
        value_S: NDArray[Any] = values_T[self.start_S]
        is_other_T = values_T != value_S[self.row_T]
        if is_other_T.any():
            raise DumpError(
                f"{self.where}: {name} changes within {len(np.unique(self.row_T[is_other_T])):,} sequences, first at "
                f"{self.place(is_other_T)}; a sequence wants one {name}"
            )
        return value_S
