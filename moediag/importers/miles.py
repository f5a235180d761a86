"""Dumps of miles, slime's sibling: ranks that write a file each, with slices of a context-parallel split.

Beside ``rollout_data`` and ``train_data`` there may be the dashboard's columns, and the routes that the trainer
recorded. Read from the framework's source: radixark/miles 31f1ca9 (train_dump_utils.py, cp_utils.py,
run_megatron/worker/replay.py).

Invariant: a slice is put together only with the slices of all other ranks, each of the length that the split gives it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moediag.errors import DumpError
from moediag.importers.pickles import read_torch
from moediag.importers.rollouts import (
    Importer,
    Options,
    Rollout,
    Step,
    as_written,
    by_step,
    number_in,
    placed_routes,
    short,
)
from moediag.importers.slime import TRAINERS, Columns, content_of, is_of_miles, joined, kind_of, kinds_of, samples_in
from moediag.importers.tables import readable
from moediag.notation import INFER, TRAIN

_MOST_RANKS: Final = 1 << 16


def read_miles(files: Sequence[Path], options: Options) -> list[Step]:
    """A step per rollout id: its samples, the ranks' slices of them, and the routes that the trainer recorded."""

    def step_of(path: Path) -> int | None:
        if kind_of(path) == "replay":
            return number_in(path.parent.name, r"(\d+)$")
        return number_in(path.stem, r"^(?:rollout_)?(\d+)(?:_\d+)?$")

    steps = []
    for number, paths in by_step(files, step_of).items():
        kinds = kinds_of(paths, number, {"rollout": 1, "dashboard": 1, "replay": 1})
        if set(kinds) == {"replay"}:
            raise DumpError(
                f"{kinds['replay'][0]} holds routes without tokens or boundaries; give the rollout_data of its step "
                "too, with the step's number at the end of the folder's name"
            )
        step = Step(number, tuple(paths), (), has_dense_layers={INFER: True, TRAIN: False})
        step.rollouts = as_written(step, _miles(step, kinds, options))
        steps.append(step)
    return steps


def _miles(step: Step, kinds: Mapping[str, list[Path]], options: Options) -> Iterator[Rollout]:
    trained = _gathered(kinds.get("miles train", []), step)
    if "rollout" in kinds:
        samples = samples_in(kinds["rollout"][0], step)
    elif "dashboard" in kinds:
        samples = _dashboard(kinds["dashboard"][0])
    else:
        samples = list(trained.values())
        step.notes.append("no rollout_data: neither the sampler's routes nor prompts as groups of samples")
    of_index = {_index(where, sample): i for i, (where, sample) in enumerate(samples)}
    if len(of_index) < len(samples):
        raise DumpError(f"{samples[0][0]} and others: two samples have the same index")
    strays = [where for index, (where, _) in trained.items() if index not in of_index]
    if strays:
        raise DumpError(f"{strays[0]} is no sample of step {step.number}'s rollout_data; are the steps mixed up?")
    rollouts = joined(
        step, samples, {of_index[index]: found for index, found in trained.items()}, options, is_per_request=False
    )
    yield from _replayed(step, kinds["replay"][0], list(rollouts)) if "replay" in kinds else rollouts


def _index(where: str, sample: Columns) -> int:
    index = sample.get("index", sample.get("sample_index"))
    if type(index) is not int:
        raise DumpError(f"{where}: index should be a whole number, found {short(index)}")
    return index


def _dashboard(path: Path) -> list[tuple[str, Columns]]:
    with readable(path):
        return [(f"{path} row {i}", record) for i, record in enumerate(pq.read_table(path).to_pylist())]


def _gathered(paths: Sequence[Path], step: Step) -> dict[int, tuple[str, Columns]]:
    """Sample index -> the trainer's columns, put together from the files of all ranks.

    Raises:
        DumpError: a rank is missing, or a slice has not the length that the split gives it.
    """
    groups: dict[tuple[int, ...], dict[int, Columns]] = {}
    n_same = 0
    for path in paths:
        content = content_of(path, step)
        columns = content.get("rollout_data")
        if not isinstance(columns, dict) or not isinstance(columns.get("sample_indices"), list):
            raise DumpError(f"{path}: rollout_data should be columns with sample_indices, found {short(columns)}")
        ranks = groups.setdefault(tuple(columns["sample_indices"]), {})
        cp_rank, cp_size = content.get("cp_rank", 0), content.get("cp_size", 1)
        if type(cp_rank) is not int or type(cp_size) is not int or not 0 <= cp_rank < cp_size <= _MOST_RANKS:
            raise DumpError(f"{path}: context-parallel rank {short(cp_rank)} of {short(cp_size)} is no rank")
        layout = content.get("qkv_format", "thd")
        if cp_size > 1 and (layout not in ("thd", "bshd") or (layout == "bshd" and "max_seq_lens" not in columns)):
            raise DumpError(
                f"{path}: qkv_format {short(layout)} is split in a way that is not known; known are thd, and bshd with "
                "the padded lengths beside (max_seq_lens)"
            )
        if cp_rank in ranks:  # tensor-parallel peers compute the same
            if not _are_same(ranks[cp_rank]["columns"], columns):
                raise DumpError(
                    f"{path} and {ranks[cp_rank]['path']} hold the same samples with other numbers; is a file of "
                    "another run among them?"
                )
            n_same += 1
        else:
            ranks[cp_rank] = {"path": path, "columns": columns, "cp_size": cp_size, "is_padded": layout == "bshd"}
    if n_same:
        step.notes.append(f"{n_same:,} files repeat another one's samples (tensor-parallel ranks) and were left out")
    found: dict[int, tuple[str, Columns]] = {}
    for indices, ranks in groups.items():
        first = next(iter(ranks.values()))
        missing = sorted({*range(first["cp_size"])} - {*ranks})
        if missing:
            raise DumpError(
                f"{first['path'].parent} lacks context-parallel rank {missing[0]} of {first['cp_size']} beside "
                f"{first['path'].name}; every rank holds a part of each sequence"
            )
        for i, index in enumerate(indices):
            where = f"{first['path']} sample {i}"
            if index in found:
                raise DumpError(f"{where} and {found[index][0]} are of the same sample, {index}")
            found[index] = where, _whole_sample(ranks, i, where) | {"index": index}
    n_expected = max(
        (len(ranks[c]["columns"].get("raw_reward") or ()) for ranks in groups.values() for c in ranks), default=0
    )
    if n_expected > len(found):
        raise DumpError(
            f"{paths[0].parent}: the files of step {step.number} hold {len(found)} of {n_expected} samples; the file "
            "of a data-parallel rank is missing"
        )
    return found


def _are_same(one: Columns, other: Columns) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return bool(np.array_equal(a, b))

    return all(
        same(one[name], other[name])
        for name in ("tokens", "rollout_log_probs", *TRAINERS)
        if name in one and name in other
    )


def _whole_sample(ranks: Mapping[int, Columns], i: int, where: str) -> Columns:
    """One sample's columns, its slices put together."""
    columns = ranks[0]["columns"]
    sample: Columns = {
        name: columns[name][i]
        for name in ("tokens", "response_lengths", "loss_masks", "weight_versions")
        if name in columns
    }
    n, n_response = len(sample["tokens"]), sample["response_lengths"]
    if type(n_response) is not int or not 0 <= n_response <= n:
        raise DumpError(f"{where}: response_lengths is {short(n_response)} for {n} tokens")
    padded = columns["max_seq_lens"][i] if ranks[0]["is_padded"] and ranks[0]["cp_size"] > 1 else n
    if type(padded) is not int or padded < n:
        raise DumpError(f"{where}: max_seq_lens is {short(padded)} for {n} tokens")
    for name in ("rollout_log_probs", *TRAINERS):
        if name not in columns:
            continue
        whole = np.full(n_response, np.nan)
        for cp_rank, rank in ranks.items():
            part = np.asarray(rank["columns"][name][i], dtype=np.float64)
            held = held_by(cp_rank, rank["cp_size"], n, n_response, padded)
            if len(part) != len(held):
                raise DumpError(
                    f"{rank['path']} sample {i}: {name} holds {len(part)} numbers; context-parallel rank {cp_rank} of "
                    f"{rank['cp_size']} has {len(held)} of the response's {n_response} tokens"
                )
            whole[held] = part
        sample[name] = whole
    return sample


def held_by(cp_rank: int, cp_size: int, n: int, n_response: int, padded: int | None = None) -> NDArray[np.intp]:
    """Which response tokens a context-parallel rank holds, in its order.

    The sequence's logits are cut into ``2 cp_size`` chunks; a rank has one from the front and one from the back, so
    that all have the same work under a causal mask. A token's log-probability is with the logits before it.

    Args:
        padded: length that the sequence was padded to before it was cut (``bshd``); None = its own (``thd``).

    Example:
        >>> held_by(0, 2, n=8, n_response=5), held_by(1, 2, n=8, n_response=5)
        (array([4]), array([0, 1, 2, 3]))
    """
    if cp_size == 1:
        return np.arange(n_response)
    chunk, first = -(-(padded or n) // (2 * cp_size)), n - n_response - 1
    logits = [
        np.arange(max(part * chunk, first), min((part + 1) * chunk, n - 1))
        for part in (cp_rank, 2 * cp_size - 1 - cp_rank)
    ]
    return np.asarray(np.concatenate(logits) - first)


def _replayed(step: Step, path: Path, rollouts: Sequence[Rollout]) -> Iterator[Rollout]:
    """Rollouts with the routes that the trainer recorded: whole sequences one behind the other, in their order.

    Raises:
        DumpError: other lengths, or routes that have nothing in common with the sampler's.
    """
    calls_L = read_torch(path)
    if not isinstance(calls_L, list) or not calls_L or not all(isinstance(calls, list) and calls for calls in calls_L):
        raise DumpError(f"{path} should be a list of layers, each a list of calls; found {short(calls_L)}")
    with readable(path):
        ids_TLK = np.stack([np.concatenate(calls) for calls in calls_L], axis=1)
    n = sum(len(rollout) for rollout in rollouts)
    if len(ids_TLK) != n:
        raise DumpError(
            f"{path} holds routes of {len(ids_TLK):,} tokens, step {step.number} has {n:,}: it is of other sequences, "
            "or a rank's file is missing"
        )
    start = 0
    chance = ids_TLK.shape[2] / (int(ids_TLK.max()) + 1)
    for rollout in rollouts:
        ours_TLK = ids_TLK[start : (start := start + len(rollout))]
        rollout.expert_ids[TRAIN] = placed_routes(len(rollout), 0, ours_TLK, rollout.where, path.name)
        ours_TLK = ours_TLK[:-1]  # rows that the sampler has, too
        theirs_TLK = rollout.expert_ids.get(INFER, ids_TLK[:1, :0])[:-1]
        theirs_TLK = theirs_TLK[:, theirs_TLK.any(axis=(0, 2))]  # without slots of dense layers
        if theirs_TLK.shape != ours_TLK.shape or not ours_TLK.size:
            continue
        shared = float((ours_TLK[:, :, :, None] == theirs_TLK[:, :, None, :]).any(axis=-1).mean())
        if shared < (1 + chance) / 2:
            raise DumpError(
                f"{path}: {shared:.0%} of the experts at the place of {rollout.where} are the sampler's; by chance "
                f"{chance:.0%} are. Its sequences are packed in another order than rollout_data has them"
            )
    step.notes.append(f"{path.name}: its sequences are taken to be packed in the order of rollout_data")
    yield from rollouts


def is_miles(path: Path) -> bool:
    """Whether a file is of miles' dump."""
    kind = kind_of(path)
    return kind in ("miles train", "replay", "dashboard") or (kind == "rollout" and is_of_miles(path))


MILES: Final = Importer(
    "miles",
    "miles, --dump-details DIR: rollout_data/{id}.pt, train_data/{id}_{rank}.pt, dashboard_columns, routing_replay",
    is_miles,
    read_miles,
)
