"""Dumps of trainers that are text or tables: NeMo-RL's training data, prime-rl's token exports, TRL's completions.

The first two hold whole sequences, value t of token t, with the log-probabilities of both sides; TRL's are text, unless
a changed trainer logs its lists beside it. Read from the frameworks' source: NVIDIA-NeMo/RL 7ea279a (utils/logger.py,
log_batched_dict_as_jsonl; algorithms/grpo.py), PrimeIntellect-ai/prime-rl 559b447 (trainer/rl/token_export.py) and
huggingface/trl f2cd577 (trainer/grpo_trainer.py, log).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
    placed,
    short,
    understood,
    whole_number,
    whole_numbers,
)
from moediag.importers.tables import first_record, json_lines, open_table, readable
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


_TRL_TEXT: Final = ("step", "prompt", "completion", "advantage")
_TRL_IDS: Final = ("prompt_ids", "completion_ids")
_TRL_LOGPS: Final = {INFER: "sampling_per_token_logps", TRAIN: "old_per_token_logps"}
_TRL_MASKS: Final = ("completion_mask", "tool_mask", "env_mask")
_ROWS_AT_ONCE: Final = 256


def is_trl(path: Path) -> bool:
    """Whether a file is a table of TRL's completions."""
    if path.suffix != ".parquet":
        return False
    try:
        return {*_TRL_TEXT} <= {*open_table(path).types}
    except DumpError:
        return False


def read_trl(files: Sequence[Path], options: Options) -> list[Step]:
    """A table per step, a row per sequence."""
    steps = []
    for number, paths in by_step(files, lambda path: number_in(path.name, r"completions_(\d+)")).items():
        if len(paths) > 1:
            raise DumpError(f"{paths[0]} and {paths[1]} are both of step {number}; import one training at a time")
        types = open_table(paths[0]).types
        lacking = [name for name in _TRL_IDS if name not in types]
        if lacking or not any(name in types for name in _TRL_LOGPS.values()):
            raise DumpError(
                f"{paths[0]} holds text and no log-probability (it lacks {', '.join([*lacking, *_TRL_LOGPS.values()])})"
                "; tokenise prompt and completion with the policy's tokenizer, write prompt_token_ids and "
                "completion_token_ids as JSON lines, and let both engines score them: moediag profile CKPT "
                "--prompts FILE"
            )
        step = Step(number, tuple(paths), ())
        step.rollouts = _trl(step, [name for name, kind in types.items() if pa.types.is_floating(kind)], options)
        steps.append(step)
    return steps


def _trl(step: Step, numbers: Sequence[str], options: Options) -> Iterator[Rollout]:
    path = step.files[0]
    rewards = [name for name in numbers if name != "advantage"]
    if len(rewards) > 1:
        step.notes.append(f"rewards are {', '.join(rewards)}, whose weights TRL does not log: none is taken")
    with readable(path), pq.ParquetFile(path) as file:
        n_rows = file.metadata.num_rows
        row = 0
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            for record in batch.to_pylist():
                where = f"{path} row {row}"
                row += 1
                if record["step"] != step.number and step.number is not None:
                    raise DumpError(f"{where}: step {record['step']} in a table of step {step.number}")
                prompt_T, ids_T = (whole_numbers(record[name], where, name) for name in _TRL_IDS)
                n_prompt, n = len(prompt_T), len(prompt_T) + len(ids_T)
                masks = [flags(record[name], where, name, len(ids_T)) for name in _TRL_MASKS if record.get(name)]
                is_trained_T = np.logical_and.reduce([np.ones(len(ids_T), np.bool_), *masks])
                logp = {}
                for side, name in _TRL_LOGPS.items():
                    if record.get(name) is not None:
                        values_T = floats(record[name], where, name, len(ids_T))
                        values_T[~is_trained_T & (values_T == 0)] = np.nan
                        logp[side] = placed(n, n_prompt, values_T)
                yield Rollout(
                    where=where,
                    is_response_T=np.arange(n) >= n_prompt,
                    token_id_T=np.r_[prompt_T, ids_T],
                    is_trained_T=np.r_[np.zeros(n_prompt, np.bool_), is_trained_T],
                    logp=logp,
                    advantage_T=placed(
                        n, n_prompt, np.full(len(ids_T), one_number(record["advantage"], where, "advantage"))
                    ),
                    reward=one_number(record[rewards[0]], where, rewards[0]) if len(rewards) == 1 else np.nan,
                )
            options.on_progress(row, n_rows, "rows read")


NEMO_RL: Final = Importer("nemo-rl", "NeMo-RL: {log_dir}/train_data_step*.jsonl", is_nemo_rl, read_nemo_rl)
PRIME_RL: Final = Importer(
    "prime-rl", "prime-rl: {output_dir}/token_exports/step_*/rank_*.jsonl", is_prime_rl, read_prime_rl
)
TRL: Final = Importer(
    "trl", "TRL: {output_dir}/completions/completions_*.parquet with lists of ids and log-probabilities logged beside "
    "the text", is_trl, read_trl,
)  # fmt: skip
