"""Dumps of slime (``--dump-details DIR``): what the sampler gave and what the trainer made of it, joined.

``rollout_data`` holds the samples with the sampler's log-probabilities and routes, ``train_data`` the trainer's
log-probabilities. Read from the framework's source: THUDM/slime 624b824 (observability/rollout_data_utils.py,
train_data_utils.py). :mod:`.miles` has the same samples.

Invariant: a sample of the one file and of the other are the same only if their tokens are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moediag.errors import DumpError
from moediag.importers.pickles import first_bytes, read_torch
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
from moediag.importers.sequences import repeated_rows
from moediag.notation import INFER, TRAIN
from moediag.numbers import count

_FORMAT: Final = 2
"""Of slime's train_data."""
TRAINERS: Final = ("log_probs", "entropy", "advantages")
"""What the trainer adds to a sample, per response token."""

Columns = dict[str, Any]


def read_slime(files: Sequence[Path], options: Options) -> list[Step]:
    """A step per rollout id: its samples, and what the trainer made of them."""
    steps = []
    for number, paths in by_step(files, lambda path: number_in(path.stem, r"^(\d+)$")).items():
        kinds = kinds_of(paths, number, {"rollout": 1, "slime train": 1})
        step = Step(number, tuple(paths), (), has_dense_layers={INFER: True})
        step.rollouts = as_written(step, _slime(step, kinds, options))
        steps.append(step)
    return steps


def kinds_of(paths: Sequence[Path], number: int | None, most: Mapping[str, int]) -> dict[str, list[Path]]:
    """A step's files by what they hold."""
    kinds: dict[str, list[Path]] = {}
    for path in paths:
        kinds.setdefault(kind_of(path), []).append(path)
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
    samples = samples_in(path, step)
    of_position: dict[int, tuple[str, Columns]] = {}
    for where, columns in train:
        position = columns.get("rollout_position")
        if type(position) is not int or not 0 <= position < len(samples):
            raise DumpError(f"{where}: rollout_position is {short(position)}, {path} has {len(samples)} samples")
        if position in of_position:
            raise DumpError(f"{where} and {of_position[position][0]} are of the same sample of {path}, {position}")
        of_position[position] = where, columns
    yield from joined(step, samples, of_position, options, is_per_request=True)


def joined(
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


def samples_in(path: Path, step: Step) -> list[tuple[str, Columns]]:
    """The samples of a rollout_data file, each with its place in words."""
    content = content_of(path, step)
    samples = content.get("samples")
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise DumpError(f"{path}: samples should be a list of dicts, found {short(samples)}")
    return [(f"{path} sample {i}", sample) for i, sample in enumerate(samples)]


def content_of(path: Path, step: Step) -> Columns:
    """The dict of a torch file.

    Raises:
        DumpError: something else, or of another step than its name says.
    """
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
    content = content_of(path, step)
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
        is_trained_T[start:] = floats(mask, where, "loss_mask", n_response) != 0
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
        logp_T = placed(n, start, floats(sample["rollout_log_probs"], where, "rollout_log_probs", n_response))
        logp_T[~is_trained_T & (logp_T == 0)] = np.nan  # what fills the place of a tool's tokens
        rollout.logp[INFER] = logp_T
    routes = sample.get("rollout_routed_experts")
    if routes is not None:
        if len(routes) != n - 1:
            raise DumpError(
                f"{where}: rollout_routed_experts has {len(routes)} rows for {n} tokens; "
                f"{repeated_rows(routes, n - 1) or f'expected {n - 1}, one per consumed token'}"
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
        name: placed(n, n - n_response, floats(columns[name], where, name, n_response))
        for name in TRAINERS
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
        rollout.is_trained_T[n - n_response :] = floats(mask, where, "loss_masks", n_response) != 0
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


def kind_of(path: Path) -> str:
    """What a file holds: ``rollout``, ``slime train``, ``miles train``, ``replay``, ``dashboard`` or ``""``.

    Looks at names and at the first bytes of the pickle; opens none.
    """
    if path.suffix == ".parquet":
        return "dashboard" if path.parent.name == "dashboard_columns" else ""
    if path.suffix != ".pt" or path.name.startswith("eval_"):
        return ""
    if path.stem.endswith("routing_replay"):
        return "replay"
    start = first_bytes(path)
    if b"format_version" in start and b"rollout_id" in start:
        return "slime train"
    if b"rollout_id" in start and b"rollout_data" in start:
        return "miles train"
    return "rollout" if b"rollout_id" in start and b"samples" in start else ""


def is_slime(path: Path) -> bool:
    """Whether a file is of slime's dump."""
    kind = kind_of(path)
    return kind == "slime train" or (kind == "rollout" and not is_of_miles(path))


def is_of_miles(path: Path) -> bool:
    """Whether rollout_data is of miles: by the files of train_data beside it, else by what only its samples have."""
    names = [other.stem for other in (path.parent.parent / "train_data").glob("*.pt")]
    if names:
        return any("_" in name for name in names)
    return b"rollout_indexer_topk" in first_bytes(path)


SLIME: Final = Importer(
    "slime", "slime, --dump-details DIR: rollout_data/{id}.pt and train_data/{id}.pt", is_slime, read_slime
)
