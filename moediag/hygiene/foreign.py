"""Files that moediag did not make, held against the rules of runs: dumps of sequences and tables of tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moediag.hygiene.check import Inspection, both_have, check_capture, check_pair, what_is_there
from moediag.hygiene.findings import Finding, Place, by_level, finding
from moediag.hygiene.logged import inspect_tokens
from moediag.hygiene.rules import BOTH_TOKENS, FOREIGN, LOGPS, N_EXPERTS
from moediag.importers.columns import is_token_table
from moediag.importers.sequences import Dump, is_sequence_table, read_sequences, total_experts
from moediag.importers.tables import KINDS, open_table
from moediag.importers.tokens import TokenTable
from moediag.notation import INFER, TRAIN

_CONTEXT = 3


def check_file(path: Path, n_experts: int | None = None, first_row: int = 0, n_zero_experts: int = 0) -> Inspection:
    """Apply the rules to a dump of sequences or a table of tokens, whichever the file's columns make it.

    Args:
        path: ``.parquet``, ``.csv`` (tables of tokens only), or JSON lines.
        n_experts, first_row: of a dump, see :func:`~moediag.importers.sequences.read_sequences`.
        n_zero_experts: experts of a dump beside these that compute nothing.

    Raises:
        DumpError: neither, or what no log holds; names the row and the column.
    """
    table = open_table(path) if path.suffix in KINDS else None
    if table is None or not (path.suffix == ".csv" or is_token_table(table.types)) or is_sequence_table(table.types):
        dump = read_sequences(path, total_experts(n_experts, n_zero_experts), first_row)
        return check_dump(dump, is_sized=n_experts is not None, n_zero_experts=n_zero_experts)
    return inspect_tokens(TokenTable.of(table).read())


def check_dump(dump: Dump, *, is_sized: bool = False, n_zero_experts: int = 0) -> Inspection:
    """Apply the rules to a dump.

    Args:
        is_sized: whether the number of experts was given, not taken from the largest id.
        n_zero_experts: how many of the experts, the last, compute nothing.
    """
    differing = _differing_tokens(dump)
    found = [*differing, *_dense_slots(dump)]
    sides = {arm: what_is_there(capture) for arm, capture in dump.captures.items()}
    has = {FOREIGN}.union(*sides.values())
    for arm, capture in dump.captures.items():
        alone = check_capture(
            dump.tokens,
            capture,
            n_experts=dump.n_experts,
            arm=arm,
            is_sampled=arm == INFER,
            n_zero_experts=n_zero_experts,
        )
        # a side without any logprobs was dumped without them
        found += [item for item in alone if LOGPS in sides[arm] or item.rule != "D31-nan-logp"]
    if set(sides) == {INFER, TRAIN} and not differing:
        train, infer = dump.captures[TRAIN], dump.captures[INFER]
        found += check_pair(dump.tokens, train, infer, n_experts=dump.n_experts, is_foreign=True)
        has |= both_have(sides[TRAIN], sides[INFER])
    has |= {N_EXPERTS} if is_sized else set()
    has |= {BOTH_TOKENS} if dump.train_token_ids else set()
    return Inspection(by_level(found), frozenset(has), len(dump.tokens) * len(dump.captures))


def _dense_slots(dump: Dump) -> list[Finding]:
    """D03: layers that were left out as slots of dense layers."""
    found = []
    for arm, dense_L in dump.is_dense_L.items():
        layers = np.flatnonzero(dense_L).tolist()
        message = (
            f"layers {layers} of {len(dense_L)} are expert 0 in every row: slots of dense layers, left out (layer 0 "
            f"elsewhere is layer {int(np.argmin(dense_L))} of the dump)"
        )
        found.append(finding("D03-dense-slot", arm, message, n=len(layers), n_of=len(dense_L)))
    return found


def _differing_tokens(dump: Dump) -> list[Finding]:
    """D32: the first token id that differs, with its neighbours on both sides."""
    places, first = [], ""
    bounds = list(dump.tokens.sequence_bounds())
    for i, other in dump.train_token_ids.items():
        ours = dump.tokens.token_id_T[slice(*bounds[i])]
        shared = min(len(ours), len(other))
        differ = np.flatnonzero(ours[:shared] != other[:shared])
        if not len(differ) and len(ours) == len(other):
            continue
        at = int(differ[0]) if len(differ) else shared
        places.append(Place(i, at))
        around = slice(max(0, at - _CONTEXT), at + _CONTEXT + 1)
        first = first or f"infer ... {ours[around].tolist()}, train ... {other[around].tolist()}"
    if not places:
        return []
    n_compared = len(dump.train_token_ids)
    message = f"{len(places):,} of {n_compared:,} sequences have other token ids on the train side: {first}"
    return [
        finding("D32-token-ids", f"{INFER}~{TRAIN}", message, n=len(places), n_of=n_compared, places=tuple(places[:5]))
    ]
