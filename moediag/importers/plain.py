"""Plain tables as rollouts: a row per token (:mod:`~moediag.importers.tokens`) or per sequence
(:mod:`~moediag.importers.sequences`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moediag.errors import DumpError
from moediag.importers.columns import PLACE, is_token_table
from moediag.importers.rollouts import Importer, Options, Rollout, Step, from_mask
from moediag.importers.sequences import Dump, is_sequence_table, read_sequences, total_experts
from moediag.importers.tables import KINDS, Ids, open_table
from moediag.importers.tokens import LOGPS, LoggedTokens, TokenTable, canonical_order
from moediag.notation import INFER, NOT_ROUTED, TRAIN

_NOT_KEPT: Final = ("logp_train_new", "n_flipped_layers", "temperature")
_ENTROPY_OF: Final = {"entropy": INFER, "entropy_train": TRAIN}
_SIDE_OF: Final = {"logp_infer": INFER, "logp_train": TRAIN}


def _names(path: Path) -> tuple[str, ...]:
    """Columns of a table; none where a file is no table."""
    if path.suffix not in KINDS:
        return ()
    try:
        return tuple(open_table(path).types)
    except DumpError:
        return ()


def is_tokens(path: Path) -> bool:
    """Whether a file is a table of one row per token."""
    names = _names(path)
    return is_token_table(names) and not is_sequence_table(names)


def read_tokens(files: Sequence[Path], options: Options) -> list[Step]:
    """The steps of one table."""
    if len(files) > 1:
        raise DumpError(
            f"{files[0]} and {files[1]} are two tables; a table stands alone, with a column step where it has several"
        )
    table = TokenTable.of(files[0], options.mask, "choose one with --mask COLUMN")
    if not table.has_places:
        missing = " and ".join(PLACE)
        raise DumpError(
            f"{table.where} lacks {missing}, which a run needs; moediag validate and simulate take it as it is"
        )
    tokens = table.read(options.on_progress)
    order_N = canonical_order(tokens.columns, tokens.where)
    step_N = tokens.columns["step"][order_N] if "step" in tokens.columns else None
    numbers: list[int | None] = [None] if step_N is None else [int(step) for step in np.unique(step_N)]
    steps = []
    for number in numbers:
        rows = order_N if step_N is None else order_N[step_N == number]
        notes = list(tokens.notes())
        kept = [name for name in _NOT_KEPT if name in tokens.columns]
        if kept:
            notes.append(f"columns not kept in a run: {', '.join(kept)}")
        steps.append(Step(number, tuple(files), _sequences(tokens, table, rows), notes))
    return steps


def _sequences(tokens: LoggedTokens, table: TokenTable, rows: NDArray[np.intp]) -> Iterator[Rollout]:
    columns = tokens.columns
    is_trained_N = np.zeros(len(columns["position"]), np.bool_)
    is_trained_N[tokens.input_row_T] = True
    is_response_N = table.response_rows() if {"is_response", "is_trained"} <= {*table.there} else None
    seq_N = columns["seq_id"].row_T[rows]
    bounds = np.flatnonzero(np.r_[True, np.diff(seq_N) != 0, True])
    for start, end in pairwise(bounds):
        here = rows[start:end]
        trained_T = is_trained_N[here]
        reward = columns["reward"][here] if "reward" in columns else np.full(len(here), np.nan)
        known = reward[~np.isnan(reward)]
        if len(known) and (known != known[0]).any():
            raise DumpError(
                f"{tokens.where}: reward changes within sequence {columns['seq_id'][slice(here[0], here[0] + 1)][0]}"
            )
        logp = {}
        for name in LOGPS[:2]:
            values_T = np.minimum(columns[name][here], 0.0)
            values_T[~trained_T & (values_T == 0)] = np.nan  # padding's filler
            logp[_SIDE_OF[name]] = values_T
        version_T = columns["weight_version"][here] if "weight_version" in columns else None
        is_response_T = from_mask(trained_T) if is_response_N is None else is_response_N[here]
        yield Rollout(
            where=f"{tokens.where} sequence {columns['seq_id'][slice(here[0], here[0] + 1)][0]}",
            is_response_T=is_response_T,
            token_id_T=columns["token_id"][here] if "token_id" in columns else None,
            is_trained_T=trained_T,
            logp=logp,
            entropy={side: columns[name][here] for name, side in _ENTROPY_OF.items() if name in columns},
            turn_T=_turns(columns["turn"][here]) if "turn" in columns else None,
            weight_version_T=None if version_T is None else np.array([one or None for one in version_T], object),
            advantage_T=np.where(is_response_T, columns["advantage"][here], np.nan) if "advantage" in columns else None,
            reward=float(known[0]) if len(known) else float("nan"),
            prompt=_first(columns["prompt_id"], here) if "prompt_id" in columns else None,
        )


def _first(ids: Ids, here: NDArray[np.intp]) -> Any:
    return int(ids.row_T[here[0]])


def _turns(values_T: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.where(np.isnan(values_T), -1, values_T).astype(np.int32)


def is_sequences(path: Path) -> bool:
    """Whether a file is a dump of one row per sequence, in vLLM's own names."""
    names = _names(path)
    return "prompt_token_ids" in names and "token_ids" in names


def read_dump(files: Sequence[Path], options: Options) -> list[Step]:
    """The one step of a dump of sequences."""
    if len(files) > 1:
        raise DumpError(f"{files[0]} and {files[1]} are two dumps of sequences; import them apart")
    dump = read_sequences(files[0], total_experts(options.n_experts, options.n_zero_experts), options.first_row)
    if dump.train_token_ids:
        bounds = dump.tokens.sequence_bounds()
        for i, other in dump.train_token_ids.items():
            if not np.array_equal(dump.tokens.token_id_T[slice(*bounds[i])], other):
                raise DumpError(
                    f"{files[0]} sequence {i} has other token ids on the train side; a run holds one token table "
                    "(moediag validate says where they differ)"
                )
    return [Step(None, tuple(files), _of_dump(dump, files[0]))]


def _of_dump(dump: Dump, path: Path) -> Iterator[Rollout]:
    tokens = dump.tokens
    for start, end in tokens.sequence_bounds():
        here = slice(start, end)
        routes = {
            side: _with_slots(capture.expert_ids_TLK[here], dump.is_dense_L.get(side))
            for side, capture in dump.captures.items()
            if capture.expert_ids_TLK is not None
        }
        yield Rollout(
            where=f"{path} sequence {int(tokens.seq_id_T[start])}",
            is_response_T=tokens.is_response_T[here],
            token_id_T=tokens.token_id_T[here],
            logp={side: capture.logp_T[here].astype(np.float64) for side, capture in dump.captures.items()},
            expert_ids=routes,
            prompt=int(tokens.prompt_id_T[start]),
        )


def _with_slots(ids_TLK: NDArray[np.int16], is_dense_L: NDArray[np.bool_] | None) -> NDArray[np.int16]:
    """Routes with the slots of dense layers, which :func:`read_sequences` left out."""
    if is_dense_L is None:
        return ids_TLK
    whole = np.zeros((len(ids_TLK), len(is_dense_L), ids_TLK.shape[2]), np.int16)
    whole[(ids_TLK == NOT_ROUTED).all(axis=(1, 2))] = NOT_ROUTED
    whole[:, ~is_dense_L] = ids_TLK
    return whole


TABLE: Final = Importer(
    "table", "a table with a row per token: seq_id, position, logp_train, logp_infer (.parquet, .csv, .jsonl)",
    is_tokens, read_tokens,
)  # fmt: skip
SEQUENCES: Final = Importer(
    "sequences", "a dump with a row per sequence: prompt_token_ids, token_ids, and of logprobs, routed_experts, "
    "train_logprobs, train_routed_experts what is there (.parquet, .jsonl)", is_sequences, read_dump,
)  # fmt: skip
