"""Logged tokens of a table, held against the same rules as captures: nothing but two log-probabilities per token.

A table has no prompts and often no token ids. Rows that are copies of each other (samples of one prompt) are known by
infer's log-probabilities, bit for bit, where no ids are given. Positions may have gaps (tool output left out): rows
that follow each other in a sequence count as neighbours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moediag.hygiene.check import check_capture, check_pair
from moediag.hygiene.findings import Finding, Place, by_level
from moediag.notation import INFER, TRAIN
from moediag.run.capture import Capture, TokenRows


def check_tokens(
    logp_train_T: ArrayLike,
    logp_infer_T: ArrayLike,
    sequence_T: NDArray[Any],
    position_T: NDArray[Any],
    *,
    sequence_names_S: NDArray[Any] | None = None,
    prompt_T: NDArray[Any] | None = None,
    token_id_T: NDArray[Any] | None = None,
    entropy_T: ArrayLike | None = None,
    arms: tuple[str, str] = (TRAIN, INFER),
    is_foreign: bool = True,
) -> list[Finding]:
    """Findings on logged response tokens, errors first.

    Give log-probabilities as they were read: a value above 0 by rounding is not one of the exact zeros of padding.

    Args:
        logp_train_T, logp_infer_T: log-probabilities [nat]; NaN = not scored, such rows take no part.
        sequence_T: sequence of every token, a number; position_T: its place there. In any order.
        sequence_names_S: what findings call the sequences; None = by their numbers.
        prompt_T: prompt of every token; None = every sequence has its own.
        token_id_T: token ids.
        entropy_T: entropies of infer's distribution [nat].
        arms: names of the two sides, train first.
        is_foreign: whether another tool made the data (:class:`~moediag.hygiene.check.PairHygiene`).
    """
    train_T, infer_T = (np.asarray(values, dtype=np.float32) for values in (logp_train_T, logp_infer_T))
    row_T = np.asarray(sequence_T, dtype=np.int64)
    used_T = np.flatnonzero(~np.isnan(train_T) & ~np.isnan(infer_T))
    if not len(used_T):
        return []
    order_N = used_T[np.lexsort((position_T[used_T], row_T[used_T]))]
    train_N, infer_N, row_N = train_T[order_N], infer_T[order_N], row_T[order_N]
    start_S = np.flatnonzero(np.r_[True, np.diff(row_N) != 0])
    index_N = np.arange(len(row_N)) - np.repeat(start_S, np.diff(np.r_[start_S, len(row_N)]))
    prompt_N = row_N if prompt_T is None else np.unique(prompt_T, return_inverse=True)[1][order_N]
    tokens = TokenRows(
        seq_id_T=row_N.astype(np.int64),
        prompt_id_T=prompt_N.astype(np.int64),
        sample_index_T=_sample_index(prompt_N, start_S)[np.cumsum(index_N == 0) - 1],
        position_T=index_N.astype(np.int32),
        token_id_T=(infer_N.view(np.int32) if token_id_T is None else token_id_T[order_N]).astype(np.int64),
        is_response_T=np.ones(len(row_N), dtype=np.bool_),
    )
    entropy_N = None if entropy_T is None else np.asarray(entropy_T, dtype=np.float32)[order_N]
    train, infer = Capture(train_N), Capture(infer_N, entropy_N)
    found = [*check_capture(tokens, infer, arm=arms[1]), *check_capture(tokens, train, arm=arms[0], is_sampled=False)]
    found += check_pair(tokens, train, infer, where=f"{arms[1]}~{arms[0]}", is_foreign=is_foreign)

    first_of = dict(zip(row_N[start_S].tolist(), start_S.tolist(), strict=True))

    def in_table(place: Place) -> Place:
        row = order_N[first_of[int(place.seq_id)] + place.position]
        name = row_T[row] if sequence_names_S is None else sequence_names_S[row_T[row]]
        return Place(name.item() if isinstance(name, np.generic) else name, int(position_T[row]))

    return by_level([replace(item, places=tuple(map(in_table, item.places))) for item in found])


def check_steps(step_T: NDArray[Any], *columns: Any, **facts: Any) -> list[Finding]:
    """Findings on the tokens of a training: of all steps together, then of single steps what the whole does not show.

    Args:
        step_T: training step of every token.
        columns, facts: as :func:`check_tokens` takes them; a sequence is known by its step and name.
    """
    train_T, infer_T, sequence_T, position_T = columns
    steps, number_T = np.unique(step_T, return_inverse=True)
    sequences, row_T = np.unique(sequence_T, return_inverse=True)
    arrays = {name: np.asarray(value) for name, value in facts.items() if isinstance(value, np.ndarray)}
    plain = {name: value for name, value in facts.items() if name not in arrays}

    def check(some_T: Any, sequence_T: NDArray[Any]) -> list[Finding]:
        parts = {name: values_T[some_T] for name, values_T in arrays.items()}
        return check_tokens(train_T[some_T], infer_T[some_T], sequence_T[some_T], position_T[some_T], **parts, **plain)

    found = check(slice(None), number_T * len(sequences) + row_T)
    found = [replace(item, places=()) for item in found]  # sequences of all steps have no names of their own
    known = {item.rule for item in found}
    order_T = np.argsort(number_T, kind="stable")
    ends = np.cumsum(np.bincount(number_T))
    for step, start, end in zip(steps.tolist(), [0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        alone = check(order_T[start:end], sequence_T) if len(steps) > 1 else []
        found += [replace(item, where=f"step {step} {item.where}") for item in alone if item.rule not in known]
    return by_level(found)


def _sample_index(prompt_N: NDArray[Any], start_S: NDArray[Any]) -> NDArray[np.int32]:
    """(S,) which sample of its prompt every sequence is."""
    prompt_S = prompt_N[start_S]
    order_S = np.argsort(prompt_S, kind="stable")
    first_S = np.r_[True, np.diff(prompt_S[order_S]) != 0]
    here_S = np.arange(len(order_S))
    index_S = np.empty(len(order_S), dtype=np.int32)
    index_S[order_S] = here_S - np.maximum.accumulate(np.where(first_S, here_S, 0))
    return index_S
