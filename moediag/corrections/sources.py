"""Where logged tokens come from: a pair of a run, a table on disk, or columns in memory; all become one ``Batch``.

Invariants:
    - the batch is in canonical order (sequence, position) whatever the order of the rows, so the same tokens give the
      same weights and statistics through any route;
    - a row that is no response token takes no part, and gets weight 0 where weights go back to the rows;
    - rewards are the data's own, or the stated synthetic one, or none: never made up in silence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.tokens import token_frame
from moediag.corrections.batch import Batch
from moediag.corrections.rewards import ADVANTAGE_WORDS, REWARD_WORDS, grpo_advantages, sequence_rewards
from moediag.errors import DumpError
from moediag.hygiene.findings import Finding
from moediag.hygiene.logged import check_logged
from moediag.importers.columns import KEYS, KNOWN
from moediag.importers.tables import Columns, OnProgress, frame_column
from moediag.importers.tokens import LoggedTokens, TokenTable
from moediag.notation import NO_TOKEN
from moediag.run.reader import Run

Float64 = NDArray[np.float64]

NO_REWARD: Final = "none"
HASH_REWARD: Final = "hash"
NO_REWARD_WORDS: Final = (
    "no reward and no advantage: corrections and statistics that look at advantages (dppo_tv, dppo_kl, the objective) "
    "are left out"
)


@dataclass(frozen=True)
class Source:
    """Logged tokens as a batch, and the way back to the rows that they came from.

    Args:
        batch: response tokens in canonical order.
        keys: columns that name a row, in the order of the rows.
        n_rows: rows, response tokens and others.
        input_row_T: row of every token of the batch.
        reward: where advantages come from, in words.
        notes: what a reader has to know of how the rows were read.
        findings: what is wrong with them, or likely so, by the rules of ``validate``.
    """

    batch: Batch
    keys: Columns
    n_rows: int
    input_row_T: NDArray[np.intp]
    reward: str
    notes: tuple[str, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def has_advantages(self) -> bool:
        """Whether corrections that look at advantages can be simulated."""
        return self.batch.advantage_T is not None

    @property
    def is_in_order(self) -> bool:
        """Whether every row is a token of the batch, and they stand in its order."""
        return self.n_rows == len(self.batch) and bool((np.diff(self.input_row_T) == 1).all())

    def to_rows(self, weights_T: Float64) -> Float64:
        """Weights of the batch's tokens at their rows; rows that are no response token get 0."""
        weights_N = np.zeros(self.n_rows)
        weights_N[self.input_row_T] = weights_T
        return weights_N


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
    advantage_T, reward_S, words = _advantages(tokens, reward, holder)
    batch = Batch(
        logp_train_T=tokens.logps["logp_train"],
        logp_infer_T=tokens.logps["logp_infer"],
        row_T=tokens.row_T,
        seq_id_S=tokens.seq_id_S,
        prompt_row_S=tokens.prompt_row_S,
        position_T=tokens.position_T,
        advantage_T=advantage_T,
        entropy_T=tokens.get("entropy"),
        logp_train_new_T=tokens.logps.get("logp_train_new"),
        n_flipped_layers_T=tokens.get("n_flipped_layers"),
        reward_S=reward_S,
    )
    return Source(
        batch,
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


def _advantages(tokens: LoggedTokens, reward: str | None, holder: str) -> tuple[Float64 | None, Float64 | None, str]:
    """Advantage of every token, reward of every sequence, and where they come from in words."""
    if reward == NO_REWARD:
        return None, None, NO_REWARD_WORDS
    if "advantage" in tokens.columns and reward in (None, "advantage"):
        advantage_T = tokens.number("advantage")
        is_missing_T = tokens.is_scored_T & ~np.isfinite(advantage_T)
        tokens.refuse(
            is_missing_T, "advantage is missing in {n} scored rows, first {place}; every scored token needs one"
        )
        return advantage_T, None, f"advantages as {holder} has them"
    if "reward" in tokens.columns and reward != HASH_REWARD:
        reward_S = tokens.by_sequence("reward")
        words = f"rewards as {holder} has them; advantages {ADVANTAGE_WORDS}"
    elif (token_id_T := tokens.get("token_id")) is not None:
        reward_S = sequence_rewards(token_id_T, tokens.row_T, len(tokens.seq_id_S))
        words = f"{REWARD_WORDS}; advantages {ADVANTAGE_WORDS}"
    else:
        return None, None, NO_REWARD_WORDS
    return grpo_advantages(reward_S, tokens.prompt_row_S)[tokens.row_T], reward_S, words
