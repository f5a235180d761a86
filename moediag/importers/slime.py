"""Dumps of slime and miles (``--dump-details DIR``): what the sampler gave and what the trainer made of it, joined.

``rollout_data`` holds the samples with the sampler's log-probabilities and routes, ``train_data`` the trainer's
log-probabilities; slime's trainer gathers its samples again, miles' ranks write a file each, with slices of a
context-parallel split. Read from the frameworks' source: THUDM/slime 624b824 (observability/rollout_data_utils.py,
train_data_utils.py) and radixark/miles 31f1ca9 (train_dump_utils.py, cp_utils.py, run_megatron/worker/replay.py).

Invariants:
    - a sample of the one file and of the other are the same only if their tokens are;
    - a slice is put together only with the slices of all other ranks, each of the length that the split gives it.
"""

from __future__ import annotations

import zipfile
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
    floats,
    number_in,
    placed,
    placed_routes,
    short,
    whole_numbers,
)
from moediag.importers.tables import readable
from moediag.notation import INFER, TRAIN
from moediag.numbers import count

_FORMAT: Final = 2
"""Of slime's train_data."""
_BYTES_LOOKED_AT: Final = 1 << 16
_MOST_RANKS: Final = 1 << 16
_TRAINERS: Final = ("log_probs", "entropy", "advantages")
"""What the trainer adds to a sample, per response token."""

Columns = dict[str, Any]


def read_slime(files: Sequence[Path], options: Options) -> list[Step]:
    """A step per rollout id: its samples, and what the trainer made of them."""
    steps = []
    for number, paths in by_step(files, lambda path: number_in(path.stem, r"^(\d+)$")).items():
        kinds = _kinds(paths, number, {"rollout": 1, "slime train": 1})
        step = Step(number, tuple(paths), (), has_dense_layers={INFER: True})
        step.rollouts = as_written(step, _slime(step, kinds, options))
        steps.append(step)
    return steps


def _kinds(paths: Sequence[Path], number: int | None, most: Mapping[str, int]) -> dict[str, list[Path]]:
    """A step's files by what they hold."""
    kinds: dict[str, list[Path]] = {}
    for path in paths:
        kinds.setdefault(_kind(path), []).append(path)
    for kind, n in most.items():
        found = kinds.get(kind, [])
        if len(found) > n:
            raise DumpError(f"{found[0]} and {found[n]} are both of step {number}; import one training at a time")
    return kinds


def _slime(step: Step, kinds: Mapping[str, list[Path]], options: Options) -> Iterator[Rollout]:
    train = [one for path in kinds.get("slime train", []) for one in _slime_train(path, step)]
    if "rollout" not in kinds:
        step.notes.append("no rollout_data: neither routes, nor weight versions, nor prompts as groups of samples")
        for i, (where, columns) in enumerate(train):
            yield _with_trainer(_of_columns(where, columns), columns, where)
            options.on_progress(i + 1, len(train), "sequences read")
        return
    path = kinds["rollout"][0]
    samples = _samples(path, step)
    of_position: dict[int, tuple[str, Columns]] = {}
    for where, columns in train:
        position = columns.get("rollout_position")
        if type(position) is not int or not 0 <= position < len(samples):
            raise DumpError(f"{where}: rollout_position is {short(position)}, {path} has {len(samples)} samples")
        if position in of_position:
            raise DumpError(f"{where} and {of_position[position][0]} are of the same sample of {path}, {position}")
        of_position[position] = where, columns
    yield from _joined(step, samples, of_position, options, is_per_request=True)


def _joined(
    step: Step,
    samples: Sequence[tuple[str, Columns]],
    trained: Mapping[int, tuple[str, Columns]],
    options: Options,
    *,
    is_per_request: bool,
) -> Iterator[Rollout]:
    """Samples in order, with what the trainer has of those that it trained on.

    Args:
        trained: place among the samples -> the trainer's columns.
        is_per_request: whether weight_versions have an entry for every request (slime), or one for every version.
    """
    n_mixed = 0
    for i, (where, sample) in enumerate(samples):
        rollout = _of_columns(where, sample)
        columns = trained[i][1] if i in trained else {}
        versions = [str(version) for version in sample.get("weight_versions") or columns.get("weight_versions") or ()]
        if is_per_request or len(set(versions)) == 1:
            rollout.weight_version_T = _versions(versions, rollout)
        n_mixed += rollout.weight_version_T is None and len(set(versions)) > 1
        if i in trained:
            rollout = _with_trainer(rollout, columns, trained[i][0])
        yield rollout
        options.on_progress(i + 1, len(samples), "sequences read")
    if n_mixed:
        step.notes.append(
            f"no weight version for {count(n_mixed, 'sequence')} sampled by several versions: which token by which is "
            "not in the dump"
        )
    if trained and len(trained) < len(samples):
        step.notes.append(f"{len(samples) - len(trained):,} of {len(samples):,} samples are not in train_data")


def _samples(path: Path, step: Step) -> list[tuple[str, Columns]]:
    """The samples of a rollout_data file, each with its place in words."""
    content = _content(path, step)
    samples = content.get("samples")
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise DumpError(f"{path}: samples should be a list of dicts, found {short(samples)}")
    return [(f"{path} sample {i}", sample) for i, sample in enumerate(samples)]


def _content(path: Path, step: Step) -> Columns:
    content = read_torch(path)
    if not isinstance(content, dict):
        raise DumpError(f"{path} holds {type(content).__name__}, expected a dict")
    if step.number is not None and content.get("rollout_id") != step.number:
        raise DumpError(
            f"{path} is of step {step.number} by its name and of rollout_id {short(content.get('rollout_id'))} by what "
            "it holds; steps are mixed up"
        )
    return content


def _slime_train(path: Path, step: Step) -> list[tuple[str, Columns]]:
    """The samples of a train_data file of slime."""
    content = _content(path, step)
    if content.get("format_version") != _FORMAT:
        raise DumpError(
            f"{path}: format_version {short(content.get('format_version'))} of train_data, known is {_FORMAT}"
        )
    samples = content.get("samples")
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise DumpError(f"{path}: samples should be a list of dicts, found {short(samples)}")
    n_expected = sum(len(shard.get("sample_indices") or ()) for shard in content.get("dp_shards") or ())
    if n_expected and n_expected != len(samples):
        raise DumpError(
            f"{path} holds {len(samples)} samples, its data-parallel ranks had {n_expected}; it is not whole"
        )
    return [(f"{path} sample {i}", sample) for i, sample in enumerate(samples)]


def _of_columns(where: str, sample: Columns) -> Rollout:
    """A sample as the sampler left it; the same names in rollout_data and in train_data, but for two."""
    ids_T = whole_numbers(sample.get("tokens"), where, "tokens")
    n = len(ids_T)
    n_response = sample.get("response_length", sample.get("response_lengths"))
    if type(n_response) is not int or not 0 <= n_response <= n:
        raise DumpError(f"{where}: response_length is {short(n_response)} for {n} tokens")
    start = n - n_response
    is_trained_T = np.arange(n) >= start
    mask = sample.get("loss_mask", sample.get("loss_masks"))
    if mask is not None:
        is_trained_T[start:] = _per_response_token(mask, where, "loss_mask", n_response) != 0
    if sample.get("remove_sample"):
        is_trained_T[:] = False
    rollout = Rollout(
        where=where,
        is_response_T=np.arange(n) >= start,
        token_id_T=ids_T,
        is_trained_T=is_trained_T,
        prompt=sample.get("group_index"),
    )
    if sample.get("rollout_log_probs") is not None:
        logp_T = placed(
            n, start, _per_response_token(sample["rollout_log_probs"], where, "rollout_log_probs", n_response)
        )
        logp_T[~is_trained_T & (logp_T == 0)] = np.nan  # what fills the place of a tool's tokens
        rollout.logp[INFER] = logp_T
    routes = sample.get("rollout_routed_experts")
    if routes is not None:
        if len(routes) != n - 1:
            raise DumpError(
                f"{where}: rollout_routed_experts has {len(routes)} rows for {n} tokens; expected {n - 1}, one per "
                "consumed token"
            )
        rollout.expert_ids[INFER] = placed_routes(n, 0, routes, where, "rollout_routed_experts")
    reward = sample.get("local_raw_reward", sample.get("reward"))
    if isinstance(reward, int | float):
        rollout.reward = float(reward)
    return rollout


def _with_trainer(rollout: Rollout, columns: Columns, where: str) -> Rollout:
    """With what the trainer has of the same tokens.

    Raises:
        DumpError: they are other tokens.
    """
    ids_T, n = whole_numbers(columns.get("tokens"), where, "tokens"), len(rollout)
    assert rollout.token_id_T is not None
    n_response = int(rollout.is_response_T.sum())
    if not np.array_equal(ids_T, rollout.token_id_T) or columns.get("response_lengths") != n_response:
        raise DumpError(
            f"{where} and {rollout.where} should be of the same tokens and are not; are the steps mixed up?"
        )
    given = {
        name: placed(n, n - n_response, _per_response_token(columns[name], where, name, n_response))
        for name in _TRAINERS
        if columns.get(name) is not None
    }
    if "log_probs" in given:
        rollout.logp[TRAIN] = given["log_probs"]
    if "entropy" in given:
        rollout.entropy[TRAIN] = given["entropy"]
    rollout.advantage_T = given.get("advantages")
    mask = columns.get("loss_masks")
    if mask is not None:
        assert rollout.is_trained_T is not None
        rollout.is_trained_T[n - n_response :] = _per_response_token(mask, where, "loss_masks", n_response) != 0
    reward = columns.get("local_raw_reward")
    if isinstance(reward, int | float):
        rollout.reward = float(reward)
    return rollout


def _versions(versions: Sequence[str], rollout: Rollout) -> NDArray[np.object_] | None:
    """Versions of the weights by token: one for all, or one for each turn; None where that cannot be told.

    Args:
        versions: one per request. There is a request per turn, and one more for each that was interrupted and resumed,
            at a token that the dump does not name.
    """
    assert rollout.is_trained_T is not None
    is_sampled_T = rollout.is_trained_T
    turn_T = np.cumsum(np.diff(is_sampled_T, prepend=False) & is_sampled_T) - 1
    n_turns = int(turn_T[-1]) + 1
    if len(set(versions)) == 1:
        versions = [*versions[:1]] * n_turns
    if not n_turns or len(versions) != n_turns:
        return None
    version_T = np.full(len(turn_T), None, dtype=object)
    version_T[is_sampled_T] = np.array(versions, dtype=object)[turn_T[is_sampled_T]]
    return version_T


def _per_response_token(values: Any, where: str, name: str, n: int) -> NDArray[np.float64]:
    array = floats(values, where, name)
    if len(array) != n:
        raise DumpError(f"{where}: {name} should hold one number per response token, {n}; found {len(array)}")
    return array


def read_miles(files: Sequence[Path], options: Options) -> list[Step]:
    """A step per rollout id: its samples, the ranks' slices of them, and the routes that the trainer recorded."""

    def step_of(path: Path) -> int | None:
        if _kind(path) == "replay":
            return number_in(path.parent.name, r"(\d+)$")
        return number_in(path.stem, r"^(?:rollout_)?(\d+)(?:_\d+)?$")

    steps = []
    for number, paths in by_step(files, step_of).items():
        kinds = _kinds(paths, number, {"rollout": 1, "dashboard": 1, "replay": 1})
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
        samples = _samples(kinds["rollout"][0], step)
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
    rollouts = _joined(
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
        content = _content(path, step)
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
        for name in ("tokens", "rollout_log_probs", *_TRAINERS)
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
    for name in ("rollout_log_probs", *_TRAINERS):
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


def _kind(path: Path) -> str:
    """What a file holds: ``rollout``, ``slime train``, ``miles train``, ``replay``, ``dashboard`` or ``""``.

    Looks at names and at the first bytes of the pickle; opens none.
    """
    if path.suffix == ".parquet":
        return "dashboard" if path.parent.name == "dashboard_columns" else ""
    if path.suffix != ".pt" or path.name.startswith("eval_"):
        return ""
    if path.stem.endswith("routing_replay"):
        return "replay"
    start = _first_bytes(path)
    if b"format_version" in start and b"rollout_id" in start:
        return "slime train"
    if b"rollout_id" in start and b"rollout_data" in start:
        return "miles train"
    return "rollout" if b"rollout_id" in start and b"samples" in start else ""


def _first_bytes(path: Path) -> bytes:
    """The first bytes of a torch file's pickle; none where it has none."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    with archive.open(name) as file:
                        return file.read(_BYTES_LOOKED_AT)
    except (OSError, zipfile.BadZipFile):
        pass
    return b""


def is_slime(path: Path) -> bool:
    """Whether a file is of slime's dump."""
    kind = _kind(path)
    return kind == "slime train" or (kind == "rollout" and not _is_of_miles(path))


def is_miles(path: Path) -> bool:
    """Whether a file is of miles' dump."""
    kind = _kind(path)
    return kind in ("miles train", "replay", "dashboard") or (kind == "rollout" and _is_of_miles(path))


def _is_of_miles(path: Path) -> bool:
    """Whether rollout_data is of miles: by the files of train_data beside it, else by what only its samples have."""
    names = [other.stem for other in (path.parent.parent / "train_data").glob("*.pt")]
    if names:
        return any("_" in name for name in names)
    return b"rollout_indexer_topk" in _first_bytes(path)


_SLIME: Final = "--dump-details DIR: rollout_data/{id}.pt and train_data/{id}.pt"
SLIME: Final = Importer("slime", f"slime, {_SLIME}", is_slime, read_slime)
MILES: Final = Importer(
    "miles", f"miles, {_SLIME[:-3]}_{{rank}}.pt, dashboard_columns, routing_replay", is_miles, read_miles
)
