"""What every importer gives: training steps of whole sequences, in one shape, read lazily.

Invariants:
    - an array has one entry per token of the whole sequence, prompt and response, whatever part the dump holds: value t
      is of token t, and a routing row is of the token that was consumed (:mod:`moediag.notation`);
    - what a dump lacks is None, or NaN and -1 where it lacks it of some tokens: a filler never becomes a number;
    - rollouts of a step are read one by one, so memory does not grow with the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moediag.errors import DumpError
from moediag.importers.sequences import repeated_rows
from moediag.importers.tables import OnProgress, silent
from moediag.notation import INFER, NOT_ROUTED, TRAIN
from moediag.run.files import sha256_file, tokenizer_digest
from moediag.run.records import Score, ScorePath, Tokenizer

Bool = NDArray[np.bool_]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

SIDES: Final = (INFER, TRAIN)


@dataclass
class Rollout:
    """One sequence of T tokens, the prompt first.

    Args:
        where: file and line or index, for messages.
        is_response_T: not the prompt; all True where the dump has no prompt.
        token_id_T: None = the dump has no ids.
        is_trained_T: the loss mask; None = every response token is trained.
        logp: side (``infer``, ``train``) -> log-probability of every token [nat], NaN = none.
        entropy: side -> entropy of the distribution that the token was drawn from [nat], NaN = none.
        expert_ids: side -> (T, L, K) experts that consumed the token, best first where the dump orders them, -1 = none.
        router_logits: side -> (T, L, E) logits of the routers, NaN = none.
        turn_T: turn of a conversation, -1 = not known.
        weight_version_T: text, None = not known.
        advantage_T: NaN = not known.
        reward: of the sequence; NaN = not known.
        prompt: what samples of one prompt share; None = the prompt's token ids.
    """

    where: str
    is_response_T: Bool
    token_id_T: Int64 | None = None
    is_trained_T: Bool | None = None
    logp: dict[str, Float64] = field(default_factory=dict)
    entropy: dict[str, Float64] = field(default_factory=dict)
    expert_ids: dict[str, NDArray[Any]] = field(default_factory=dict)
    router_logits: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    turn_T: NDArray[np.int32] | None = None
    weight_version_T: NDArray[np.object_] | None = None
    advantage_T: Float64 | None = None
    reward: float = float("nan")
    prompt: Hashable = None

    def __len__(self) -> int:
        return len(self.is_response_T)


@dataclass
class Step:
    """One training step of a dump.

    Args:
        number: None = the dump does not say.
        files: what it is read from.
        rollouts: its sequences; may be iterated once.
        notes: what a reader has to know, a sentence each; complete once the rollouts are read.
        scores: side -> what its log-probabilities are.
        paths: side -> how they came about.
        has_dense_layers: side -> whether the routes have a slot for every decoder layer, dense ones all 0; False = MoE
            layers alone.
        decoder_layers: side -> decoder layers of MoE layers that stand alone, where the dump names them.
        tokenizer: what made the token ids of a dump of text, whose sequences may have no scores.
    """

    number: int | None
    files: tuple[Path, ...]
    rollouts: Iterable[Rollout]
    notes: list[str] = field(default_factory=list)
    scores: Mapping[str, Score] = field(default_factory=dict)
    paths: Mapping[str, ScorePath] = field(default_factory=dict)
    has_dense_layers: Mapping[str, bool] = field(default_factory=dict)
    decoder_layers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class Options:
    """What the user says of a dump that the dump does not.

    Args:
        n_experts: E, without zero experts; None = the largest id + 1.
        n_zero_experts: experts after these that compute nothing.
        n_layers: decoder layers, dense ones among them; None = learnt from the ids where the dump does not say.
        first_row: position of the first routing row in its sequence (1 where a begin-of-text row was left out).
        temperature: that the tokens were sampled at.
        mask: the column of the loss mask, of plain tables.
        tokens: a table with token ids and boundaries, for a dump that has none.
        pipeline_layers: decoder layers of every pipeline stage of a trainer; empty = one stage.
        tokenizer: the folder of the tokenizer for a dump of text.
        trust_pickle: pickles may be opened.
        on_progress: called with what is read.
    """

    n_experts: int | None = None
    n_zero_experts: int = 0
    n_layers: int | None = None
    first_row: int = 0
    temperature: float | None = None
    mask: str | None = None
    tokens: Path | None = None
    pipeline_layers: tuple[int, ...] = ()
    tokenizer: Path | None = None
    trust_pickle: bool = False
    on_progress: OnProgress = silent

    def content(self) -> dict[str, Any]:
        """In plain types: what makes two imports the same, beside their files.

        Raises:
            DumpError: the table of tokens is missing.
        """
        known = {name: getattr(self, name) for name in ("n_experts", "n_layers", "first_row", "temperature", "mask")}
        if self.tokens and not self.tokens.is_file():
            raise DumpError(f"--tokens {self.tokens} is missing, or no file")
        known["tokens"] = self.tokens and sha256_file(self.tokens)
        if self.n_zero_experts:
            known["n_zero_experts"] = self.n_zero_experts
        if self.pipeline_layers:
            known["pipeline_layers"] = list(self.pipeline_layers)
        return known if self.tokenizer is None else {**known, "tokenizer": tokenizer_digest(self.tokenizer)}


@dataclass(frozen=True)
class Importer:
    """One format.

    Args:
        name: as the command line takes it.
        words: what it reads, and from which of the framework's options.
        is_one: whether a file is, or belongs to, such a dump; looks at its name and its first bytes, needs no torch
            and opens no pickle. False for what it cannot read.
        read: the steps of the files, in order.
        needs: what must be there: ``torch``, ``--trust-pickle``.
    """

    name: str
    words: str
    is_one: Callable[[Path], bool]
    read: Callable[[Sequence[Path], Options], list[Step]]
    needs: tuple[str, ...] = ()


def as_written(step: Step, rollouts: Iterator[Rollout]) -> Iterator[Rollout]:
    """Rollouts as they are read; where a value is of another kind than the format has, one line says so.

    Raises:
        DumpError: what the reader raised, or for a column that is missing, or is no array, no number, no list.
    """
    try:
        yield from rollouts
    except DumpError:
        raise
    except (TypeError, KeyError, IndexError, AttributeError, ValueError, OverflowError) as error:
        raise DumpError(
            f"{step.files[0]}{' and others' if step.files[1:] else ''} is not as its framework writes it "
            f"({type(error).__name__}: {error}); is it of another version, or changed?"
        ) from error


def by_step(files: Iterable[Path], number_of: Callable[[Path], int | None]) -> dict[int | None, list[Path]]:
    """Files by training step, ascending.

    Raises:
        DumpError: some files have a step and others do not.
    """
    steps: dict[int | None, list[Path]] = {}
    for path in files:
        steps.setdefault(number_of(path), []).append(path)
    if None in steps and len(steps) > 1:
        known = next(paths[0] for number, paths in steps.items() if number is not None)
        raise DumpError(
            f"{steps[None][0]} has no step in its name, {known} has one; import them apart, or name it like the others"
        )
    return dict(sorted(steps.items(), key=lambda item: item[0] or 0))


def number_in(text: str, pattern: str) -> int | None:
    """The number that a pattern's first group finds in a name.

    Example:
        >>> number_in("train_data_step12.jsonl", r"step(\\d+)"), number_in("x", r"step(\\d+)")
        (12, None)
    """
    match = re.search(pattern, text)
    return int(match[1]) if match else None


def from_mask(is_trained_T: Bool) -> Bool:
    """Which tokens are response where only the loss mask is known: from the first trained token on."""
    return np.logical_or.accumulate(is_trained_T)


def floats(values: Any, where: str, name: str, n: int | None = None) -> Float64:
    """A list of numbers; null is NaN.

    Raises:
        DumpError: something else, or not ``n`` of them.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError):
        array = np.zeros(0)
    if not isinstance(values, list | np.ndarray) or array.ndim != 1 or len(array) != len(values):
        raise DumpError(f"{where}: {name} should be a list of numbers, found {short(values)}")
    if n is not None and len(array) != n:
        raise DumpError(f"{where}: {name} should hold {n} numbers, one per token, found {len(array)}")
    return array


@contextmanager
def understood(where: str) -> Iterator[None]:
    """What a record's entries cannot be taken for is one line that names it.

    Raises:
        DumpError: as the body raises it, or for an entry of a kind that the format never has.
    """
    try:
        yield
    except (TypeError, AttributeError, LookupError, ValueError, OverflowError) as error:
        if isinstance(error, DumpError):
            raise
        raise DumpError(
            f"{where}: an entry is of another kind than this format has ({error}); cut or edited?"
        ) from None


def one_number(value: Any, where: str, name: str) -> float:
    """A number; null is NaN.

    Raises:
        DumpError: something else.
    """
    if value is None:
        return float("nan")
    if not isinstance(value, int | float):
        raise DumpError(f"{where}: {name} should be a number, found {short(value)}")
    return float(value)


def whole_number(value: Any, where: str, name: str) -> int:
    """A whole number of at least 0.

    Raises:
        DumpError: something else.
    """
    found = one_number(value, where, name)
    if not (found >= 0 and found.is_integer()):
        raise DumpError(f"{where}: {name} should be a whole number, found {short(value)}")
    return int(found)


def whole_numbers(values: Any, where: str, name: str, n: int | None = None) -> Int64:
    """A list of whole numbers, such as token ids.

    Raises:
        DumpError: something else, or not ``n`` of them.
    """
    array = np.asarray(values) if isinstance(values, list | np.ndarray) and len(values) else np.zeros(0)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
        raise DumpError(f"{where}: {name} should be a list of whole numbers, found {short(values)}")
    if n is not None and len(array) != n:
        raise DumpError(f"{where}: {name} should hold {n} numbers, one per token, found {len(array)}")
    return array.astype(np.int64)


def flags(values: Any, where: str, name: str, n: int | None = None) -> Bool:
    """A list of true/false or 1/0 (1.0/0.0).

    Raises:
        DumpError: something else, or not ``n`` of them.
    """
    array = floats(values, where, name, n)
    if not np.isin(array, (0, 1)).all():
        raise DumpError(f"{where}: {name} needs true/false or 1/0, found {array[~np.isin(array, (0, 1))][0]:g}")
    return array.astype(np.bool_)


def placed(n: int, start: int, values: ArrayLike) -> Float64:
    """``values`` at ``start`` of n tokens; NaN elsewhere."""
    array = np.full(n, np.nan)
    part = np.asarray(values, dtype=np.float64)
    array[start : start + len(part)] = part
    return array


def placed_routes(n: int, start: int, rows: NDArray[Any], where: str, name: str) -> NDArray[Any]:
    """Routing rows (rows, L, K) at ``start`` of n tokens; -1 elsewhere.

    Raises:
        DumpError: not such rows, or more of them than consumed tokens.
    """
    if rows.ndim != 3 or not rows.size:
        raise DumpError(f"{where}: {name} should be [rows][layers][K], found shape {rows.shape}")
    if start + len(rows) > n:
        raise DumpError(
            f"{where}: {name} has {len(rows)} rows from row {start} for {n} tokens; "
            f"{repeated_rows(rows, n - 1 - start) or f'expected at most {n - start}'}"
        )
    array = np.full((n, *rows.shape[1:]), NOT_ROUTED, np.result_type(rows.dtype, np.int16))
    array[start : start + len(rows)] = rows
    return array


def short(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
