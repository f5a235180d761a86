"""Pickled batches of SkyRL and verl: padded to rectangles, and opened with ``--trust-pickle`` only.

Read from the frameworks' source: NovaSky-AI/SkyRL a956457 (trainer.py, dump_data; dataset/preprocess.py;
training_batch.py) and verl-project/verl 1dda039 (skip/rollout_skip.py; agent_loop.py; protocol.py).

    SkyRL       sequences padded on the left; response columns pushed to the right end
    verl, V0    prompts padded on the left, responses on the right
    verl, V1    jagged: a row per sequence, without padding

Invariant: padding is what the masks say it is, never what its values look like; a filler becomes NaN or -1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moediag.errors import DumpError
from moediag.importers.pickles import first_bytes, read_pickle, read_torch
from moediag.importers.rollouts import (
    Importer,
    Options,
    Rollout,
    Step,
    as_written,
    by_step,
    number_in,
    placed,
    placed_routes,
    short,
)
from moediag.importers.sequences import repeated_rows
from moediag.importers.text import text_steps
from moediag.notation import INFER, NOT_ROUTED, TRAIN
from moediag.numbers import count

_CLAMPED: Final = -9999.0
"""SkyRL's number for a log-probability that the engine did not give."""
_SKYRL_PICKLE: Final = b"skyrl.backends.skyrl_train.training_batch"


def read_skyrl(files: Sequence[Path], options: Options) -> list[Step]:
    """A batch per global step."""
    _refuse_untrusted(files, options)
    steps = []
    for number, paths in by_step(files, lambda path: number_in(path.name, r"global_step_(\d+)")).items():
        if len(paths) > 1:
            raise DumpError(f"{paths[0]} and {paths[1]} are both of step {number}; import one training at a time")
        step = Step(number, tuple(paths), (), has_dense_layers={INFER: True})
        step.rollouts = as_written(step, _skyrl(step, options))
        steps.append(step)
    return steps


def _refuse_untrusted(files: Sequence[Path], options: Options) -> None:
    if not options.trust_pickle:
        raise DumpError(
            f"{files[0]} is a pickle; moediag reads it without running anything in it, and only if you say "
            "--trust-pickle (or export a plain table in the trainer, see reports/reference.md)"
        )


def _skyrl(step: Step, options: Options) -> Iterator[Rollout]:
    path = step.files[0]
    content = read_pickle(path)
    if not isinstance(content, dict) or not isinstance(content.get("batch_dict"), dict):
        raise DumpError(f"{path} holds no batch of SkyRL, but {short(content)}")
    batch = content["batch_dict"]
    about = content.get("metadata") or {}
    ids_ST, is_there_ST = (_rectangle(batch, name, path) for name in ("sequences", "attention_mask"))
    is_response_SR, loss_SR = (_rectangle(batch, name, path) for name in ("response_mask", "loss_mask"))
    n_sequences = len(ids_ST) - int(about.get("pad_size") or 0)  # copies behind, for as many as there are ranks
    if n_sequences < len(ids_ST):
        step.notes.append(f"{len(ids_ST) - n_sequences} sequences fill up the batch (pad_size) and were left out")
    prompt_S = _groups(about.get("policy_prompt_boundaries"), len(ids_ST))
    if prompt_S is None:
        step.notes.append("no policy_prompt_boundaries: sequences with the same prompt are taken for its samples")
    if batch.get("rewards") is None:
        step.notes.append("no rewards: SkyRL removes them before it writes the batch")
    n_clamped = 0
    for i in range(n_sequences):
        where = f"{path} sequence {i}"
        n, n_response = int(is_there_ST[i].sum()), int(is_response_SR[i].sum())
        if not _is_at_end(is_there_ST[i]) or not _is_at_end(is_response_SR[i]) or not 0 < n_response <= n:
            raise DumpError(
                f"{where}: expected padding on the left of {n} tokens and of {n_response} response tokens; the masks "
                "have it elsewhere"
            )
        start = n - n_response
        is_trained_T = np.zeros(n, np.bool_)
        is_trained_T[start:] = loss_SR[i, -n_response:] != 0
        rollout = Rollout(
            where=where,
            is_response_T=np.arange(n) >= start,
            token_id_T=ids_ST[i, -n:].astype(np.int64),
            is_trained_T=is_trained_T,
            prompt=None if prompt_S is None else int(prompt_S[i]),
        )
        for side, name in ((INFER, "rollout_logprobs"), (TRAIN, "action_log_probs")):
            if batch.get(name) is not None:
                rollout.logp[side] = placed(n, start, _rectangle(batch, name, path)[i, -n_response:])
        if INFER in rollout.logp:
            logp_T = rollout.logp[INFER]
            n_clamped += int((logp_T == _CLAMPED).sum())
            logp_T[(logp_T == _CLAMPED) | (~is_trained_T & (logp_T == 0))] = np.nan
        if batch.get("advantages") is not None:
            rollout.advantage_T = placed(n, start, _rectangle(batch, "advantages", path)[i, -n_response:])
        if batch.get("rollout_expert_indices") is not None:
            is_empty_ST = _rectangle(batch, "router_padding_mask", path)
            routes_TLK = placed_routes(n, 0, batch["rollout_expert_indices"][i, -n:], where, "rollout_expert_indices")
            routes_TLK[is_empty_ST[i, -n:].astype(np.bool_)] = NOT_ROUTED
            rollout.expert_ids[INFER] = routes_TLK
        yield rollout
        options.on_progress(i + 1, n_sequences, "sequences read")
    if n_clamped:
        step.notes.append(
            f"not scored: {count(n_clamped, 'token')} with the log-probability {_CLAMPED:g}, which stands for one that "
            "the engine did not give"
        )


def _rectangle(batch: dict[str, Any], name: str, path: Path) -> NDArray[Any]:
    """A column of a batch, one row per sequence.

    Raises:
        DumpError: it is not there, or has another number of rows.
    """
    array, ids = batch.get(name), next(iter(batch.values()))
    if not isinstance(array, np.ndarray) or array.ndim < 2 or len(array) != len(ids):
        raise DumpError(f"{path}: {name} should have a row for each of {len(ids)} sequences, found {short(array)}")
    return array


def _is_at_end(mask: NDArray[Any]) -> bool:
    """Whether everything that a mask marks stands together at the end."""
    return bool(np.all(np.diff(mask.astype(np.int64)) >= 0))


def _is_at_start(mask: NDArray[Any]) -> bool:
    return _is_at_end(mask[::-1])


def _groups(boundaries: Any, n: int) -> NDArray[np.intp] | None:
    """Which prompt every sequence is of, from [start, end) of each; None where they do not cover the batch."""
    if not boundaries or [b[0] for b in boundaries] != [0, *(b[1] for b in boundaries[:-1])] or boundaries[-1][1] > n:
        return None
    sizes = [end - start for start, end in boundaries]
    return np.repeat(np.arange(len(sizes) + 1), [*sizes, n - boundaries[-1][1]])


def read_verl(files: Sequence[Path], options: Options) -> list[Step]:
    """The rollout-skip caches of each global step: what the sampler gave, before the trainer has scored it."""
    text = [path for path in files if path.suffix == ".jsonl"]
    files = [path for path in files if path not in text]
    if not files:
        groups = by_step(text, lambda path: int(path.stem))
        twice = next((paths for paths in groups.values() if len(paths) > 1), None)
        if twice:
            raise DumpError(
                f"{twice[0]} and {twice[1]} are both of step {twice[0].stem}; import one training at a time"
            )
        return text_steps("verl", groups, options)
    _refuse_untrusted(files, options)
    steps = []
    for number, paths in by_step(files, _verl_step).items():
        names = {path.name for path in paths}
        if len(names) > 1 or (names == {"gen_batch.dp"} and len(paths) > 1):
            raise DumpError(f"{paths[0]} and {paths[1]} are both of step {number}; import one training at a time")
        step = Step(number, tuple(paths), (), has_dense_layers={INFER: True})
        if text:
            step.notes.append(f"{text[0].parent.name}: text alone, left out")
        step.notes.append("verl writes these caches before the trainer scores: they have no old_log_probs")
        step.rollouts = as_written(step, _verl(step, options))
        steps.append(step)
    return steps


def _verl_step(path: Path) -> int | None:
    """Step of a cache: the folder that it is in, or the one above where each step has several."""
    folder = path.parent if path.name == "gen_batch.dp" else path.parent.parent
    return int(folder.name) if re.fullmatch(r"\d+", folder.name) else None


def _verl(step: Step, options: Options) -> Iterator[Rollout]:
    n_mixed = 0
    seen: dict[Any, str] = {}
    for done, path in enumerate(step.files, start=1):
        samples = _of_rectangles(path) if path.name == "gen_batch.dp" else _of_rows(path)
        for where, sample in samples:
            key = sample.get("key")
            if key is not None and seen.setdefault(key, where) != where:
                raise DumpError(f"{where} and {seen[key]} are of the same trajectory, {key}")
            rollout = _of_verl(where, sample, step)
            first, last = sample["min_global_steps"], sample["max_global_steps"]
            if first is not None and first == last:
                rollout.weight_version_T = np.full(len(rollout), None, dtype=object)
                rollout.weight_version_T[rollout.is_trained_T] = str(first)
            n_mixed += first != last
            yield rollout
        options.on_progress(done, len(step.files), "files read")
    if n_mixed:
        step.notes.append(
            f"no weight version for {count(n_mixed, 'sequence')} sampled by several versions (min_global_steps, "
            "max_global_steps): which token by which is not in the dump"
        )


def _of_verl(where: str, sample: dict[str, Any], step: Step) -> Rollout:
    """A sequence without padding: its columns by verl's names."""
    prompt_T, response_T, mask_T = sample["prompts"], sample["responses"], sample["response_mask"]
    n, n_response = len(prompt_T) + len(response_T), len(response_T)
    start = n - n_response
    if len(mask_T) != n_response:
        raise DumpError(f"{where}: response_mask has {len(mask_T)} entries for {n_response} response tokens")
    is_trained_T = np.zeros(n, np.bool_)
    is_trained_T[start:] = mask_T != 0
    rollout = Rollout(
        where=where,
        is_response_T=np.arange(n) >= start,
        token_id_T=np.concatenate([prompt_T, response_T]).astype(np.int64),
        is_trained_T=is_trained_T,
        prompt=sample["uid"],
    )
    if sample["rollout_log_probs"] is not None:
        if len(sample["rollout_log_probs"]) != n_response:
            raise DumpError(
                f"{where}: rollout_log_probs has {len(sample['rollout_log_probs'])} entries for {n_response}"
            )
        logp_T = placed(n, start, sample["rollout_log_probs"])
        logp_T[~is_trained_T & (logp_T == 0)] = np.nan
        rollout.logp[INFER] = logp_T
    if sample["rm_scores"] is not None:
        rollout.reward = float(np.sum(sample["rm_scores"], dtype=np.float64))
    routes = sample["routed_experts"]
    if routes is not None:
        if len(routes) != n:
            words = repeated_rows(routes, n - 1)
            raise DumpError(f"{where}: routed_experts has {len(routes)} rows for {n} tokens{words and f'; {words}'}")
        rollout.expert_ids[INFER] = placed_routes(n, 0, routes, where, "routed_experts")
        # what no engine consumed, or did not report, is expert 0 in every slot of every layer, as no router routes
        if routes.shape[2] > 1:
            rollout.expert_ids[INFER][~routes.any(axis=(1, 2))] = NOT_ROUTED
        rollout.expert_ids[INFER][-1] = NOT_ROUTED
    return rollout


def _of_rectangles(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sequences of a gen_batch.dp, without their padding."""
    content = read_pickle(path)
    if not isinstance(content, dict) or not isinstance(content.get("batch"), dict):
        raise DumpError(f"{path} holds no batch of verl, but {short(content)}")
    batch, objects = content["batch"], content["non_tensor_batch"]
    prompts, responses = (_rectangle(batch, name, path) for name in ("prompts", "responses"))
    is_there_ST, mask_SR = (_rectangle(batch, name, path) for name in ("attention_mask", "response_mask"))
    if is_there_ST.shape[1] != prompts.shape[1] + responses.shape[1]:
        raise DumpError(
            f"{path}: attention_mask of width {is_there_ST.shape[1]} for {prompts.shape[1]} + {responses.shape[1]}"
        )
    width = prompts.shape[1]
    for i in range(len(prompts)):
        where = f"{path} sequence {i}"
        before, behind = is_there_ST[i, :width], is_there_ST[i, width:]
        if not _is_at_end(before) or not _is_at_start(behind) or not behind.any():
            raise DumpError(
                f"{where}: expected a prompt padded on the left and a response on the right; the mask differs"
            )
        n_prompt, n_response = int(before.sum()), int(behind.sum())
        sample = {
            "prompts": prompts[i, width - n_prompt :],
            "responses": responses[i, :n_response],
            "response_mask": mask_SR[i, :n_response],
            "routed_experts": None,
        }
        for name in ("rollout_log_probs", "rm_scores"):
            sample[name] = None if batch.get(name) is None else _rectangle(batch, name, path)[i, :n_response]
        if batch.get("routed_experts") is not None:
            rows = slice(width - n_prompt, width + n_response)
            sample["routed_experts"] = _rectangle(batch, "routed_experts", path)[i, rows]
        for name in ("uid", "min_global_steps", "max_global_steps"):
            sample[name] = objects[name][i] if name in objects else None
        yield where, sample


def _of_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sequences of a tq_batch.pt."""
    content = read_torch(path)
    if not isinstance(content, dict) or not isinstance(content.get("tensordict"), dict):
        raise DumpError(f"{path} holds no batch of verl, but {short(content)}")
    batch, keys, tags = content["tensordict"], content.get("keys"), content.get("tags") or []
    lacking = [name for name in ("prompts", "responses", "response_mask") if not isinstance(batch.get(name), list)]
    if lacking or not keys:
        raise DumpError(f"{path} lacks {', '.join(lacking or ['keys'])}; found {', '.join(batch)}")
    n = len(keys)
    for name, rows in batch.items():
        if len(rows) != n:
            raise DumpError(f"{path}: {name} has {len(rows)} rows for {n} keys")
    for i, key in enumerate(keys):
        sample = {name: batch[name][i] for name in ("prompts", "responses", "response_mask")}
        for name in ("rollout_log_probs", "rm_scores", "routed_experts", "uid"):
            sample[name] = batch[name][i] if name in batch else None
        tag = tags[i] if i < len(tags) else {}
        for name in ("min_global_steps", "max_global_steps"):
            sample[name] = tag.get(name)
        yield f"{path} sequence {i}", {**sample, "key": key}


def is_skyrl(path: Path) -> bool:
    """Whether a file is a dumped batch of SkyRL; it is not opened as a pickle."""
    return path.suffix == ".pkl" and _SKYRL_PICKLE in first_bytes(path)


def is_verl(path: Path) -> bool:
    """Whether a file is a rollout-skip cache of verl, or its text of rollouts; none is opened as a pickle."""
    if path.suffix == ".jsonl":
        return path.stem.isdigit() and all(name in first_bytes(path) for name in (b'"input"', b'"output"', b'"gts"'))
    return path.name in ("gen_batch.dp", "tq_batch.pt")


SKYRL: Final = Importer(
    "skyrl",
    "SkyRL, trainer.dump_data_batch: dumped_data/global_step_*_training_input.pkl",
    is_skyrl,
    read_skyrl,
    ("--trust-pickle",),
)
VERL: Final = Importer(
    "verl", "verl, rollout-skip caches: gen_batch.dp, tq_batch.pt", is_verl, read_verl, ("--trust-pickle",)
)
