"""Logged tokens of a run's pair or of a table as one token view, with their advantages and the way back to their rows.

Invariants:
    - the view is in canonical order (sequence, position) whatever the order of the rows, so the same tokens give the
      same weights and statistics through any route;
    - a row that is no response token takes no part, and gets weight 0 where weights go back to the rows;
    - rewards are the data's own, or the stated synthetic one, or none: never made up in silence. The synthetic reward
      depends on the text and on nothing else: no tokenizer, no random state, the same on every machine. A reward that
      does not look at the text would have an expected policy gradient of exactly zero (any baseline does:
      sum_y pi(y) grad log pi(y) = 0), so whatever is then measured of a gradient is noise;
    - an advantage is finite: where a group has no spread it is 0, no signal, and not a division by 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moediag.analysis.tokens import token_frame
from moediag.corrections.correction import Correction
from moediag.corrections.terms import Float64, Terms
from moediag.errors import DumpError, MoediagError
from moediag.hygiene.findings import Finding
from moediag.hygiene.logged import check_logged
from moediag.importers.columns import KEYS, KNOWN
from moediag.importers.tables import Columns, OnProgress, frame_column
from moediag.importers.tokens import LoggedTokens, TokenTable
from moediag.notation import NO_TOKEN
from moediag.run.reader import Run

NO_REWARD: Final = "none"
HASH_REWARD: Final = "hash"
NO_REWARD_WORDS: Final = (
    "no reward and no advantage: corrections and statistics that look at advantages (dppo_tv, dppo_kl, the objective) "
    "are left out"
)
REWARD_WORDS: Final = "synthetic: share of response tokens whose splitmix64(token id) has its lowest bit set"
"""How the synthetic reward is named wherever a number depends on it."""

ADVANTAGE_WORDS: Final = (
    "group-normalised within the prompt, (r - mean) / std with ddof 1; a prompt with one sample takes the mean of all "
    "other prompts' sequences and the std of all sequences"
)


@dataclass(frozen=True)
class Source:
    """Logged tokens, and the way back to the rows that they came from.

    Args:
        tokens: response tokens in canonical order.
        keys: columns that name a row, in the order of the rows.
        n_rows: rows, response tokens and others.
        input_row_T: row of every response token.
        reward: where advantages come from, in words.
        notes: what a reader has to know of how the rows were read.
        findings: what is wrong with them, or likely so, by the rules of ``validate``.
    """

    tokens: Terms
    keys: Columns
    n_rows: int
    input_row_T: NDArray[np.intp]
    reward: str
    notes: tuple[str, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def is_in_order(self) -> bool:
        """Whether every row is a response token, and they are in its order."""
        return self.n_rows == len(self.input_row_T) and bool((np.diff(self.input_row_T) == 1).all())

    def to_rows(self, weights_T: Float64) -> Float64:
        """Weights of the response tokens at their rows; other rows get 0."""
        weights_N = np.zeros(self.n_rows)
        weights_N[self.input_row_T] = weights_T
        return weights_N

    def weights(self, correction: Correction) -> Float64:
        """Weights of every row under one correction, in the order of the rows; 0 = no update."""
        return self.to_rows(np.concatenate([x.at_rows(correction.of_terms(x)) for x in self.tokens.chunks()]))


def run_source(run: Run, arms: tuple[str, str], reward: str | None = None) -> Source:
    """The response tokens of a pair of a run.

    Args:
        arms: the two arms, in any order.
        reward: ``none``, ``hash``, or ``advantage`` or ``reward`` where the run's tokens have them (it was imported);
            None = the advantages or rewards that are there, else hash where token ids are known, else none.

    Raises:
        IncompleteRunError: an arm or shard is missing.
        DumpError: a reward that the run does not have, or that its lack of token ids does not allow.
    """
    logged = _logged(run)
    if reward not in (None, NO_REWARD, HASH_REWARD, *logged):
        takes = " or ".join([NO_REWARD, HASH_REWARD, *logged])
        raise DumpError(f"{run.path} is a run and holds no column {reward}; --reward takes {takes} for a run")
    pair = run.pair(*arms)
    notes = tuple(filter(None, [run.other_weights(pair.minuend, pair.subtrahend)]))
    frame = token_frame(pair).rename(columns={"entropy_infer": "entropy"})
    if reward not in (NO_REWARD, HASH_REWARD):
        frame = frame.assign(**{name: logged[name] for name in ([reward] if reward else list(logged)[:1])})
    if (frame["token_id"] == NO_TOKEN).any():
        if reward == HASH_REWARD:
            raise DumpError(f"{run.path} lacks token ids, which --reward hash needs")
        frame = frame.drop(columns="token_id")
    columns = {name: frame_column(frame, name, column.kind) for name, column in KNOWN.items() if name in frame}
    every_N = np.ones(len(frame), np.bool_)
    tokens = LoggedTokens.of(columns, f"{run.path} {pair.name}", every_N, notes=notes)
    is_foreign = all(run.arm(arm).captured is None for arm in arms)
    return _source(tokens, reward, is_foreign=is_foreign, holder="the run")


def _logged(run: Run) -> dict[str, Float64]:
    """Advantages and rewards of the run's response tokens, in that order, where they were imported with them."""
    if run.record.tokens.origin != "imported":
        return {}
    parts: dict[str, list[Float64]] = {"advantage": [], "reward": []}
    for shard in run.shards:
        tokens = run.tokens(shard)
        for name, found in parts.items():
            values_T: Float64 | None = getattr(tokens, f"{name}_T")
            found.append((np.full(len(tokens), np.nan) if values_T is None else values_T)[tokens.is_scored_T])
    joined = {name: np.concatenate(found) for name, found in parts.items()}
    return {name: values_T for name, values_T in joined.items() if np.isfinite(values_T).any()}


def table_source(
    table: Path | pd.DataFrame,
    reward: str | None = None,
    on_progress: OnProgress | None = None,
    mask: str | None = None,
) -> Source:
    """The response tokens of a table of one row per token, a file or a frame.

    Args:
        reward: ``none``, ``hash`` or the column of rewards; None = the advantage or reward column where there is one,
            else hash where there are token ids, else none.
        mask: the column of the loss mask; None = the one known by its name (:mod:`~moediag.importers.columns`).

    Raises:
        DumpError: the table cannot be read, lacks a column, or holds what no log has.
    """
    known = TokenTable.of(table, mask, "choose one with --mask COLUMN").without(
        ("step", "turn", "weight_version", "entropy_train")
    )
    return _source(_with_reward(known, reward).read(on_progress), reward)


def _source(tokens: LoggedTokens, reward: str | None, *, is_foreign: bool = True, holder: str = "the table") -> Source:
    advantage_T, words = _advantages(tokens, reward, holder)
    frame = tokens.frame
    if advantage_T is not None:
        frame["advantage"] = advantage_T
    return Source(
        Terms(frame),
        keys={name: tokens.columns[name] for name in KEYS if name in tokens.columns},
        n_rows=len(tokens.columns["position"]),
        input_row_T=tokens.input_row_T,
        reward=words,
        notes=tokens.notes(),
        findings=tuple(check_logged(tokens, is_foreign=is_foreign)),
    )


def _with_reward(table: TokenTable, reward: str | None) -> TokenTable:
    """The table without the columns of rewards that are not used."""
    sources = ("advantage", "reward", "token_id")
    if reward not in (None, NO_REWARD, HASH_REWARD, *sources[:2]):
        if reward not in table.there:
            raise DumpError(f"{table.where} has no column {reward} for --reward; found {', '.join(table.there)}")
        table, used = replace(table, name_of={**table.name_of, "reward": str(reward)}), "reward"
    else:
        used = {HASH_REWARD: "token_id", NO_REWARD: ""}.get(str(reward), reward or "")
        if reward is None:
            used = next((name for name in sources if name in table.name_of), "")
        if used and used not in table.name_of:
            raise DumpError(f"{table.where} has no column {used}, which --reward {reward} needs")
    return table.without([name for name in sources if name != used])


def _advantages(tokens: LoggedTokens, reward: str | None, holder: str) -> tuple[Float64 | None, str]:
    """Advantage of every token, and where it comes from in words."""
    if reward == NO_REWARD:
        return None, NO_REWARD_WORDS
    if "advantage" in tokens.columns and reward in (None, "advantage"):
        advantage_T = tokens.number("advantage")
        is_missing_T = tokens.is_scored_T & ~np.isfinite(advantage_T)
        tokens.refuse(
            is_missing_T, "advantage is missing in {n} scored rows, first {place}; every scored token needs one"
        )
        return advantage_T, f"advantages as {holder} has them"
    if "reward" in tokens.columns and reward != HASH_REWARD:
        reward_S, words = tokens.by_sequence("reward"), f"rewards as {holder} has them"
    elif (token_id_T := tokens.get("token_id")) is not None:
        reward_S, words = sequence_rewards(token_id_T, tokens.row_T, len(tokens.seq_id_S)), REWARD_WORDS
    else:
        return None, NO_REWARD_WORDS
    return grpo_advantages(reward_S, tokens.prompt_row_S)[tokens.row_T], f"{words}; advantages {ADVANTAGE_WORDS}"


_GAMMA, _MIX_1, _MIX_2 = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def splitmix64(values: ArrayLike) -> NDArray[np.uint64]:
    """The splitmix64 hash of integers, taken modulo 2^64.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.

    Example:
        >>> int(splitmix64(0)[()])
        16294208416658607535
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the definition
        z = np.asarray(values).astype(np.int64).astype(np.uint64) + _GAMMA
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return np.asarray(z ^ (z >> np.uint64(31)))


def token_rewards(token_id_T: ArrayLike) -> Float64:
    """Reward of every token: 1 where its hash has the lowest bit set, else 0.

    About half of any vocabulary has it, frequent and rare tokens alike, so the reward is neither a length nor a
    confidence in disguise.

    Args:
        token_id_T: token ids.

    Returns:
        (T,) float64, 0 or 1 [reward].

    Source: ours.

    Example:
        >>> token_rewards([0, 1, 2, 3, 4, 5, 6, 7]).tolist()
        [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    """
    return (splitmix64(token_id_T) & np.uint64(1)).astype(np.float64)


def sequence_rewards(token_id_T: ArrayLike, row_T: ArrayLike, n_sequences: int) -> Float64:
    """Reward of every sequence: the mean reward of its response tokens.

    Args:
        token_id_T: ids of response tokens, rows in any order.
        row_T: 0 .. S-1, the sequence of every token.
        n_sequences: S.

    Returns:
        (S,) rewards in [0, 1]; NaN for a sequence without a token.
    """
    row_T = np.asarray(row_T, dtype=np.intp)
    n_S = np.bincount(row_T, minlength=n_sequences)
    sum_S = np.bincount(row_T, weights=token_rewards(token_id_T), minlength=n_sequences)
    return np.asarray(sum_S / np.where(n_S, n_S, np.nan))


def grpo_advantages(reward_S: ArrayLike, prompt_id_S: NDArray[Any]) -> Float64:
    """Group-relative advantage of every sequence.

    With two samples or more of a prompt: (r - mean) / std over the prompt's samples, std with ddof = 1 (torch.std, as
    TRL and verl take it) and nothing added to it. A prompt with a single sample has no group: its baseline is the mean
    reward of all other prompts' sequences, its scale the std (ddof = 1) of all sequences.

    Args:
        reward_S: reward of every sequence; NaN = no reward, advantage 0.
        prompt_id_S: its prompt.

    Returns:
        (S,) advantages [1]; 0 where the group (or the batch) has no spread.

    Raises:
        MoediagError: the arrays differ in length.

    Source: GRPO (arXiv 2402.03300), equation for outcome supervision; the single-sample baseline is RLOO's.

    Example:
        >>> grpo_advantages([0.0, 1.0, 3.0, 3.0], np.array([7, 7, 8, 8])).round(4).tolist()
        [-0.7071, 0.7071, 0.0, 0.0]
    """
    reward_S, prompt_id_S = np.asarray(reward_S, dtype=np.float64), np.asarray(prompt_id_S)
    if reward_S.shape != prompt_id_S.shape or reward_S.ndim != 1:
        raise MoediagError(f"grpo_advantages needs one prompt per reward, found {reward_S.shape}, {prompt_id_S.shape}")
    has_S = np.isfinite(reward_S)
    advantage_S = np.zeros(len(reward_S))
    if has_S.any():
        _, row_S = np.unique(prompt_id_S[has_S], return_inverse=True)
        advantage_S[has_S] = _grouped(reward_S[has_S], row_S)
    return advantage_S


def _grouped(reward_S: Float64, row_S: NDArray[np.intp]) -> Float64:
    n_C, sum_C = np.bincount(row_S), np.bincount(row_S, weights=reward_S)
    centred_S = reward_S - (sum_C / n_C)[row_S]
    variance_C = np.bincount(row_S, weights=np.square(centred_S)) / np.maximum(n_C - 1, 1)
    is_single_S = n_C[row_S] == 1
    n_others = len(reward_S) - 1
    if n_others:
        others_S = (reward_S.sum() - reward_S) / n_others
        centred_S = np.where(is_single_S, reward_S - others_S, centred_S)
    scale_S = np.where(is_single_S, reward_S.std(ddof=1) if n_others else 0.0, np.sqrt(variance_C)[row_S])
    # rewards that are equal leave a std of rounding size: that is no spread
    is_spread_S = scale_S > 1e-12 * max(1.0, float(np.abs(reward_S).max()))
    return np.asarray(np.where(is_spread_S, centred_S / np.where(is_spread_S, scale_S, 1.0), 0.0))
