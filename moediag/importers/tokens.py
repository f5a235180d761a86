"""Tables of one row per token, read into response tokens in canonical order; what no log holds is refused.

Invariants:
    - simulate, trend and validate read tables through here, so that they refuse, count and note the same things;
    - rows are ordered by (step,) sequence and position whatever the order of the table;
    - every refusal is one line that counts the rows and names the first of them;
    - log-probabilities are taken as they are, but those above 0 by rounding, and what is to be known of them is noted.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.errors import DumpError
from moediag.importers.columns import KNOWN, PLACE, Kind, LossMasks, known_names
from moediag.importers.tables import Columns, Ids, OnProgress, TableFile, frame_column, open_table
from moediag.run.capture import LARGEST_ROUNDED_LOGP, is_scored

Float64 = NDArray[np.float64]

LOGPS: Final = ("logp_train", "logp_infer", "logp_train_new")

_PANDAS: Final = re.compile(r"__index_level_\d+__")
"""A frame's index, which pandas writes into parquet as a column."""
_N_LOOKED_AT: Final = 1000
_FEW: Final = 8
"""Different values that by chance are not all short: a float32 is a float16 once in 2^13."""


@dataclass(frozen=True)
class TokenTable:
    """A table of one row per token whose columns are known by name, and not read yet.

    Args:
        where: the table, for messages.
        there: its columns.
        name_of: known name -> the table's name of it, of the columns to read.
        masks: its loss masks.
        notes: which names were taken for which.
    """

    where: str
    there: tuple[str, ...]
    name_of: dict[str, str]
    masks: LossMasks
    notes: tuple[str, ...]
    _table: TableFile | pd.DataFrame

    @classmethod
    def of(
        cls, table: Path | TableFile | pd.DataFrame, mask: str | None = None, advice: str = "keep one of them"
    ) -> TokenTable:
        """The table that is a file or a frame.

        Args:
            mask: the column of the loss mask; None = the one known by its name.
            advice: what to do where masks differ.

        Raises:
            DumpError: the file cannot be read, a required column or the mask is missing.
        """
        if isinstance(table, Path):
            table = open_table(table)
        where, there = (
            (str(table.path), tuple(table.types))
            if isinstance(table, TableFile)
            else ("the frame", tuple(map(str, table.columns)))
        )
        name_of, notes = known_names(there, where)
        return cls(where, there, name_of, LossMasks.among(there, where, mask, advice), notes, table)

    @property
    def has_places(self) -> bool:
        """Whether the table says which sequence a token belongs to, and where it stands there."""
        return set(PLACE) <= {*self.name_of}

    def without(self, names: Collection[str]) -> TokenTable:
        """The table without some of its known columns."""
        return replace(self, name_of={ours: theirs for ours, theirs in self.name_of.items() if ours not in names})

    def response_rows(self) -> NDArray[np.bool_]:
        """Every row's ``is_response``, beside a loss mask of another name."""
        if isinstance(self._table, TableFile):
            return np.asarray(self._table.read({"is_response": "flag"})["is_response"])
        return np.asarray(frame_column(self._table, "is_response", "flag"))

    def read(self, on_progress: OnProgress | None = None) -> LoggedTokens:
        """The response tokens.

        Raises:
            DumpError: a column of another kind or with gaps, or what no log holds.
        """
        kinds: dict[str, Kind] = {theirs: KNOWN[ours].kind for ours, theirs in self.name_of.items()}
        kinds |= dict.fromkeys(self.masks.columns, "flag")
        unused = [name for name in self.there if not (name in kinds or _PANDAS.match(name) or name == "is_response")]
        if isinstance(self._table, TableFile):
            read = self._table.read(kinds, on_progress)
        else:
            read = {name: frame_column(self._table, name, kind) for name, kind in kinds.items()}
        is_response_N, masked = self.masks.response(read)
        columns = {ours: read[theirs] for ours, theirs in self.name_of.items()}
        return LoggedTokens.of(
            columns if self.has_places else columns | _one_sequence(columns),
            self.where,
            is_response_N,
            notes=(*masked, *self.notes, *([f"columns not used: {', '.join(unused)}"] if unused else [])),
            has_places=self.has_places,
        )


@dataclass(frozen=True)
class LoggedTokens:
    """Response tokens in canonical order.

    Args:
        columns: known name -> all rows' values as they were read.
        where: what they were read from, for messages.
        input_row_T: row of every token in the table.
        logps: name -> log-probabilities of the tokens, as they are to be used [nat].
        read_notes, logp_notes: what a reader has to know of the columns and of their log-probabilities.
        is_masked: whether prompt and padding are known to be left out.
        has_places: whether sequences and positions are known; else all rows are one sequence, in the table's order,
            of which nothing is concluded.
    """

    columns: Columns
    where: str
    input_row_T: NDArray[np.intp]
    logps: dict[str, Float64]
    read_notes: tuple[str, ...] = ()
    logp_notes: tuple[str, ...] = ()
    is_masked: bool = True
    has_places: bool = True

    @classmethod
    def of(
        cls,
        columns: Columns,
        where: str,
        is_response_N: NDArray[np.bool_] | None,
        *,
        notes: tuple[str, ...] = (),
        has_places: bool = True,
    ) -> LoggedTokens:
        """The response tokens among rows.

        Args:
            columns: the required columns (:data:`~moediag.importers.columns.REQUIRED`) and any other known one.
            is_response_N: which rows are response tokens; None = not known, every row is taken for one.
            notes, has_places: as kept.

        Raises:
            DumpError: two rows of one place, no response token, or log-probabilities that no model gives.
        """
        input_row_T = canonical_order(columns, where)
        if is_response_N is not None:
            input_row_T = input_row_T[is_response_N[input_row_T]]
        if not len(input_row_T):
            raise DumpError(f"{where} holds no response token; check the loss mask")
        tokens = cls(columns, where, input_row_T, {}, notes, is_masked=is_response_N is not None, has_places=has_places)
        tokens = tokens._with_logps()
        if not tokens.is_scored_T.any():
            raise DumpError(f"{where}: no response token has both log-probabilities; there is nothing to compare")
        return tokens

    def some(self, is_T: NDArray[np.bool_]) -> LoggedTokens:
        """Some of the tokens, whole sequences."""
        return replace(
            self, input_row_T=self.input_row_T[is_T], logps={name: logp_T[is_T] for name, logp_T in self.logps.items()}
        )

    def __len__(self) -> int:
        return len(self.input_row_T)

    def get(self, name: str) -> NDArray[Any] | None:
        """A column's values of the tokens, as they were read; None where there is none."""
        return self.columns[name][self.input_row_T] if name in self.columns else None

    def number(self, name: str) -> Float64:
        """A column that is there as float64."""
        return np.asarray(self.columns[name][self.input_row_T], dtype=np.float64)

    @cached_property
    def start_S(self) -> NDArray[np.intp]:  # noqa: N802 - the legend suffix
        """First token of every sequence."""
        steps = [self.columns["step"][self.input_row_T]] if "step" in self.columns else []
        is_new_T = np.logical_or.reduce([np.diff(ids_T) != 0 for ids_T in (self._name_T, *steps)])
        return np.flatnonzero(np.r_[True, is_new_T])

    @cached_property
    def row_T(self) -> NDArray[np.intp]:  # noqa: N802
        """0 .. S-1, the sequence of every token."""
        return np.repeat(np.arange(len(self.start_S)), np.diff(np.append(self.start_S, len(self))))

    @cached_property
    def seq_id_S(self) -> NDArray[Any]:  # noqa: N802
        """Name of every sequence."""
        return np.asarray(self.columns["seq_id"].values_N[self._name_T[self.start_S]])

    @cached_property
    def _name_T(self) -> NDArray[np.intp]:  # noqa: N802
        return np.asarray(self.columns["seq_id"].row_T[self.input_row_T])

    @cached_property
    def prompt_row_S(self) -> NDArray[np.intp]:  # noqa: N802
        """0 .. C-1, the prompt of every sequence; every sequence its own where no prompt is known.

        Raises:
            DumpError: the prompt changes within a sequence.
        """
        if "prompt_id" not in self.columns:
            return np.arange(len(self.start_S))
        prompt_T = self.columns["prompt_id"].row_T[self.input_row_T]
        return np.asarray(np.unique(self._constant(prompt_T, "prompt_id"), return_inverse=True)[1], dtype=np.intp)

    @property
    def is_scored_T(self) -> NDArray[np.bool_]:  # noqa: N802
        """Tokens that have a ratio."""
        return is_scored(self.logps["logp_train"], self.logps["logp_infer"])

    @property
    def position_T(self) -> NDArray[np.int64]:  # noqa: N802
        """Position in the response, 0 = first response token."""
        position_T = np.asarray(self.columns["position"])[self.input_row_T].astype(np.int64)
        return np.asarray(position_T - position_T[self.start_S][self.row_T])

    @property
    def frame(self) -> pd.DataFrame:
        """The tokens in the columns of frame ``tokens``, as far as they are known: sequences and prompts are counted
        from 0, positions from the first response token; further columns are step and logp_train_new."""
        names = {"step": "step", "entropy": "entropy_infer", "n_flipped_layers": "n_flipped_layers"}
        places = {"seq_id": self.row_T, "prompt_id": self.prompt_row_S[self.row_T], "position": self.position_T}
        more = {theirs: self.get(ours) for ours, theirs in names.items() if ours in self.columns}
        return pd.DataFrame({**places, **self.logps, **more}, copy=False)

    def by_sequence(self, name: str) -> Float64:
        """A number that is the same for all tokens of a sequence.

        Raises:
            DumpError: it changes within one, or is missing.
        """
        values_T = self.number(name)
        self.refuse(~np.isfinite(values_T), f"{name} is missing in {{n}} rows, first {{place}}")
        return self._constant(values_T, name)

    def refuse(self, is_bad_T: NDArray[np.bool_], message: str) -> None:
        """Refuse the table where a token is bad.

        Args:
            message: what is wrong, with ``{n}`` for how many tokens and ``{place}`` for the first of them.

        Raises:
            DumpError: a token is bad.
        """
        if is_bad_T.any():
            words = message.format(n=f"{int(is_bad_T.sum()):,}", place=self._place(is_bad_T))
            raise DumpError(f"{self.where}: {words}")

    def notes(self) -> tuple[str, ...]:
        """What a reader has to know of these rows."""
        found = list(self.read_notes)
        n_rows, n_tokens = len(self.columns["position"]), len(self)
        if n_rows > n_tokens:
            found.append(f"{n_rows - n_tokens:,} of {n_rows:,} rows are no response token (weight 0)")
        n_unscored = int(np.logical_or.reduce([np.isnan(self.logps[name]) for name in LOGPS[:2]]).sum())
        if n_unscored:
            found.append(
                f"{n_unscored:,} of {n_tokens:,} response tokens lack a log-probability (not scored, weight 0)"
            )
        found += self.logp_notes
        if not self.has_places:
            found.append("neither seq_id nor position: all rows count as one sequence of one prompt, so there is no "
                         "interval, and whatever is computed per sequence is of all rows at once")  # fmt: skip
        elif "prompt_id" not in self.columns:
            found.append("no prompt_id: every sequence counts as a prompt of its own, which makes intervals too short "
                         "where several are samples of one prompt")  # fmt: skip
        return tuple(found)

    def _place(self, is_T: NDArray[np.bool_]) -> str:
        row = self.input_row_T[int(np.argmax(is_T))]
        return _place(self.columns, row)

    def _constant(self, values_T: NDArray[Any], name: str) -> NDArray[Any]:
        value_S: NDArray[Any] = values_T[self.start_S]
        is_other_T = values_T != value_S[self.row_T]
        n_sequences = len(np.unique(self.row_T[is_other_T]))
        self.refuse(
            is_other_T,
            f"{name} changes within {n_sequences:,} sequences, first at {{place}}; a sequence needs one {name}",
        )
        return value_S

    def _with_logps(self) -> LoggedTokens:
        """With log-probabilities as they are to be used: 0 for what is above 0 by rounding, and as float32 where the
        digits are float32's; and with notes on rounded, impossible and coarse values."""
        logps: dict[str, Float64] = {}
        notes = []
        for name in (name for name in LOGPS if name in self.columns):
            values_T = self.number(name)
            is_bad_T = values_T > LARGEST_ROUNDED_LOGP
            if is_bad_T.any():
                self.refuse(is_bad_T, f"{name} is above 0 in {{n}} rows, first {{place}} ({values_T[is_bad_T][0]:g}); "
                            "log-probabilities are at most 0: are these logits or probabilities?")  # fmt: skip
            n_above = int((values_T > 0).sum())
            if n_above:
                notes.append(f"{n_above:,} of {len(values_T):,} {name} are above 0 by rounding, at most "
                             f"{values_T[values_T > 0].max():.2g} nat, and taken as 0")  # fmt: skip
            logps[name] = _float32_again(np.minimum(values_T, 0.0))
            if coarse := _coarse(logps[name]):
                notes.append(f"{name} {coarse}")
        is_inf_T = {side: np.isinf(logps[side]) for side in LOGPS[:2]}
        n_impossible = int(np.logical_or(*is_inf_T.values()).sum())
        if n_impossible:
            sides = ", ".join(f"{int(is_T.sum()):,} in {side}" for side, is_T in is_inf_T.items())
            notes.append(f"{n_impossible:,} of {len(self):,} response tokens have a log-probability of -inf "
                         f"({sides}): a sampled token has no probability of 0, so they are left out of every statistic "
                         "and get weight 0 (D31-impossible-logp)")  # fmt: skip
        return replace(self, logps=logps, logp_notes=tuple(notes))


def _one_sequence(columns: Columns) -> Columns:
    """Places for rows that have none: one sequence, in the table's order."""
    n = len(next(iter(columns.values())))
    return {"seq_id": Ids(np.zeros(n, np.intp), np.array([0])), "position": np.arange(n)}


def canonical_order(columns: Columns, where: str) -> NDArray[np.intp]:
    """The order of rows by (step,) sequence and position.

    Raises:
        DumpError: two rows of one place, or a row without a sequence.
    """
    keys = {name: columns[name] for name in ("step", "seq_id", "position") if name in columns}
    rank = [column.row_T if isinstance(column, Ids) else column for column in keys.values()]
    order_N = np.arange(len(rank[0]))
    is_after_N, is_same_N = _steps(rank)
    if not is_after_N.all():
        order_N = np.lexsort(rank[::-1])
        _, is_same_N = _steps([rank_N[order_N] for rank_N in rank])
        if is_same_N.any():
            raise DumpError(
                f"{where}: {int(is_same_N.sum()):,} rows stand at a place of another, first "
                f"{_place(columns, order_N[int(np.argmax(is_same_N))])}; every ({', '.join(keys)}) needs one row"
            )
    n_nameless = int((columns["seq_id"].row_T < 0).sum())
    if n_nameless:
        raise DumpError(f"{where}: {n_nameless:,} rows have no seq_id")
    return order_N


def _steps(rank: list[NDArray[Any]]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether every row but the first comes after the one before it, and whether it has the same keys."""
    n_steps = max(0, len(rank[0]) - 1)
    is_after_N, is_same_N = np.zeros(n_steps, np.bool_), np.ones(n_steps, np.bool_)
    for rank_N in rank:
        step_N = np.diff(rank_N)
        is_after_N |= is_same_N & (step_N > 0)
        is_same_N &= step_N == 0
    return is_after_N, is_same_N


def _place(columns: Columns, row: np.intp) -> str:
    """A row in words."""
    keys = [name for name in ("step", "seq_id", "position") if name in columns]
    return " ".join(f"{name} {columns[name][slice(row, row + 1)][0]}" for name in keys)


def _float32_again(values_T: Float64) -> Float64:
    """Float32 numbers that were written in their shortest digits (pandas' csv) as they were; others as they are."""
    known_T = values_T[np.isfinite(values_T)][:_N_LOOKED_AT]
    with np.errstate(over="ignore"):
        single_T = known_T.astype(np.float32)
        if [float(str(value)) for value in single_T] != known_T.tolist():
            return values_T
        return values_T.astype(np.float32).astype(np.float64)


def _coarse(values_T: Float64) -> str:
    """What format log-probabilities were stored in, if one that is too coarse for them; by the values, for a table of
    float64 does not show that it was rounded before."""
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
