"""Responses of inference servers as JSON lines: SGLang's /generate; vLLM's completions, chat and generate.

A server answers one request at a time, so a sequence with tool segments is one line per turn, the prompt of a later one
holding everything before. Lines whose prompt continues another line's prompt and response are joined; what stands
between is of the environment: response, not trained. Lines are read twice: for the order of turns, then for the rest,
so that only conversations that are not complete yet are held.

Read from source: sgl-project/sglang a6463a1 (managers/tokenizer_manager.py, encode_routed_experts_for_wire) and vLLM
0.32 (entrypoints, utils/serial_utils.py numpy2base64, fused_moe/routed_experts_capturer.py).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moediag.errors import DumpError
from moediag.importers.rollouts import (
    Float64,
    Importer,
    Int64,
    Options,
    Rollout,
    Step,
    by_step,
    floats,
    number_in,
    placed_routes,
    short,
    understood,
    whole_number,
    whole_numbers,
)
from moediag.importers.sequences import no_id, repeated_rows
from moediag.importers.tables import first_record, json_lines
from moediag.notation import INFER, NO_TOKEN, NOT_ROUTED

_DTYPES: Final = {"int32": "<i4", "uint16": "<u2", "uint8": "u1", "int16": "<i2", "int8": "i1", "int64": "<i8"}
_LARGEST: Final = 32_766
_ROWS_FOR_K: Final = 2048
_OF_PROMPT: Final = "prompt_routed_experts"


@dataclass
class _Response:
    """One answer: ids of prompt (-1 = not kept) and output, and how to get the rest."""

    where: str
    name: Hashable
    prompt: Int64
    output: Int64
    logp: Callable[[], Float64 | None]
    routes: Callable[[], NDArray[Any] | None]
    """(rows, L, K) of the last rows of prompt and output but the last token."""
    first_row: int
    versions: Any


class _Reader:
    """Responses of a step, read line by line.

    Args:
        files: of its responses.
        parse: line -> its answers.
    """

    def __init__(
        self,
        step: Step,
        files: Sequence[Path],
        options: Options,
        parse: Callable[[str, dict[str, Any]], list[_Response]],
    ) -> None:
        self._step, self._files, self._options, self._parse = step, files, options, parse
        self.n_empty = self.n_differing = self.n_twice = 0

    def rollouts(self) -> Iterator[Rollout]:
        """The sequences, each when its last turn is read."""
        before_of, last = self._turns()
        open_turns: dict[int, list[_Response]] = {}
        for i, response in enumerate(self._responses()):
            turns = [*open_turns.pop(before_of.get(i, -1), []), response]
            if i in last:
                with understood(response.where):
                    rollout = self._rollout(turns)
                yield rollout
            else:
                open_turns[i] = turns
        self._note()

    def _responses(self) -> Iterator[_Response]:
        self.n_empty = 0
        for where, record in json_lines(self._files, self._options.on_progress):
            with understood(where):
                found = self._parse(where, record)
            for response in found:
                if len(response.output):
                    yield response
                else:
                    self.n_empty += 1

    def _turns(self) -> tuple[dict[int, int], set[int]]:
        """Response -> the one that it continues, and the responses that nothing continues.

        Raises:
            DumpError: one answer twice.
        """
        ends: dict[bytes, list[int]] = {}
        before_of: dict[int, int] = {}
        seen: dict[Hashable, str] = {}
        waiting: list[tuple[int, NDArray[np.uint32]]] = []
        last_tokens: set[int] = set()
        for i, response in enumerate(self._responses()):
            if (first := seen.setdefault(response.name, response.where)) != response.where:
                raise DumpError(f"{response.where}: answer {response.name} stands at {first} already; keep one of them")
            if (response.prompt != NO_TOKEN).all():
                whole = np.r_[response.prompt, response.output].astype(np.uint32)
                ends.setdefault(_digest(whole), []).append(i)
                last_tokens.add(len(whole) << 32 | int(whole[-1]))
                waiting.append((i, response.prompt.astype(np.uint32)))
        # what ends with the same token at the same place: the few prefixes of a prompt that are worth a digest
        last_N = np.sort(np.array([*last_tokens], np.int64))
        length_N = np.unique(last_N >> 32)
        for i, prompt in waiting:
            n_N = length_N[: np.searchsorted(length_N, len(prompt), side="right")]
            sought_N = n_N << 32 | prompt[n_N - 1]
            at_N = np.minimum(np.searchsorted(last_N, sought_N), len(last_N) - 1)
            for n in n_N[last_N[at_N] == sought_N][::-1]:
                found = ends.get(_digest(prompt[:n]))
                if found:
                    before_of[i] = found.pop(0) if len(found) > 1 else found.pop()
                    break
        late = [(i, j) for i, j in before_of.items() if j > i]
        if late:
            raise DumpError(
                f"{self._files[0]}: answer {late[0][0]} continues answer {late[0][1]}, which stands behind it; sort "
                "the lines by time"
            )
        n = i + 1 if seen else 0
        return before_of, {*range(n)} - {*before_of.values()}

    def _rollout(self, turns: list[_Response]) -> Rollout:
        final = turns[-1]
        ids_T = np.r_[final.prompt, final.output]
        n, n_prompt = len(ids_T), len(turns[0].prompt)
        logp_T = np.full(n, np.nan)
        is_trained_T = np.zeros(n, np.bool_)
        turn_T = np.full(n, -1, np.int32)
        version_T = np.full(n, None, object)
        routes_TLK = None
        has_logp = False
        for number, turn in enumerate(turns):
            start = len(turn.prompt)
            here = slice(start, start + len(turn.output))
            is_trained_T[here], turn_T[here] = True, number
            if (values := turn.logp()) is not None:
                has_logp, logp_T[here] = True, values
            version_T[here] = _versions(turn)
            if (rows := turn.routes()) is not None:
                placed = placed_routes(n, turn.first_row, rows, turn.where, "routed_experts")
                routes_TLK = placed if routes_TLK is None else self._merged(routes_TLK, placed)
        return Rollout(
            where=final.where,
            is_response_T=np.arange(n) >= n_prompt,
            token_id_T=ids_T,
            is_trained_T=is_trained_T,
            logp={INFER: logp_T} if has_logp else {},
            expert_ids={} if routes_TLK is None else {INFER: routes_TLK},
            turn_T=turn_T,
            weight_version_T=None if (version_T == None).all() else version_T,  # noqa: E711 - element by element
        )

    def _merged(self, earlier_TLK: NDArray[Any], later_TLK: NDArray[Any]) -> NDArray[Any]:
        """Rows as they were when their token was sampled; a later turn's prefill gives the others."""
        if earlier_TLK.shape != later_TLK.shape:
            return later_TLK  # refused by the writer, which names both
        has_T, again_T = ((ids != NOT_ROUTED).any(axis=(1, 2)) for ids in (earlier_TLK, later_TLK))
        both_T = has_T & again_T
        self.n_twice += int(both_T.sum())
        self.n_differing += int((np.sort(earlier_TLK[both_T]) != np.sort(later_TLK[both_T])).any(axis=(1, 2)).sum())
        return np.where(has_T[:, None, None], earlier_TLK, later_TLK)

    def _note(self) -> None:
        if self.n_empty:
            self._step.notes.append(f"{self.n_empty:,} answers without a token are left out")
        if self.n_differing:
            self._step.notes.append(
                f"{self.n_differing:,} of {self.n_twice:,} rows that two turns returned have other experts in the "
                "later one: taken as they were when the token was sampled"
            )


def _digest(ids: NDArray[np.uint32]) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def _versions(response: _Response) -> NDArray[np.object_]:
    """Weight version of every output token: one for all, or spans."""
    version_T = np.full(len(response.output), None, object)
    spans = response.versions
    if not isinstance(spans, list):
        version_T[:] = None if spans is None else str(spans)
        return version_T
    for span in spans:
        try:
            start, end, version = int(span["start"]), int(span["end"]), str(span["version"])
        except (TypeError, KeyError, ValueError):
            raise DumpError(
                f"{response.where}: weight_versions should be spans of version, start, end; found {short(span)}"
            ) from None
        if not 0 <= start <= end <= len(version_T):
            raise DumpError(
                f"{response.where}: weight version {version} spans {start}..{end} of {len(version_T)} tokens"
            )
        version_T[start:end] = version
    return version_T


# SGLang


def is_sglang(path: Path) -> bool:
    """Whether a file holds SGLang's responses, or the requests that they answer."""
    keys = first_record(path)
    return "meta_info" in keys or _is_request(keys)


def _is_request(keys: dict[str, Any]) -> bool:
    return "input_ids" in keys and "rid" in keys


def read_sglang(files: Sequence[Path], options: Options) -> list[Step]:
    """Files of responses, a line each, and of the requests that they answer (joined by rid), for the prompts' ids."""
    steps = []
    for number, paths in by_step(files, lambda path: number_in(path.name, r"step_?(\d+)")).items():
        requests = {}
        answers = [path for path in paths if not _is_request(first_record(path))]
        if not answers:
            raise DumpError(f"{paths[0]} holds requests alone; give the responses, too")
        for where, record in json_lines([path for path in paths if path not in answers]):
            rid = str(record.get("rid"))
            if rid in requests:
                raise DumpError(f"{where}: request {record.get('rid')} comes twice; give one file of requests per step")
            requests[rid] = record
        step = Step(number, tuple(paths), ())
        sglang = _SGLang(requests, options, step)
        step.rollouts = _Reader(step, answers, options, sglang.parse).rollouts()
        steps.append(step)
    return steps


class _SGLang:
    """Parses SGLang's responses; the payload of routes is flat, so L and K are learnt from the ids."""

    def __init__(self, requests: dict[Any, dict[str, Any]], options: Options, step: Step) -> None:
        self._requests, self._options, self._step = requests, options, step
        self._width = 0
        self._top_k: int | None = None
        self._peeked: list[NDArray[Any]] = []
        self._n_peeked = 0

    def parse(self, where: str, record: dict[str, Any]) -> list[_Response]:
        """The one answer of a line."""
        meta = record.get("meta_info")
        if not isinstance(meta, dict):
            raise DumpError(f"{where} has no meta_info; is it a response of /generate?")
        request = self._requests.get(str(meta.get("id")), {})
        if self._requests and not request:
            raise DumpError(
                f"{where}: no request {short(meta.get('id'))}; give the requests that belong to these responses"
            )
        listed = meta.get("output_token_logprobs")
        ids = record.get("output_ids", [entry[1] for entry in listed] if listed else [])
        output = whole_numbers(ids, where, "output_ids") if ids else np.zeros(0, np.int64)
        sources = ((record, "prompt_token_ids"), (meta, "prompt_token_ids"), (request, "input_ids"))
        prompt = next((source[name] for source, name in sources if source.get(name)), None)
        n_prompt = whole_number(meta.get("prompt_tokens", len(prompt or ())), where, "prompt_tokens")
        prompt_T = np.full(n_prompt, NO_TOKEN)
        if prompt is not None:
            prompt_T = whole_numbers(prompt, where, "the prompt's ids", n_prompt)
        n_completion = meta.get("completion_tokens", len(output))
        if n_completion != len(output):
            raise DumpError(f"{where}: completion_tokens is {n_completion}, output_ids hold {len(output)}")
        start = meta.get("routed_experts_start_len", request.get("routed_experts_start_len", self._options.first_row))
        first_row = whole_number(start, where, "routed_experts_start_len")
        rows = len(prompt_T) + len(output) - 1 - first_row
        flat = meta.get("routed_experts")
        dtype = str(meta.get("routed_experts_dtype", "int32"))
        if flat is not None:
            self._learn(where, flat, dtype, rows)
        return [
            _Response(
                where, str(meta.get("id", where)), prompt_T, output,
                lambda: _sglang_logp(where, listed, output),
                lambda: None if flat is None else self._routes(where, flat, dtype, rows),
                first_row, meta.get("weight_versions", meta.get("weight_version")),
            )
        ]  # fmt: skip

    def _learn(self, where: str, flat: str, dtype: str, rows: int) -> None:
        """Look at the first rows, for K."""
        if self._top_k is None and self._n_peeked < _ROWS_FOR_K:
            ids_NW = _flat(where, flat, dtype, rows, self._width)
            self._width = ids_NW.shape[1]
            self._peeked.append(ids_NW)
            self._n_peeked += len(ids_NW)

    def _routes(self, where: str, flat: str, dtype: str, rows: int) -> NDArray[Any]:
        if self._top_k is None:
            self._top_k = self._k_of(where)
            self._peeked = []
        ids_NW = _flat(where, flat, dtype, rows, self._width)
        return ids_NW.reshape(rows, -1, self._top_k)

    def _k_of(self, where: str) -> int:
        ids_NW = np.concatenate(self._peeked)
        if self._options.n_layers is not None:
            if self._width % self._options.n_layers:
                raise DumpError(
                    f"{where}: {self._width} ids a row are no whole number for each of "
                    f"--num-layers {self._options.n_layers}"
                )
            return self._width // self._options.n_layers
        top_k = next(k for k in range(self._width, 0, -1) if self._width % k == 0 and _is_top_k(ids_NW, k))
        self._step.notes.append(
            f"{self._width} ids a row are read as {self._width // top_k} layers of K = {top_k}, the largest K without "
            "an expert twice; --num-layers tells it"
        )
        return top_k


def _is_top_k(ids_NW: NDArray[Any], top_k: int) -> bool:
    """Whether ids can be rows of layers of K: different experts, or a slot of zeros (dense) or of -1."""
    blocks = np.sort(ids_NW.reshape(-1, top_k), axis=1)
    is_same_N = (blocks[:, 1:] == blocks[:, :-1]).any(axis=1)
    is_slot_N = (blocks[:, 0] == blocks[:, -1]) & np.isin(blocks[:, 0], (0, NOT_ROUTED))
    return bool((~is_same_N | is_slot_N).all())


def _flat(where: str, flat: str, dtype: str, rows: int, width: int) -> NDArray[Any]:
    """(rows, L * K) ids of a payload.

    Raises:
        DumpError: it does not hold them.
    """
    if dtype not in _DTYPES:
        raise DumpError(f"{where}: routed_experts_dtype is {short(dtype)}, known are {', '.join(_DTYPES)}")
    data = _bytes(where, flat)
    size = np.dtype(_DTYPES[dtype]).itemsize
    if rows < 1 or len(data) % (size * rows) or (width and len(data) != size * rows * width):
        expected = f"{rows} rows of {width} ids" if width else f"{rows} rows"
        raise DumpError(
            f"{where}: routed_experts hold {len(data):,} bytes of {dtype}, which are not {expected} (prompt + "
            "response - 1, from routed_experts_start_len on: keep the requests); cut, of another width, or of another "
            "request?"
        )
    ids = np.frombuffer(data, _DTYPES[dtype]).reshape(rows, -1)
    return _possible(where, ids)


def _possible(where: str, ids: NDArray[Any]) -> NDArray[Any]:
    if ids.size and (ids.max() > _LARGEST or ids.min() < NOT_ROUTED):
        wrong = int(ids[(ids > _LARGEST) | (ids < NOT_ROUTED)][0])
        raise DumpError(f"{where}: routed_experts hold {no_id(wrong)}")
    return ids


def _bytes(where: str, text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise DumpError(f"{where}: routed_experts should be base64, found {short(text)}") from None


def _sglang_logp(where: str, listed: Any, output: Int64) -> Float64 | None:
    if not listed:
        return None
    try:
        values, ids = [entry[0] for entry in listed], [entry[1] for entry in listed]
    except (TypeError, IndexError, KeyError):
        raise DumpError(f"{where}: output_token_logprobs should be lists of log-probability, id, text") from None
    if ids != output.tolist():
        raise DumpError(
            f"{where}: output_token_logprobs are of other tokens than output_ids ({len(ids)} and {len(output)})"
        )
    return floats(values, where, "output_token_logprobs")


# vLLM


def is_vllm(path: Path) -> bool:
    """Whether a file holds responses of vLLM's server."""
    choices = first_record(path).get("choices")
    return isinstance(choices, list) and bool(choices) and isinstance(choices[0], dict)


def read_vllm(files: Sequence[Path], options: Options) -> list[Step]:
    """Files of responses, a line each; every choice is a sample."""
    steps = []
    for number, paths in by_step(files, lambda path: number_in(path.name, r"step_?(\d+)")).items():
        step = Step(number, tuple(paths), ())
        parse = partial(_vllm_choices, options=options, step=step)
        step.rollouts = _Reader(step, paths, options, parse).rollouts()
        steps.append(step)
    return steps


def _vllm_choices(where: str, record: dict[str, Any], options: Options, step: Step) -> list[_Response]:
    choices = record.get("choices")
    if not isinstance(choices, list):
        raise DumpError(f"{where} has no choices; is it a response of vLLM's server?")
    found = []
    for i, choice in enumerate(choices):
        here = where if len(choices) == 1 else f"{where} choice {i}"
        prompt = choice.get("prompt_token_ids") or record.get("prompt_token_ids")
        ids = choice.get("token_ids")
        if prompt is None or ids is None:
            lacking = "prompt_token_ids" if prompt is None else "token_ids"
            raise DumpError(f"{here} lacks {lacking}; request them with return_token_ids")
        output = whole_numbers(ids, here, "token_ids") if ids else np.zeros(0, np.int64)
        prompt_T = whole_numbers(prompt, here, "prompt_token_ids")
        rows = len(prompt_T) + len(output) - 1 - options.first_row
        of_prompt = choice.get(_OF_PROMPT, record.get(_OF_PROMPT))
        if of_prompt is not None:
            step.has_dense_layers = {INFER: False}
        parts = of_prompt, choice.get("routed_experts")
        found.append(
            _Response(
                here,
                f"{record.get('id') or record.get('request_id') or where} choice {choice.get('index', i)}",
                prompt_T,
                output,
                lambda here=here, choice=choice, output=output: _vllm_logp(here, choice.get("logprobs"), output),  # type: ignore[misc]
                lambda here=here, parts=parts, rows=rows: _vllm_routes(here, *parts, rows),  # type: ignore[misc, call-arg]
                options.first_row,
                choice.get("weight_versions"),
            )
        )
    return found


def _vllm_logp(where: str, logprobs: Any, output: Int64) -> Float64 | None:
    """Log-probabilities of the output as completions (token_logprobs) or chat and generate (content) write them."""
    if not logprobs:
        return None
    content = logprobs.get("content")
    if content is None:
        return floats(logprobs.get("token_logprobs"), where, "token_logprobs", len(output))
    if all("token_id" in entry for entry in content):
        ids = list(map(itemgetter("token_id"), content))
        if ids != output.tolist():
            raise DumpError(f"{where}: logprobs are of other tokens than token_ids ({len(ids)} and {len(output)})")
    return floats(list(map(itemgetter("logprob"), content)), where, "logprobs", len(output))


def _vllm_routes(where: str, of_prompt: Any, of_rest: Any, rows: int) -> NDArray[Any] | None:
    """(rows, L, K) of the whole sequence; 0.21 has the prompt's rows apart, and of MoE layers alone."""
    parts = [_vllm_ids(where, value) for value in (of_prompt, of_rest) if value is not None and value != []]
    if not parts:
        return None
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = " and ".join(str(part.shape) for part in parts)
        raise DumpError(f"{where}: {_OF_PROMPT} and routed_experts have other layers or K: {shapes}")
    ids = np.concatenate(parts)
    if len(ids) == rows + 1:
        ids = ids[:rows]  # up to 0.20 a row for the last token, which nothing consumed
    if len(ids) != rows:
        raise DumpError(
            f"{where}: routed_experts have {len(ids)} rows, expected {rows} (prompt + response - 1, less "
            "--first-row where routed_experts_prompt_start was set); "
            f"{repeated_rows(ids, rows) or 'cut, or of another request?'}"
        )
    wide = ids.astype(np.int16 if ids.dtype.itemsize == 1 else np.int64)
    largest = np.iinfo(ids.dtype).max
    if ids.dtype.kind == "u" and ids.shape[2] > 1 and ids.max(initial=0) == largest:  # -1 in an unsigned type
        wide[(ids == largest).all(axis=2)] = NOT_ROUTED
    return _possible(where, wide)


def _vllm_ids(where: str, value: Any) -> NDArray[Any]:
    """(rows, L, K) of base64 of a .npy file, of nested lists, or of bytes with their shape and dtype beside."""
    if isinstance(value, str):
        try:
            ids: NDArray[Any] = np.load(io.BytesIO(_bytes(where, value)), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise DumpError(f"{where}: routed_experts are no .npy file ({error}); cut?") from None
    elif isinstance(value, dict):
        ids, shape = np.frombuffer(_bytes(where, value.get("data")), _DTYPES[value["dtype"]]), tuple(value["shape"])
        if ids.size != math.prod(shape):
            raise DumpError(
                f"{where}: routed_experts hold {ids.size:,} ids for shape {shape}; cut, or of another width?"
            )
        ids = ids.reshape(shape)
    else:
        ids = np.asarray(value)  # nested lists
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise DumpError(
            f"{where}: routed_experts should be [rows][layers][K] whole numbers, found {ids.dtype} {ids.shape}"
        )
    return ids


SGLANG: Final = Importer(
    "sglang", "SGLang: responses of /generate, a line each, and their requests", is_sglang, read_sglang
)
VLLM: Final = Importer("vllm", "vLLM: responses of completions, chat or generate, a line each", is_vllm, read_vllm)
