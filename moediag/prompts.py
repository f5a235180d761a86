"""Prompts files: JSONL or plain text, read strictly, with the line number in every complaint.

One prompt per line. JSONL objects carry exactly one of ``prompt`` (text), ``messages`` (for the chat
template) or ``prompt_token_ids``, and optionally ``completion_token_ids``: then nothing is sampled and both
engines score the given tokens. Any other file is plain text, one prompt a line, blank lines left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moediag.errors import PromptsError

_SOURCES = ("prompt", "messages", "prompt_token_ids")
_KNOWN = {*_SOURCES, "completion_token_ids"}


@dataclass(frozen=True)
class Prompt:
    """One prompt as the file gives it; exactly one of the first three is set."""

    line: int
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    token_ids: tuple[int, ...] | None = None
    completion_token_ids: tuple[int, ...] | None = None
    ignored_keys: tuple[str, ...] = field(default=(), compare=False)


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Read a prompts file.

    Args:
        path: ``*.jsonl`` / ``*.json`` lines are JSON objects; anything else is plain text.
        limit: keep the first so many prompts.

    Raises:
        PromptsError: missing, empty, not UTF-8, a malformed line (named), or only some lines with completions.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise PromptsError(f"prompts file {path} does not exist; give --prompts an existing file") from None
    except UnicodeDecodeError as error:
        raise PromptsError(f"prompts file {path} is not UTF-8 (byte {error.start}); convert it first") from None
    except OSError as error:
        raise PromptsError(f"prompts file {path} cannot be read: {error.strerror}") from None
    parse = _parse_json_line if path.suffix in (".jsonl", ".json", ".ndjson") else _parse_text_line
    # Only "\n" ends a line: str.splitlines would also cut at characters that JSON strings may hold.
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    prompts = [parse(path, number, line) for number, line in lines[:limit]]
    if not prompts:
        raise PromptsError(f"prompts file {path} holds no prompt; expected one per line")
    _check_completions(path, prompts)
    return prompts


def _check_completions(path: Path, prompts: list[Prompt]) -> None:
    with_completion = [prompt.completion_token_ids is not None for prompt in prompts]
    if any(with_completion) and not all(with_completion):
        odd = prompts[with_completion.index(not with_completion[0])]
        raise PromptsError(
            f"{path}:{odd.line}: completion_token_ids must stand on every line or on none, "
            f"found {sum(with_completion)} of {len(prompts)}; split the file in two"
        )


def _parse_text_line(path: Path, number: int, line: str) -> Prompt:
    return Prompt(line=number, text=line)


def _parse_json_line(path: Path, number: int, line: str) -> Prompt:
    where = f"{path}:{number}"
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
        json.dumps(record, ensure_ascii=False).encode()
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise PromptsError(f"{where}: not a JSON object ({reason}); expected one JSON object per line") from None
    except UnicodeEncodeError:
        raise PromptsError(f"{where}: holds a lone surrogate, which is no text; fix the escape") from None
    except ValueError as error:  # NaN, or integers of more digits than Python converts
        raise PromptsError(f"{where}: not readable JSON ({error}); expected one JSON object per line") from None
    if not isinstance(record, dict):
        raise PromptsError(f"{where}: expected a JSON object, found {type(record).__name__}")
    given = [key for key in _SOURCES if key in record]
    if len(given) != 1:
        raise PromptsError(f"{where}: expected exactly one of {', '.join(_SOURCES)}, found {given or 'none'}")
    # A misspelt completion would otherwise be sampled over without a word.
    unknown = sorted(key for key in record if key not in _KNOWN)
    misspelt = [key for key in unknown if key.startswith("completion")]
    if misspelt:
        raise PromptsError(f"{where}: unknown key {misspelt[0]!r}; expected {', '.join(sorted(_KNOWN))}")
    return Prompt(
        line=number,
        text=_text(where, record) if given == ["prompt"] else None,
        messages=_messages(where, record) if given == ["messages"] else None,
        token_ids=_token_ids(where, record, "prompt_token_ids"),
        completion_token_ids=_token_ids(where, record, "completion_token_ids"),
        ignored_keys=tuple(unknown),
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _text(where: str, record: dict[str, Any]) -> str:
    text = record["prompt"]
    if not isinstance(text, str) or not text:
        raise PromptsError(f"{where}: prompt must be a non-empty string")
    return text


def _messages(where: str, record: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    messages = record["messages"]
    is_chat = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
    if not is_chat:
        raise PromptsError(f"{where}: messages must be a non-empty list of objects with a role")
    return tuple(messages)


def _token_ids(where: str, record: dict[str, Any], key: str) -> tuple[int, ...] | None:
    if key not in record:
        return None
    ids = record[key]
    is_ids = isinstance(ids, list) and ids and all(type(token) is int and 0 <= token < 2**31 for token in ids)
    if not is_ids:
        raise PromptsError(f"{where}: {key} must be a non-empty list of token ids (integers >= 0)")
    return tuple(ids)
