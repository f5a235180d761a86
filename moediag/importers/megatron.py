"""Router traces of Megatron-LM: expert ids and router logits of packed tokens, joined to a table of those tokens.

A trace has neither token ids nor boundaries of sequences. The table (``--tokens``) has a row per token, whole sequences
one behind the other: ``seq_id``, ``position``, ``token_id``; ``step``, ``rank`` and ``micro_batch`` (counted from 0)
where there are several, sequences in the order they were packed in; and what else is known of a token under the names
of :mod:`.columns`. Read from NVIDIA/Megatron-LM d98e8a6 (transformer/moe/router_trace.py).

Invariants:
    - rows are cut into sequences only where their number is that of the table, for every micro-batch;
    - a pipeline stage counts its layers from 0, so that stages are put together only as ``--pipeline-layers`` says, and
      only where their micro-batches have the same numbers of tokens;
    - ids are the recorded ones, never a top-k of the logits: those were computed again and rounded to bfloat16.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moediag.errors import DumpError
from moediag.importers.columns import KNOWN, TOKEN_MASKS, Kind
from moediag.importers.rollouts import Importer, Options, Rollout, Step, as_written, number_in, short
from moediag.importers.tables import Ids, first_record, open_table, readable
from moediag.notation import INFER, NOT_ROUTED, TRAIN

_KEYS: Final = ("step", "layer", "num_tokens", "topk")
_PACKING: Final = ("step", "rank", "micro_batch")
_IDS: Final = b'"top_indices"'


@dataclass(frozen=True)
class _Record:
    """A line of a trace: one router in one micro-batch.

    Args:
        offset: of the line in its file [byte].
        logits: where its logits are in the file beside: first byte, number of bytes, shape; None = not kept.
    """

    path: Path
    offset: int
    n_tokens: int
    logits: tuple[int, int, tuple[int, int]] | None

    def expert_ids(self) -> NDArray[np.int64]:
        """(T, K) Ids of the micro-batch's tokens."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            ids_TK = np.array(json.loads(file.readline())["top_indices"])
        if ids_TK.ndim != 2 or ids_TK.dtype.kind not in "iu" or len(ids_TK) != self.n_tokens:
            raise DumpError(
                f"{self.path}: a record of {self.n_tokens} tokens has top_indices of shape {ids_TK.shape}; expected "
                "ids in whole numbers, a row per token"
            )
        return ids_TK

    def router_logits(self) -> NDArray[np.float32] | None:
        """(T, E) Logits of the micro-batch's tokens, as bfloat16 holds them."""
        if self.logits is None:
            return None
        start, n_bytes, shape = self.logits
        path = self.path.with_name(self.path.name.replace("router_trace", "logits")).with_suffix(".bin")
        if n_bytes != 2 * shape[0] * shape[1] or shape[0] != self.n_tokens:
            raise DumpError(f"{self.path}: {n_bytes} bytes of logits for shape {shape} and {self.n_tokens} tokens")
        with readable(path), path.open("rb") as file:
            file.seek(start)
            content = file.read(n_bytes)
        if len(content) != n_bytes:
            raise DumpError(
                f"{path} ends at byte {start + len(content):,}, a record has logits up to {start + n_bytes:,}"
            )
        return np.asarray((np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape))


@dataclass
class _Trace:
    """The traces of a folder.

    Args:
        records: (step, rank) -> its micro-batches in order, each layer -> record.
    """

    folder: Path
    layers: list[int]
    records: dict[tuple[int, int], list[dict[int, _Record]]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class _Place:
    """Where a sequence's rows are: in a micro-batch, from a row on."""

    records: dict[int, _Record]
    first: int
    n: int


def read_megatron(files: Sequence[Path], options: Options) -> list[Step]:
    """The steps of the token table, with the routes of every folder of traces."""
    if options.tokens is None:
        raise DumpError(
            f"{files[0]} has neither token ids nor boundaries of sequences; give the table of its tokens: --tokens "
            "TABLE with seq_id, position, token_id, and step, rank, micro_batch where there are several"
        )
    rollouts, packing = _table(options.tokens)
    folders: dict[Path, list[Path]] = {}
    for path in files:
        folders.setdefault(path.parent, []).append(path)
    traces = [_trace(folder, paths, options.pipeline_layers) for folder, paths in folders.items()]
    sides: dict[str, tuple[_Trace, list[_Place | None]]] = {}
    for trace in traces:
        side, places = _places(trace, rollouts, packing, options.tokens)
        if side in sides:
            raise DumpError(
                f"{trace.folder} and {sides[side][0].folder} are both of the {side} side by their number of rows; "
                "import one of them"
            )
        sides[side] = trace, places
    step_S = [key[0] for key in packing]
    steps, left_out = [], []
    for number in dict.fromkeys(step_S):
        of_step = [i for i, key in enumerate(step_S) if key == number]
        here = {side: (trace, [places[i] for i in of_step]) for side, (trace, places) in sides.items()}
        here = {side: (trace, places) for side, (trace, places) in here.items() if any(places)}
        for trace, places in here.values():
            if not all(places):
                lacking = rollouts[of_step[places.index(None)]].where
                raise DumpError(f"{trace.folder} has no row of {lacking}; is a rank's file missing?")
        if not here:
            left_out.append(str(number))
            continue
        step = Step(number, (*files, options.tokens), (), has_dense_layers=dict.fromkeys(here, False))
        step.decoder_layers = {side: trace.layers for side, (trace, _) in here.items()}
        step.rollouts = as_written(step, _routed(step, [rollouts[i] for i in of_step], here, options))
        steps.append(step)
    if left_out:
        steps[0].notes.append(f"steps {', '.join(left_out)} of {options.tokens.name} have no trace and were left out")
    return steps


def _routed(
    step: Step, rollouts: Sequence[Rollout], sides: Mapping[str, tuple[_Trace, list[_Place | None]]], options: Options
) -> Iterator[Rollout]:
    is_sorted = dict.fromkeys(sides, True)
    held: dict[str, tuple[Any, Any]] = {}
    for i, rollout in enumerate(rollouts):
        for side, (trace, places) in sides.items():
            place = places[i]
            if place is None:
                continue
            if held.get(side, (None,))[0] is not place.records:  # a micro-batch is read once
                held[side] = place.records, _arrays(place.records, trace.layers)
            ids_NLK, logits_NLE = held[side][1]
            here = slice(place.first, place.first + place.n)
            rollout.expert_ids[side] = _all_rows(ids_NLK[here], len(rollout), NOT_ROUTED)
            is_sorted[side] &= bool((np.diff(ids_NLK[here], axis=2) >= 0).all())
            if logits_NLE is not None:
                rollout.router_logits[side] = _all_rows(logits_NLE[here], len(rollout), np.nan)
        yield rollout
        options.on_progress(i + 1, len(rollouts), "sequences read")
    step.notes += [
        f"{sides[side][0].folder.name}: ids are ascending, so that which expert came first is not known"
        for side, is_ascending in is_sorted.items()
        if is_ascending
    ]


def _arrays(
    records: Mapping[int, _Record], layers: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
    """(T, L, K) ids and (T, L, E) logits of a micro-batch."""
    found = {layer: records[layer].expert_ids() for layer in layers}
    widths = {ids_TK.shape[1] for ids_TK in found.values()}
    if len(widths) > 1:
        raise DumpError(f"{records[layers[0]].path}: layers with K = {sorted(widths)} in one trace; known is one K")
    ids_TLK = np.stack(list(found.values()), axis=1)
    logits = [records[layer].router_logits() for layer in layers]
    kept = [logits_TE for logits_TE in logits if logits_TE is not None]
    return ids_TLK, np.stack(kept, axis=1) if len(kept) == len(layers) else None


def _all_rows(rows: NDArray[Any], n: int, absent: float) -> NDArray[Any]:
    """Rows with one more behind, of the last token, where it has none."""
    missing = np.full((n - len(rows), *rows.shape[1:]), absent, rows.dtype)
    return np.concatenate([rows, missing])


def _places(
    trace: _Trace, rollouts: Sequence[Rollout], packing: Sequence[tuple[int | None, int, int]], table: Path
) -> tuple[str, list[_Place | None]]:
    """Which side a folder of traces is of, and where in it each sequence is.

    An engine consumes every token of a sequence but the last, a request after the other; a trainer runs packed
    micro-batches of whole sequences.

    Raises:
        DumpError: their numbers of rows are not those of the table.
    """
    batches = [records for _, found in sorted(trace.records.items()) for records in found]
    alone = [len(rollout) - 1 for rollout in rollouts]
    if [_n_tokens(records) for records in batches] == alone:
        return INFER, [_Place(records, 0, n) for records, n in zip(batches, alone, strict=True)]
    rollouts_of: dict[tuple[int | None, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, (number, rank, micro_batch) in enumerate(packing):
        rollouts_of[number, rank][micro_batch].append(i)
    places: list[_Place | None] = [None] * len(rollouts)
    only = len({step for step, _ in trace.records}) == 1
    for (step, rank), found in trace.records.items():
        key = (None, rank) if only and (None, rank) in rollouts_of else (step, rank)
        packed = rollouts_of.get(key)
        if packed is None:
            raise DumpError(
                f"{trace.folder} has a trace of step {step}, rank {rank}; {table} has no such rows (columns "
                f"{', '.join(_PACKING)}). Ranks of pipeline stages: --pipeline-layers"
            )
        if sorted(packed) != list(range(len(found))):
            raise DumpError(
                f"{trace.folder}: {len(found)} micro-batches of step {step}, rank {rank}; {table} has micro_batch "
                f"{', '.join(map(str, sorted(packed)))}. A layer that is computed twice "
                "(recomputation) is recorded twice"
            )
        for micro_batch, records in enumerate(found):
            lengths = [len(rollouts[i]) for i in packed[micro_batch]]
            n_rows = _n_tokens(records)
            if n_rows not in (sum(lengths), sum(lengths) - len(lengths)):
                raise DumpError(
                    f"{trace.folder}: micro-batch {micro_batch} of step {step}, rank {rank} has {n_rows} rows; its "
                    f"sequences have {sum(lengths)} tokens in {table}"
                )
            first, left_out = 0, int(n_rows < sum(lengths))
            for i, length in zip(packed[micro_batch], lengths, strict=True):
                places[i] = _Place(records, first, length - left_out)
                first += length - left_out
    return TRAIN, places


def _n_tokens(records: Mapping[int, _Record]) -> int:
    return next(iter(records.values())).n_tokens


def _trace(folder: Path, paths: Sequence[Path], stages: Sequence[int]) -> _Trace:
    """Where everything is in the traces of a folder; ids and logits are not read yet.

    Args:
        stages: decoder layers of every pipeline stage; empty = one stage.

    Raises:
        DumpError: a damaged line, or micro-batches that lack a layer or differ in their number of rows.
    """
    trace = _Trace(folder, [])
    ranks = Counter(number_in(path.name, r"rank(\d+)") for path in paths)
    layers_of: dict[int, set[int]] = defaultdict(set)
    for path in paths:
        rank = number_in(path.name, r"rank(\d+)") or 0
        n_seen: Counter[tuple[int, int]] = Counter()
        for offset, record in _headers(path):
            if record.get("block", "decoder") != "decoder":
                continue  # multi-token prediction: no layer of the model
            lacking = [name for name in _KEYS if type(record.get(name)) is not int]
            if lacking or record.get("rank", rank) != rank:
                raise DumpError(f"{path} at byte {offset:,}: no record of rank {rank}: {short(record)}")
            step, layer = record["step"], record["layer"]
            found = trace.records[step, rank]
            if n_seen[step, layer] == len(found):
                found.append({})
            place = None
            if "logit_offset" in record:
                place = record["logit_offset"], record["logit_bytes"], tuple(record["logit_shape"])
            found[n_seen[step, layer]][layer] = _Record(path, offset, record["num_tokens"], place)
            n_seen[step, layer] += 1
            layers_of[rank].add(layer)
    if not trace.records:
        raise DumpError(f"{paths[0]} holds no record of a decoder layer")
    missing = sorted({*range(max((rank or 0) for rank in ranks))} - {*ranks})
    if missing:
        raise DumpError(f"{folder} lacks router_trace_rank{missing[0]}.jsonl")
    if len(stages) > 1:
        layers_of = _join_stages(trace, stages, len(ranks))
    if len({frozenset(layers) for layers in layers_of.values()}) > 1:
        raise DumpError(
            f"{folder}: ranks hold other layers ({_words(layers_of)}), as pipeline stages do, which count theirs from "
            "0 each; --pipeline-layers N,N,... says how many decoder layers every stage has"
        )
    trace.layers += sorted(next(iter(layers_of.values())))
    for (step, rank), batches in trace.records.items():
        for i, records in enumerate(batches):
            where = f"{folder}: micro-batch {i} of step {step}, rank {rank}"
            if sorted(records) != trace.layers:
                raise DumpError(f"{where} has layers {sorted(records)}, the trace has {trace.layers}; it was cut short")
            if len({record.n_tokens for record in records.values()}) > 1:
                raise DumpError(f"{where}: its layers have different numbers of tokens")
    return trace


def _words(layers_of: Mapping[int, set[int]]) -> str:
    return ", ".join(f"rank {rank}: {sorted(layers)}" for rank, layers in sorted(layers_of.items())[:4])


def _join_stages(trace: _Trace, stages: Sequence[int], n_ranks: int) -> dict[int, set[int]]:
    """Put the layers of pipeline stages together, whose ranks stand block by block (Megatron's order of ranks).

    Args:
        stages: decoder layers of every stage.

    Returns:
        Rank of the first stage -> decoder layers, counted through.

    Raises:
        DumpError: ranks or layers that these stages do not have, or stages with other micro-batches.
    """
    if n_ranks % len(stages):
        raise DumpError(f"{trace.folder} has {n_ranks} ranks, which are no {len(stages)} pipeline stages of equal size")
    n = n_ranks // len(stages)
    joined: dict[tuple[int, int], list[dict[int, _Record]]] = {}
    for (step, rank), batches in sorted(trace.records.items()):
        stage, first = rank // n, sum(stages[: rank // n])
        beyond = sorted({layer for records in batches for layer in records if layer >= stages[stage]})
        if beyond:
            raise DumpError(
                f"{trace.folder}: rank {rank} has layer {beyond[0]}; its pipeline stage has {stages[stage]} layers by "
                "--pipeline-layers"
            )
        whole = joined.setdefault((step, rank % n), [{} for _ in batches])
        if len(whole) != len(batches):
            raise DumpError(
                f"{trace.folder}: rank {rank} has {len(batches)} micro-batches of step {step}, the stages before it "
                f"{len(whole)}; are these the stages of one pipeline?"
            )
        for records, more in zip(whole, batches, strict=True):
            records |= {first + layer: record for layer, record in more.items()}
    trace.records.clear()
    trace.records.update(joined)
    layers_of: dict[int, set[int]] = defaultdict(set)
    for (_, rank), batches in joined.items():
        layers_of[rank] |= {layer for records in batches for layer in records}
    return layers_of


def _headers(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a file without their ids, each with the place of its line."""
    offset = 0
    with readable(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            head, found, _ = line.partition(_IDS)
            if line.strip():
                try:
                    # ids come last and are nearly all of the line
                    record = (
                        json.loads(head.rstrip().rstrip(b",") + b"}")
                        if found and line.rstrip().endswith(b"]]}")
                        else None
                    )
                    record = json.loads(line) if record is None else record
                except ValueError as error:
                    raise DumpError(f"{path} line {number}: no JSON ({error}); it was cut short") from None
                if not isinstance(record, dict):
                    raise DumpError(f"{path} line {number}: expected a JSON object, found {type(record).__name__}")
                yield offset, record
            offset += len(line)


def _table(path: Path) -> tuple[list[Rollout], list[tuple[int | None, int, int]]]:
    """The sequences of a token table, and (step, rank, micro-batch) of each.

    Raises:
        DumpError: a column that is needed is missing, or rows are not whole sequences.
    """
    table = open_table(path)
    lacking = [name for name in ("seq_id", "position", "token_id") if name not in table.types]
    if lacking:
        raise DumpError(f"{path} lacks {', '.join(lacking)}; found {', '.join(table.types)}")
    kinds: dict[str, Kind] = {name: KNOWN[name].kind for name in KNOWN if name in table.types}
    kinds |= {name: "whole" for name in _PACKING if name in table.types}
    kinds |= {name: "flag" for name in TOKEN_MASKS if name in table.types}
    columns = table.read(kinds)
    name_T = columns["seq_id"].row_T
    is_new_T = np.diff(name_T, prepend=-1) != 0
    if "step" in columns:
        is_new_T |= np.diff(columns["step"], prepend=columns["step"][:1]) != 0
    starts = [*np.flatnonzero(is_new_T).tolist(), len(name_T)]
    rollouts, packing = [], []
    seen: set[tuple[Any, ...]] = set()
    for start, end in pairwise(starts):
        rows = slice(start, end)
        where = f"{path} seq_id {columns['seq_id'].values_N[name_T[start]]}"
        key = tuple(int(columns[name][start]) if name in columns else None for name in _PACKING)
        if (key[0], name_T[start]) in seen or not np.array_equal(columns["position"][rows], np.arange(end - start)):
            raise DumpError(f"{where}: expected its rows together, positions 0..{end - start - 1} in order")
        seen.add((key[0], name_T[start]))
        for name in _PACKING:
            if name in columns and (columns[name][rows] != columns[name][start]).any():
                raise DumpError(f"{where}: {name} changes within the sequence")
        rollouts.append(_rollout(columns, rows, where))
        packing.append((key[0], key[1] or 0, key[2] or 0))
    return rollouts, packing


def _rollout(columns: Mapping[str, Any], rows: slice, where: str) -> Rollout:
    n = rows.stop - rows.start
    mask = next((name for name in ("is_trained", *TOKEN_MASKS) if name in columns), None)
    is_trained_T = np.ones(n, np.bool_) if mask is None else columns[mask][rows]
    is_response_T = columns["is_response"][rows] if "is_response" in columns else np.logical_or.accumulate(is_trained_T)
    reward_T = columns.get("reward")
    prompts = columns.get("prompt_id")
    return Rollout(
        where=where,
        is_response_T=is_response_T,
        token_id_T=columns["token_id"][rows],
        is_trained_T=is_trained_T,
        logp={side: columns[f"logp_{side}"][rows] for side in (INFER, TRAIN) if f"logp_{side}" in columns},
        entropy={INFER: columns["entropy"][rows]} if "entropy" in columns else {},
        advantage_T=columns["advantage"][rows] if "advantage" in columns else None,
        reward=float("nan") if reward_T is None else float(reward_T[rows.stop - 1]),
        prompt=prompts.values_N[prompts.row_T[rows.start]] if isinstance(prompts, Ids) else None,
    )


def is_megatron(path: Path) -> bool:
    """Whether a file is a router trace."""
    keys = first_record(path) if path.suffix == ".jsonl" and path.name.startswith("router_trace_rank") else {}
    return "top_indices" in keys and "layer" in keys


MEGATRON: Final = Importer(
    "megatron",
    "Megatron-LM: router_trace_rank*.jsonl with logits_rank*.bin beside",
    is_megatron,
    read_megatron,
    ("--tokens",),
)
