"""Logged tokens of a table, held against the same rules as captures: nothing but two log-probabilities per token.

A table has no prompts and often no token ids. Rows that are copies of each other (samples of one prompt) are known by
infer's log-probabilities, bit for bit, where no ids are given. Positions may have gaps (tool output left out): rows
that follow each other in a sequence count as neighbours.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moediag.hygiene.chance import ALPHA
from moediag.hygiene.check import Inspection, check_capture, check_pair
from moediag.hygiene.findings import Finding, Place, by_level, finding
from moediag.hygiene.levels import not_estimable
from moediag.hygiene.rules import (
    BOTH_LOGPS,
    BOTH_VERSIONS,
    ENTROPIES,
    ERROR,
    FOREIGN,
    LOGPS,
    TEMPERATURES,
    VERSIONS,
    WARNING,
)
from moediag.importers.tokens import LoggedTokens
from moediag.notation import INFER, TRAIN
from moediag.run.capture import Capture, TokenRows


def inspect_tokens(tokens: LoggedTokens) -> Inspection:
    """Apply the rules to the response tokens of a table."""
    has = {FOREIGN, LOGPS, BOTH_LOGPS}
    has |= {ENTROPIES} if "entropy" in tokens.columns else set()
    has |= {TEMPERATURES} if "temperature" in tokens.columns else set()
    has |= {VERSIONS, BOTH_VERSIONS} if "weight_version" in tokens.columns else set()
    return Inspection(check_logged(tokens), frozenset(has), 2 * len(tokens))


def check_logged(tokens: LoggedTokens, *, is_foreign: bool = True) -> list[Finding]:
    """Findings on the response tokens of a table, or of a pair of a run, errors first.

    Args:
        is_foreign: whether another tool made the data (:class:`~moediag.hygiene.check.PairHygiene`).
    """
    columns = (
        tokens.number("logp_train"),
        tokens.number("logp_infer"),
        tokens.row_T,
        tokens.columns["position"][tokens.input_row_T],
    )
    facts: dict[str, Any] = {
        "sequence_names_S": tokens.seq_id_S,
        "prompt_T": tokens.prompt_row_S[tokens.row_T],
        "entropy_T": tokens.get("entropy"),
        "weight_version_T": tokens.get("weight_version"),
        "is_foreign": is_foreign,
        "has_places": tokens.has_places,
    }
    step_T = tokens.get("step")
    temperature_T = tokens.get("temperature")
    found = check_tokens(*columns, **facts) if step_T is None else check_steps(step_T, *columns, **facts)
    if step_T is None and not any(one.level == ERROR for one in found):  # of what is wrong no estimate is worth a word
        found += not_estimable(columns[0], columns[1], tokens.row_T, f"{INFER}~{TRAIN}")
    if not tokens.has_places:
        message = "neither seq_id nor position: rows are one cluster, and rules about sequences and places are left out"
        found.append(finding("no-sequences", f"{INFER}~{TRAIN}", message, n_of=len(tokens)))
    elif not tokens.is_masked:
        is_zero_T = (columns[0] == 0) & (columns[1] == 0)
        padding = unmasked_padding(is_zero_T, tokens.start_S, tokens.where)
        known = {one.rule for one in padding}
        found = [*padding, *(one for one in found if one.rule not in known)]
    if temperature_T is not None:
        found += _check_temperatures(tokens, np.asarray(temperature_T, np.float64), found, columns, facts)
    return by_level(found)


def _check_temperatures(
    tokens: LoggedTokens, temperature_T: NDArray[np.float64], found: list[Finding], columns: Any, facts: dict[str, Any]
) -> list[Finding]:
    """D10 of tokens that were sampled at another temperature than 1: that there are any, and whether one side's
    log-probabilities were taken after it and the other's before; the other tokens may hide that in the whole.

    Raises:
        DumpError: a temperature below 0, or infinite.
    """
    tokens.refuse(
        (temperature_T < 0) | np.isinf(temperature_T),
        "temperature needs a number of at least 0, found another in {n} rows, first {place}",
    )
    is_known_T, is_other_T = ~np.isnan(temperature_T), ~np.isnan(temperature_T) & (temperature_T != 1)
    if not is_other_T.any():
        return []
    n_other, n = int(is_other_T.sum()), len(temperature_T)
    low, high = (f"{end:g}" for end in (temperature_T[is_other_T].min(), temperature_T[is_other_T].max()))
    n_unknown = n - int(is_known_T.sum())
    message = (
        f"{n_other:,} of {n:,} tokens were sampled at temperature {low if low == high else f'{low} to {high}'}"
        f"{f', {n - n_other - n_unknown:,} at 1' if n > n_other + n_unknown else ''}"
        f"{f', {n_unknown:,} at one that is not known' if n_unknown else ''}: if one side's log-probabilities were "
        "taken after the temperature and the other's before, differences and ratios hold the temperature and no "
        "mismatch; if both were taken before it, no ratio is one of the distribution sampled from"
    )
    where = f"{INFER}~{TRAIN}"
    more = [finding("D10-sampling-temperature", where, message, n=n_other, n_of=n)]
    if any(one.rule == "D10-temperature" for one in found):
        return more
    for words, is_here_T in (("below", is_other_T & (temperature_T < 1)), ("above", is_other_T & (temperature_T > 1))):
        parts = {
            name: facts[name][is_here_T]
            for name in ("prompt_T", "entropy_T", "weight_version_T")
            if facts[name] is not None
        }
        alone = check_tokens(*(column[is_here_T] for column in columns), **{**facts, **parts})
        for one in alone:
            if one.rule == "D10-temperature":
                more.append(replace(one, where=f"{where}, tokens of a temperature {words} 1"))
    return more


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
    weight_version_T: NDArray[Any] | None = None,
    arms: tuple[str, str] = (TRAIN, INFER),
    is_foreign: bool = True,
    has_places: bool = True,
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
        weight_version_T: version of the weights that sampled every token; empty or None = not known.
        arms: names of the two sides, train first.
        is_foreign, has_places: as for :class:`~moediag.hygiene.check.PairHygiene`.
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
        weight_version_T=None if weight_version_T is None else _versions(weight_version_T[order_N]),
    )
    entropy_N = None if entropy_T is None else np.asarray(entropy_T, dtype=np.float32)[order_N]
    train, infer = Capture(train_N), Capture(infer_N, entropy_N)
    found = [*check_capture(tokens, infer, arm=arms[1]), *check_capture(tokens, train, arm=arms[0], is_sampled=False)]
    found += check_pair(
        tokens, train, infer, where=f"{arms[1]}~{arms[0]}", is_foreign=is_foreign, has_places=has_places
    )

    first_of = dict(zip(row_N[start_S].tolist(), start_S.tolist(), strict=True))

    def in_table(place: Place) -> Place:
        row = order_N[first_of[int(place.seq_id)] + place.position]
        name = row_T[row] if sequence_names_S is None else sequence_names_S[row_T[row]]
        return Place(name.item() if isinstance(name, np.generic) else name, int(position_T[row]))

    return by_level([replace(item, places=tuple(map(in_table, item.places))) for item in found])


def check_steps(
    step_T: NDArray[Any], *columns: Any, sequence_names_S: NDArray[Any] | None = None, **facts: Any
) -> list[Finding]:
    """Findings on the tokens of a training: of all steps together, then of single steps what the whole does not show.

    Args:
        step_T: training step of every token.
        columns, sequence_names_S, facts: as :func:`check_tokens` takes them; a sequence is known by its step and name.
    """
    train_T, infer_T, sequence_T, position_T = columns
    steps, number_T = np.unique(step_T, return_inverse=True)
    sequences, row_T = np.unique(sequence_T, return_inverse=True)
    arrays = {name: np.asarray(value) for name, value in facts.items() if isinstance(value, np.ndarray)}
    plain = {name: value for name, value in facts.items() if name not in arrays}

    def check(some_T: Any, sequence_T: NDArray[Any], names_S: NDArray[Any] | None = None) -> list[Finding]:
        parts = {name: values_T[some_T] for name, values_T in arrays.items()}
        parts |= {"sequence_names_S": names_S, **plain}
        return check_tokens(train_T[some_T], infer_T[some_T], sequence_T[some_T], position_T[some_T], **parts)

    found = check(slice(None), number_T * len(sequences) + row_T)
    found = [replace(item, places=()) for item in found]  # sequences of all steps have no names of their own
    known = {item.rule for item in found}
    order_T = np.argsort(number_T, kind="stable")
    ends = np.cumsum(np.bincount(number_T))
    for step, start, end in zip(steps.tolist(), [0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        alone = check(order_T[start:end], sequence_T, sequence_names_S) if len(steps) > 1 else []
        found += [replace(item, where=f"step {step} {item.where}") for item in alone if item.rule not in known]
    return by_level(found)


def _versions(version_N: NDArray[Any]) -> NDArray[np.object_]:
    """As a token table has them: None = not known."""
    return np.array([one or None for one in version_N], dtype=object)


def _sample_index(prompt_N: NDArray[Any], start_S: NDArray[Any]) -> NDArray[np.int32]:
    """(S,) which sample of its prompt every sequence is."""
    prompt_S = prompt_N[start_S]
    order_S = np.argsort(prompt_S, kind="stable")
    first_S = np.r_[True, np.diff(prompt_S[order_S]) != 0]
    here_S = np.arange(len(order_S))
    index_S = np.empty(len(order_S), dtype=np.int32)
    index_S[order_S] = here_S - np.maximum.accumulate(np.where(first_S, here_S, 0))
    return index_S


def unmasked_padding(is_zero_T: NDArray[np.bool_], start_S: NDArray[np.intp], where: str) -> list[Finding]:
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
