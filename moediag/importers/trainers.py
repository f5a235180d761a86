"""Dumps of trainers as JSON lines: NeMo-RL's training data, prime-rl's token exports.

Both hold whole sequences, value t of token t, with the log-probabilities of both sides. Read from the frameworks'
source: NVIDIA-NeMo/RL 7ea279a (utils/logger.py, log_batched_dict_as_jsonl; algorithms/grpo.py) and
PrimeIntellect-ai/prime-rl 559b447 (trainer/rl/token_export.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from moediag.errors import DumpError
from moediag.importers.rollouts import (
    Importer,
    Options,
    Rollout,
    Step,
    by_step,
    flags,
    floats,
    from_mask,
    number_in,
    one_number,
    short,
    understood,
    whole_number,
    whole_numbers,
)
from moediag.importers.tables import first_record, json_lines
from moediag.notation import INFER, TRAIN
from moediag.run.records import Score

_NEMO_KEYS: Final = ("token_ids", "token_loss_mask", "input_lengths", "generation_logprobs", "prev_logprobs")
_PRIME_KEYS: Final = ("token_ids", "loss_mask", "inference_logprobs", "trainer_logprobs")


def is_nemo_rl(path: Path) -> bool:
    """Whether a file is NeMo-RL's train_data_step*.jsonl."""
    keys = first_record(path)
    return "token_loss_mask" in keys and ("prev_logprobs" in keys or "generation_logprobs" in keys)


def read_nemo_rl(files: Sequence[Path], options: Options) -> list[Step]:
    """One file per step, one line per sequence, every value but idx a batch of one."""
    steps = []
    for number, paths in by_step(files, lambda path: number_in(path.name, r"step_?(\d+)")).items():
        if len(paths) > 1:
            raise DumpError(f"{paths[0]} and {paths[1]} are both of step {number}; import one training at a time")
        step = Step(number, tuple(paths), ())
        step.rollouts = _nemo_rl(step, options)
        steps.append(step)
    return steps


def _nemo_rl(step: Step, options: Options) -> Iterator[Rollout]:
    n_skipped = n_dropped = expected = 0
    notes = step.notes
    for where, record in json_lines(step.files, options.on_progress):
        with understood(where):
            lacking = [name for name in _NEMO_KEYS if name not in record]
            if lacking:
                raise DumpError(
                    f"{where} lacks {', '.join(lacking)}; found {', '.join(record)} (grpo_sync may leave out token_ids)"
                )
            index = record.get("idx", expected)
            if index != expected:
                raise DumpError(
                    f"{where}: idx is {short(index)}, expected {expected}; a line is missing or written twice"
                )
            expected += 1
            one = {name: _only(record[name], where, name) for name in record if name != "idx"}
            ids_T = whole_numbers(one["token_ids"], where, "token_ids")
            n_padded, n = len(ids_T), whole_number(one["input_lengths"], where, "input_lengths")
            if not 0 < n <= n_padded:
                raise DumpError(f"{where}: input_lengths is {n}, token_ids hold {n_padded}")
            mask_T = flags(one["token_loss_mask"], where, "token_loss_mask", n_padded)
            infer_T, train_T = (
                floats(one[name], where, name, n_padded) for name in ("generation_logprobs", "prev_logprobs")
            )
            if mask_T[n:].any():
                raise DumpError(
                    f"{where}: token_loss_mask marks padding behind input_lengths {n}; is a row cut or shifted?"
                )
            mask_T, infer_T, train_T = mask_T[:n], infer_T[:n], train_T[:n]
            if not train_T.any():  # the pass was skipped (force_on_policy_ratio): no trainer gives 0 everywhere
                train_T[:] = np.nan
                n_skipped += 1
            train_T[0] = np.nan
            infer_T[~mask_T & (infer_T == 0)] = np.nan
            is_dropped = not bool(one.get("sample_loss_mask", 1))
            n_dropped += is_dropped
            advantage_T = None
            if "advantages" in one:
                given = one["advantages"]
                advantage_T = (
                    floats(given, where, "advantages", n_padded)[:n]
                    if isinstance(given, list)
                    else np.full(n, one_number(given, where, "advantages"))
                )
                advantage_T[~from_mask(mask_T)] = np.nan
            rollout = Rollout(
                where=where,
                is_response_T=from_mask(mask_T),
                token_id_T=ids_T[:n],
                is_trained_T=np.zeros(n, np.bool_) if is_dropped else mask_T,
                logp={INFER: infer_T, TRAIN: train_T},
                advantage_T=advantage_T,
                reward=one_number(one.get("filtered_rewards", one.get("rewards")), where, "rewards"),
            )
        yield rollout
    if n_skipped:
        notes.append(
            f"prev_logprobs are 0 throughout in {n_skipped:,} of {expected:,} sequences: the trainer's pass was "
            "skipped, they have no trainer's log-probabilities"
        )
    if n_dropped:
        notes.append(f"{n_dropped:,} of {expected:,} sequences are masked whole (sample_loss_mask 0): not trained")


def _only(value: Any, where: str, name: str) -> Any:
    """The one value of a batch of one."""
    if not isinstance(value, list) or len(value) != 1:
        raise DumpError(f"{where}: {name} should be a list of one value, a batch of one; found {short(value)}")
    return value[0]


def is_prime_rl(path: Path) -> bool:
    """Whether a file is of a token export of prime-rl."""
    keys = first_record(path)
    return "trainer_logprobs" in keys and "export_sequence_idx" in keys


def read_prime_rl(files: Sequence[Path], options: Options) -> list[Step]:
    """A folder per step, a file per rank, one line per sequence in the order they were packed in."""
    steps = []
    for number, paths in by_step(files, lambda path: number_in(path.parent.name, r"step_(\d+)")).items():
        known_T = {TRAIN: Score(processed=True)}  # logits were divided by the temperature before
        step = Step(number, tuple(paths), (), scores=known_T)
        ranks = [number_in(path.name, r"rank_(\d+)") for path in paths]
        missing = sorted({*range(max((rank or 0) for rank in ranks))} - {*ranks})
        if missing:
            raise DumpError(f"{paths[0].parent} lacks rank_{missing[0]}.jsonl; every rank holds a part of the step")
        if len(set(ranks)) < len(ranks):
            raise DumpError(f"{paths[0]} and others are twice of one step and rank; import one training at a time")
        if not (paths[0].parent / "STABLE").exists():
            step.notes.append(f"{paths[0].parent.name} has no file STABLE: prime-rl had not finished writing it")
        step.rollouts = _prime_rl(step, options)
        steps.append(step)
    return steps


def _prime_rl(step: Step, options: Options) -> Iterator[Rollout]:
    expected: dict[Any, int] = defaultdict(int)
    for where, record in json_lines(step.files, options.on_progress):
        with understood(where):
            lacking = [name for name in _PRIME_KEYS if name not in record]
            if lacking:
                raise DumpError(f"{where} lacks {', '.join(lacking)}; found {', '.join(record)}")
            if record.get("schema_version", 1) != 1:
                raise DumpError(
                    f"{where}: schema_version {short(record['schema_version'])} of token exports, known is 1"
                )
            if step.number is not None and record.get("step", step.number) != step.number:
                raise DumpError(f"{where}: step {record['step']} in a folder of step {step.number}")
            rank, index = record.get("rank", 0), record.get("export_sequence_idx")
            if index is not None and index != expected[rank]:
                raise DumpError(
                    f"{where}: export_sequence_idx is {short(index)}, expected {expected[rank]}; a line is missing or "
                    "written twice"
                )
            expected[rank] += 1
            ids_T = whole_numbers(record["token_ids"], where, "token_ids")
            n = len(ids_T)
            mask_T = flags(record["loss_mask"], where, "loss_mask", n)
            infer_T, train_T = (_stream(record, name, where, n) for name in ("inference_logprobs", "trainer_logprobs"))
            entropy_T = _stream(record, "entropy", where, n)
            advantage_T = _stream(record, "advantages", where, n)
            # position 0 is filler, or scored behind another sequence of the packed row
            train_T[0] = entropy_T[0] = np.nan
            infer_T[~mask_T] = advantage_T[~mask_T] = np.nan
            rollout = Rollout(
                where=where,
                is_response_T=from_mask(mask_T),
                token_id_T=ids_T,
                is_trained_T=mask_T,
                logp={INFER: infer_T, TRAIN: train_T},
                entropy={TRAIN: entropy_T},
                advantage_T=advantage_T,
            )
        yield rollout


def _stream(record: dict[str, Any], name: str, where: str, n: int) -> Any:
    """A stream of one number per token; null, one or all of them, is NaN."""
    values = record.get(name)
    return np.full(n, np.nan) if values is None else floats(values, where, name, n)


NEMO_RL: Final = Importer("nemo-rl", "NeMo-RL: {log_dir}/train_data_step*.jsonl", is_nemo_rl, read_nemo_rl)
PRIME_RL: Final = Importer(
    "prime-rl", "prime-rl: {output_dir}/token_exports/step_*/rank_*.jsonl", is_prime_rl, read_prime_rl
)
