"""Where logged tokens come from: a pair of a run, a table on disk, or columns in memory; all become one ``Batch``.

Invariants:
    - the batch is in canonical order (sequence, position) whatever the order of the rows, so the same tokens give the
      same weights and statistics through any route;
    - a row that is no response token takes no part, and gets weight 0 where weights go back to the rows;
    - rewards are the data's own, or the stated synthetic one, or none: never made up in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.tokens import token_frame
from moediag.corrections.batch import Batch
from moediag.corrections.logged_tokens import IS_RESPONSE, LoggedTokens
from moediag.corrections.loss_masks import LossMasks, unmasked_padding
from moediag.corrections.rewards import ADVANTAGE_WORDS, REWARD_WORDS, grpo_advantages, sequence_rewards
from moediag.corrections.table_files import Columns, Ids, Kind, OnProgress, TableFile, as_flags, open_table
from moediag.errors import DumpError
from moediag.hygiene.findings import Finding, by_level
from moediag.hygiene.logged import check_tokens
from moediag.notation import NO_TOKEN
from moediag.run.reader import Run

Float64 = NDArray[np.float64]

REQUIRED: Final[dict[str, Kind]] = {"seq_id": "id", "position": "whole", "logp_train": "number", "logp_infer": "number"}
OPTIONAL: Final[dict[str, Kind]] = {
    "prompt_id": "id",
    "sample_index": "whole",
    "advantage": "number",
    "reward": "number",
    "entropy": "number",
    "logp_train_new": "number",
    "token_id": "whole",
    "n_flipped_layers": "whole",
}
KEYS: Final[tuple[str, ...]] = ("seq_id", "position", "prompt_id", "sample_index")
"""What names a row in a table of weights, as far as the table has it."""

LOGP_ALIASES: Final[dict[str, tuple[str, str]]] = {
    "verl": ("old_log_probs", "rollout_log_probs"),
    "TRL": ("old_per_token_logps", "sampling_per_token_logps"),
    "NeMo-RL": ("prev_logprobs", "generation_logprobs"),
    "prime-rl": ("trainer_logprobs", "inference_logprobs"),
}
"""Framework -> its names of (logp_train, logp_infer): taken only when both are there, for one of them alone may be
either side elsewhere (AReaL calls the rollout's ``old_logp``)."""

ALIASES: Final = {
    "entropy": "entropy_infer",
    "advantage": "advantages",
    "reward": "rewards",
}

_SIDES: Final = ("logp_train", "logp_infer")
_PANDAS: Final = re.compile(r"__index_level_\d+__")
"""A frame's index, which pandas writes into parquet as a column."""

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
        reward: ``none`` or ``hash``; None = hash where token ids are known, else none.

    Raises:
        IncompleteRunError: an arm or shard is missing.
        DumpError: a reward that a run does not have, or that its lack of token ids does not allow.
    """
    if reward not in (None, NO_REWARD, HASH_REWARD):
        raise DumpError(f"{run.path} is a run and holds no column {reward}; --reward takes none or hash for a run")
    pair = run.pair(*arms)
    notes = tuple(filter(None, [run.other_weights(pair.minuend, pair.subtrahend)]))
    frame = token_frame(pair).rename(columns={"entropy_infer": "entropy"})
    if (frame["token_id"] == NO_TOKEN).any():
        if reward == HASH_REWARD:
            raise DumpError(f"{run.path} lacks token ids, which --reward hash wants")
        frame = frame.drop(columns="token_id")
    names = {name: kind for name, kind in {**REQUIRED, **OPTIONAL}.items() if name in frame}
    columns = {name: _as_kind(frame[name], kind) for name, kind in names.items()}
    return columns_source(columns, f"{run.path} {pair.name}", reward, notes, is_foreign=False)


def table_source(
    path: Path, reward: str | None = None, on_progress: OnProgress | None = None, mask: str | None = None
) -> Source:
    """The response tokens of a table on disk.

    Args:
        reward: ``none``, ``hash`` or the column of rewards; None = the advantage or reward column where there is one,
            else hash where there are token ids, else none.
        mask: the column of the loss mask; None = the one known by its name (:data:`~moediag.corrections.loss_masks`).

    Raises:
        DumpError: the table cannot be read, lacks a column, or holds what no log has.
    """
    table = open_table(path)
    name_of, notes = _names(table, reward)
    masks = LossMasks.among(table.types, str(path), mask, "choose one with --mask COLUMN")
    kinds: dict[str, Kind] = {theirs: {**REQUIRED, **OPTIONAL}[ours] for ours, theirs in name_of.items()}
    unused = [name for name in table.types if not (name in kinds or name in masks.columns or _PANDAS.match(name))]
    if unused:
        notes = (*notes, f"columns not used: {', '.join(unused)}")
    read = table.read({**kinds, **dict.fromkeys(masks.columns, "flag")}, on_progress)
    columns = {ours: read[theirs] for ours, theirs in name_of.items()}
    return _masked_source(columns, masks, read, reward, notes)


def frame_source(frame: pd.DataFrame, reward: str | None = None) -> Source:
    """The response tokens of a frame with the columns of a table.

    Raises:
        DumpError: as :func:`table_source`.
    """
    missing = [name for name in REQUIRED if name not in frame]
    if missing:
        raise DumpError(f"the frame lacks {', '.join(missing)}; found {', '.join(map(str, frame.columns))}")
    columns = {name: _as_kind(frame[name], kind) for name, kind in {**REQUIRED, **OPTIONAL}.items() if name in frame}
    masks = LossMasks.among(frame.columns, "the frame")
    return _masked_source(columns, masks, {name: _as_kind(frame[name], "flag") for name in masks.columns}, reward, ())


def _masked_source(
    columns: Columns, masks: LossMasks, flags: Columns, reward: str | None, notes: tuple[str, ...]
) -> Source:
    is_response_T, said = masks.response(flags)
    if is_response_T is None:
        return columns_source(columns, masks.where, reward, notes, is_masked=False)
    return columns_source({**columns, IS_RESPONSE: is_response_T}, masks.where, reward, (*said, *notes))


def columns_source(
    columns: Columns,
    where: str,
    reward: str | None = None,
    notes: tuple[str, ...] = (),
    *,
    is_masked: bool = True,
    is_foreign: bool = True,
) -> Source:
    """The response tokens of columns in memory.

    Args:
        columns: the names of :data:`REQUIRED` and any of :data:`OPTIONAL`, one entry per row, and ``is_response``
            where some rows are no response tokens.
        where: what they were read from, for messages.
        reward: as for :func:`table_source`.
        notes: what was said of the columns before.
        is_masked: whether prompt and padding are known to be ruled out; else what looks like them is a finding.
        is_foreign: whether another tool made the data.

    Raises:
        DumpError: rows that no log has: twice the same place, log-probabilities above 0, a reward that changes within
            a sequence, and so on; the first of them is named.
    """
    n_rows = len(columns["position"])
    tokens = LoggedTokens.of(columns, where)
    advantage_T, reward_S, words = _advantages(tokens, reward)
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
    keys = {name: columns[name] for name in KEYS if name in columns}
    padding = () if is_masked else tuple(unmasked_padding(tokens.is_zero_T, tokens.start_S, where))
    known = {found.rule for found in padding}
    findings = by_level([*padding, *(found for found in _findings(tokens, is_foreign) if found.rule not in known)])
    return Source(batch, keys, n_rows, tokens.input_row_T, words, (*notes, *tokens.notes()), tuple(findings))


def _findings(tokens: LoggedTokens, is_foreign: bool) -> list[Finding]:
    """What the rules of ``validate`` find in the tokens, as they were read."""
    return check_tokens(
        tokens.raw("logp_train"),
        tokens.raw("logp_infer"),
        tokens.row_T,
        tokens.columns["position"][tokens.input_row_T],
        sequence_names_S=tokens.seq_id_S,
        prompt_T=tokens.prompt_row_S[tokens.row_T],
        entropy_T=tokens.get("entropy"),
        is_foreign=is_foreign,
    )


def _as_kind(column: pd.Series, kind: Kind) -> Any:
    try:
        if kind == "id":
            return Ids.of(column.to_numpy())
        if kind == "flag":
            return as_flags(column.to_numpy(), f"column {column.name}")
        return column.to_numpy(np.float64 if kind == "number" else np.int64)
    except (TypeError, ValueError):
        wanted = {"id": "numbers or words", "number": "numbers", "flag": "true or false", "whole": "whole numbers"}[
            kind
        ]
        raise DumpError(f"column {column.name} wants {wanted}, found {column.dtype}") from None


def _names(table: TableFile, reward: str | None) -> tuple[dict[str, str], tuple[str, ...]]:
    """Our name -> the table's, of the columns to read; and which names were taken for which."""
    there = table.types
    name_of = {name: name for name in (*REQUIRED, *OPTIONAL) if name in there}
    taken = {ours: theirs for ours, theirs in ALIASES.items() if ours not in there and theirs in there}
    taken |= _framework_names(table)
    name_of |= taken
    missing = [name for name in REQUIRED if name not in name_of]
    if missing:
        pairs = "; ".join(f"{framework}: {' and '.join(names)}" for framework, names in LOGP_ALIASES.items())
        raise DumpError(
            f"{table.path} lacks {', '.join(missing)}; found {', '.join(there) or 'no column'} "
            f"(log-probabilities are also taken as {pairs})"
        )
    notes = tuple(f"column {theirs} taken as {ours}" for ours, theirs in taken.items())
    return _with_reward(name_of, table, reward), notes


def _framework_names(table: TableFile) -> dict[str, str]:
    there = table.types
    if "logp_train" in there or "logp_infer" in there:
        return {}
    found = {framework: names for framework, names in LOGP_ALIASES.items() if all(name in there for name in names)}
    if len(found) > 1:
        raise DumpError(f"{table.path} has the log-probabilities of {' and '.join(found)}; rename one pair")
    return {ours: theirs for names in found.values() for ours, theirs in zip(_SIDES, names, strict=True)}


def _with_reward(name_of: dict[str, str], table: TableFile, reward: str | None) -> dict[str, str]:
    """The columns to read, without those of rewards that are not asked for."""
    sources = ("advantage", "reward", "token_id")
    if reward not in (None, NO_REWARD, HASH_REWARD, *sources[:2]):
        if reward not in table.types:
            raise DumpError(f"{table.path} has no column {reward} for --reward; found {', '.join(table.types)}")
        name_of, wanted = {**name_of, "reward": str(reward)}, "reward"
    else:
        wanted = {HASH_REWARD: "token_id", NO_REWARD: ""}.get(str(reward), reward or "")
        if reward is None:
            wanted = next((name for name in sources if name in name_of), "")
        if wanted and wanted not in name_of:
            raise DumpError(f"{table.path} has no column {wanted}, which --reward {reward} wants")
    return {ours: theirs for ours, theirs in name_of.items() if ours not in sources or ours == wanted}


def _advantages(tokens: LoggedTokens, reward: str | None) -> tuple[Float64 | None, Float64 | None, str]:
    """Advantage of every token, reward of every sequence, and where they come from in words."""
    columns: Mapping[str, Any] = tokens.columns
    if reward == NO_REWARD:
        return None, None, NO_REWARD_WORDS
    if "advantage" in columns and reward in (None, "advantage"):
        advantage_T = tokens.raw("advantage")
        _refuse_missing_advantage(tokens, advantage_T)
        return advantage_T, None, "advantages as the table has them"
    if "reward" in columns and reward != HASH_REWARD:
        reward_S = tokens.by_sequence("reward")
        words = f"rewards as the table has them; advantages {ADVANTAGE_WORDS}"
    elif "token_id" in columns:
        token_id_T = np.asarray(columns["token_id"])[tokens.input_row_T]
        reward_S = sequence_rewards(token_id_T, tokens.row_T, len(tokens.seq_id_S))
        words = f"{REWARD_WORDS}; advantages {ADVANTAGE_WORDS}"
    else:
        return None, None, NO_REWARD_WORDS
    return grpo_advantages(reward_S, tokens.prompt_row_S)[tokens.row_T], reward_S, words


def _refuse_missing_advantage(tokens: LoggedTokens, advantage_T: Float64) -> None:
    is_bad_T = tokens.is_scored_T & ~np.isfinite(advantage_T)
    if is_bad_T.any():
        raise DumpError(
            f"{tokens.where}: advantage is missing in {int(is_bad_T.sum()):,} scored rows, first "
            f"{tokens.place(is_bad_T)}; every scored token wants one"
        )
