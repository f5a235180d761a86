"""Rollouts that were kept as text: TRL's completions, verl's rollout_data_dir, AReaL's and anyone's JSON lines.

Text has no token ids. A tokenizer (``--tokenizer``) makes them, of prompt and response apart, so that no token spans
their boundary; the run then has tokens, rewards and advantages and no arm, and both engines score it afterwards. TRL's
table is read as it is where a changed trainer logged its lists of ids and log-probabilities beside the text. Read from
the frameworks' source: huggingface/trl f2cd577 (trainer/grpo_trainer.py, log), verl-project/verl 1dda039
(v1/trainer_base.py, _write_generations) and AReaL cbff54d (workflow_executor.py).

Invariant: ids made from text are never taken for those that were sampled: the run says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moediag.errors import DependencyError, DumpError
from moediag.importers.rollouts import (
    Importer,
    Int64,
    Options,
    Rollout,
    Step,
    by_step,
    flags,
    floats,
    number_in,
    one_number,
    placed,
    short,
    understood,
    whole_numbers,
)
from moediag.importers.tables import OnProgress, first_record, json_lines, open_table, readable
from moediag.notation import INFER, TRAIN
from moediag.run.files import TOKENIZER_FILES, digest_of, tokenizer_digest
from moediag.run.records import Tokenizer

PAIRS: Final = (("prompt", "completion"), ("prompt", "response"), ("input", "output"))
"""Columns of a prompt and of what was sampled behind it."""
_REWARDS: Final = ("reward", "score")
_TRL_TEXT: Final = ("step", "prompt", "completion", "advantage")
_TRL_IDS: Final = ("prompt_ids", "completion_ids")
_TRL_LOGPS: Final = {INFER: "sampling_per_token_logps", TRAIN: "old_per_token_logps"}
_TRL_MASKS: Final = ("completion_mask", "tool_mask", "env_mask")
_SEVERAL: Final = "rewards are {}, whose weights TRL does not log: none is taken"
_AT_ONCE: Final = 256
"""Sequences in memory as text."""


class TextTokenizer:
    """A tokenizer in a folder, as transformers loads it.

    Args:
        folder: a checkpoint's, or one with the tokenizer's files alone; code of its own is not run.

    Raises:
        DumpError: no such folder, or nothing in it that transformers loads.
        DependencyError: transformers is missing.
    """

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise DumpError(f"--tokenizer {folder} is no folder with a tokenizer ({', '.join(TOKENIZER_FILES)})")
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise DependencyError("--tokenizer needs transformers; run: pip install transformers") from None
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # tokenizer classes raise anything
            raise DumpError(f"--tokenizer {folder} does not load ({type(error).__name__}: {error})") from None
        ids_of = sorted(self._tokenizer.get_vocab().items())
        self.record = Tokenizer(source=str(folder), files_sha256=tokenizer_digest(folder), map_sha256=digest_of(ids_of))

    def prompts(self, values: Sequence[Any], places: Sequence[str]) -> list[Int64]:
        """Ids of prompts: text, with the special tokens that the tokenizer puts around a text, or messages."""
        texts, begins = [], self._tokenizer.bos_token
        for value, where in zip(values, places, strict=True):
            texts.append(value if isinstance(value, str) else self._from_messages(value, where))
        is_whole = [not isinstance(value, str) or bool(begins and value.startswith(begins)) for value in values]
        plain = iter(self._ids([text for text, has in zip(texts, is_whole, strict=True) if not has], special=True))
        whole = iter(self._ids([text for text, has in zip(texts, is_whole, strict=True) if has], special=False))
        return [next(whole if has else plain) for has in is_whole]

    def responses(self, values: Sequence[Any], places: Sequence[str]) -> list[Int64]:
        """Ids of responses: text, or the one message of the assistant; nothing is added."""
        return self._ids([_response(value, where) for value, where in zip(values, places, strict=True)], special=False)

    def _from_messages(self, messages: Any, where: str) -> str:
        if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
            raise DumpError(f"{where}: the prompt should be text or a list of messages, found {short(messages)}")
        if not self._tokenizer.chat_template:
            raise DumpError(f"{where}: the prompt is a list of messages, and the tokenizer has no chat template")
        known = [{name: part for name, part in one.items() if part is not None} for one in messages]
        goes_on = known[-1].get("role") == "assistant"
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    known, add_generation_prompt=not goes_on, continue_final_message=goes_on, tokenize=False
                )
            )
        except Exception as error:  # templates raise what they like at messages they dislike
            raise DumpError(f"{where}: the chat template refuses these messages ({error})") from None

    def _ids(self, texts: list[str], *, special: bool) -> list[Int64]:
        if not texts:
            return []
        found = self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return [np.asarray(ids, dtype=np.int64) for ids in found]


def _response(value: Any, where: str) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    if not isinstance(value, str):
        raise DumpError(
            f"{where}: the response should be text, or one message with text (which tokens of several are a tool's is "
            f"not in them); found {short(value)}"
        )
    return value


Records = Iterable[tuple[str, dict[str, Any]]]


def text_steps(importer: str, groups: dict[int | None, list[Path]], options: Options) -> list[Step]:
    """Steps of rollouts as text, of which the prompt is one of :data:`PAIRS`.

    Raises:
        DumpError: no tokenizer was given.
    """
    if options.tokenizer is None:
        first = next(iter(groups.values()))[0]
        raise DumpError(
            f"{first} holds text and no token ids: moediag import {importer} PATH --tokenizer CKPT -o RUN makes them, "
            "and moediag capture infer CKPT -o RUN, then capture train, score them"
        )
    tokenizer = TextTokenizer(options.tokenizer)
    steps = []
    for number, paths in groups.items():
        step = Step(number, tuple(paths), (), tokenizer=tokenizer.record)
        step.rollouts = _text(step, _records(paths, options.on_progress), tokenizer)
        steps.append(step)
    return steps


def _records(paths: Sequence[Path], on_progress: OnProgress) -> Records:
    if paths[0].suffix != ".parquet":
        return json_lines(paths, on_progress)
    return (one for path in paths for one in _rows(path, on_progress))


def _rows(path: Path, on_progress: OnProgress) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a parquet file, each with its place in words."""
    with readable(path), pq.ParquetFile(path) as file:
        n_rows, row = file.metadata.num_rows, 0
        for batch in file.iter_batches(batch_size=_AT_ONCE):
            for record in batch.to_pylist():
                yield f"{path} row {row}", record
                row += 1
            on_progress(row, n_rows, "rows read")


def _text(step: Step, records: Records, tokenizer: TextTokenizer) -> Iterator[Rollout]:
    waiting = iter(records)
    n_all = n_empty = n_lengths = n_other = 0
    several: dict[str, None] = {}
    while part := list(islice(waiting, _AT_ONCE)):
        places = [where for where, _ in part]
        values = [_pair(where, record) for where, record in part]
        prompts = tokenizer.prompts([prompt for prompt, _ in values], places)
        responses = tokenizer.responses([response for _, response in values], places)
        for (where, record), prompt_T, response_T in zip(part, prompts, responses, strict=True):
            n_all += 1
            with understood(where):
                if step.number is not None and record.get("step", step.number) != step.number:
                    raise DumpError(f"{where}: step {short(record['step'])} in a file of step {step.number}")
                n, n_prompt = len(prompt_T) + len(response_T), len(prompt_T)
                if not n_prompt or not len(response_T):
                    n_empty += 1
                    continue
                if "seqlen" in record:  # AReaL
                    n_lengths += 1
                    n_other += record["seqlen"] != n
                rewards = _rewards(record)
                several |= dict.fromkeys(rewards if len(rewards) > 1 else ())
                advantage = record.get("advantage")
                rollout = Rollout(
                    where=where,
                    is_response_T=np.arange(n) >= n_prompt,
                    token_id_T=np.r_[prompt_T, response_T],
                    reward=one_number(record[rewards[0]], where, rewards[0]) if len(rewards) == 1 else np.nan,
                )
                if advantage is not None:
                    one = one_number(advantage, where, "advantage")
                    rollout.advantage_T = placed(n, n_prompt, np.full(n - n_prompt, one))
                first, last = record.get("head_version"), record.get("tail_version")
                if first is not None and first == last:
                    rollout.weight_version_T = np.full(n, None, object)
                    rollout.weight_version_T[n_prompt:] = str(first)
            yield rollout
    step.notes.append(
        f"token ids are those that the tokenizer {Path(tokenizer.record.source).name} makes of the text, prompt and "
        "response apart: they may differ from the ids that were sampled, and special tokens that the framework left "
        "out of its text (markers of a chat, the end of a response) are not among them"
    )
    if n_lengths:
        step.notes.append(f"{n_other:,} of {n_lengths:,} sequences have another number of tokens than seqlen says")
    if n_empty:
        step.notes.append(f"{n_empty:,} of {n_all:,} sequences without a token of prompt or response are left out")
    if several:
        step.notes.append(_SEVERAL.format(", ".join(several)))


def _pair(where: str, record: dict[str, Any]) -> tuple[Any, Any]:
    for prompt, response in PAIRS:
        if prompt in record and response in record:
            return record[prompt], record[response]
    expected = " or ".join(" and ".join(pair) for pair in PAIRS)
    raise DumpError(f"{where} lacks {expected}; found {', '.join(record)}")


def _rewards(record: dict[str, Any]) -> list[str]:
    """Columns of rewards: the one that is called so, else TRL's, of which several have weights that it does not log."""
    named = [name for name in _REWARDS if record.get(name) is not None][:1]
    if named or "advantage" not in record:
        return named
    return [name for name, value in record.items() if isinstance(value, float) and name != "advantage"]


# TRL


def is_trl(path: Path) -> bool:
    """Whether a file is a table of TRL's completions."""
    return path.suffix == ".parquet" and {*_TRL_TEXT} <= {*_columns(path)}


def _columns(path: Path) -> dict[str, pa.DataType]:
    try:
        return open_table(path).types
    except DumpError:
        return {}


def read_trl(files: Sequence[Path], options: Options) -> list[Step]:
    """A table per step, a row per sequence: as text, or with the lists that a changed trainer logged."""
    groups = by_step(files, lambda path: number_in(path.name, r"completions_(\d+)"))
    for number, paths in groups.items():
        if len(paths) > 1:
            raise DumpError(f"{paths[0]} and {paths[1]} are both of step {number}; import one training at a time")
    types = {paths[0]: open_table(paths[0]).types for paths in groups.values()}
    has_lists = {path: {*_TRL_IDS} <= {*names} and any(name in names for name in _TRL_LOGPS.values())
                 for path, names in types.items()}  # fmt: skip
    if not all(has_lists.values()):
        if any(has_lists.values()):
            with_lists = next(path for path, has in has_lists.items() if has)
            raise DumpError(f"{with_lists} has lists of ids and others have text alone; import them apart")
        return text_steps("trl", groups, options)
    steps = []
    for number, paths in groups.items():
        step = Step(number, tuple(paths), ())
        numbers = [name for name, kind in types[paths[0]].items() if pa.types.is_floating(kind)]
        step.rollouts = _trl(step, [name for name in numbers if name != "advantage"], options)
        steps.append(step)
    return steps


def _trl(step: Step, rewards: Sequence[str], options: Options) -> Iterator[Rollout]:
    if len(rewards) > 1:
        step.notes.append(_SEVERAL.format(", ".join(rewards)))
    for where, record in _rows(step.files[0], options.on_progress):
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
        advantage = one_number(record["advantage"], where, "advantage")
        yield Rollout(
            where=where,
            is_response_T=np.arange(n) >= n_prompt,
            token_id_T=np.r_[prompt_T, ids_T],
            is_trained_T=np.r_[np.zeros(n_prompt, np.bool_), is_trained_T],
            logp=logp,
            advantage_T=placed(n, n_prompt, np.full(len(ids_T), advantage)),
            reward=one_number(record[rewards[0]], where, rewards[0]) if len(rewards) == 1 else np.nan,
        )


# Any other text


def is_text(path: Path) -> bool:
    """Whether a file holds prompts and responses as text, or as messages."""
    record = _columns(path) if path.suffix == ".parquet" else first_record(path)
    return any(prompt in record and response in record for prompt, response in PAIRS)


def read_text(files: Sequence[Path], options: Options) -> list[Step]:
    """A folder (AReaL: of a version of the weights) or a file per step, a row or line per sequence."""

    def step_of(path: Path) -> int | None:
        if path.parent.name.isdigit():
            return int(path.parent.name)
        return int(path.stem) if path.stem.isdigit() else number_in(path.stem, r"(?:step|completions)_?(\d+)")

    return text_steps("text", by_step(files, step_of), options)


TRL: Final = Importer("trl", "TRL: {output_dir}/completions/completions_*.parquet", is_trl, read_trl)
TEXT: Final = Importer(
    "text", "text alone: AReaL's {dump_dir}/{version}/{task_id}.jsonl, and JSON lines or parquet with prompt and "
    "completion (or response), or input and output", is_text, read_text, ("--tokenizer",),
)  # fmt: skip
