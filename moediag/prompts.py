"""Prompts as people keep them: text, JSON lines, a JSON array, CSV, parquet, Arrow, folders of ``datasets``.

A record has exactly one of ``prompt`` (text, or a list of messages as verl and TRL write it), ``messages`` (for the
chat template, with ``tools`` where they are given) or ``prompt_token_ids``; and optionally ``completion_token_ids``:
then nothing is sampled and both engines score the given tokens. In plain text every line is a prompt, blank lines left
out.

Invariants:
    - what a file is, its first bytes tell, and its name only where these leave it open; what is neither is refused:
      nothing is read as lines of text that is something else;
    - every complaint names the line or the row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

from moediag.errors import PromptsError

_SOURCES = ("prompt", "messages", "prompt_token_ids")
_KNOWN = {*_SOURCES, "completion_token_ids", "tools"}
_PACKED: Final = {b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
_PARQUET, _ARROW, _ARROW_STREAM, _GZIP = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"\x1f\x8b"
_TEXT: Final = ("", ".txt", ".text")
_JSON: Final = (".json", ".jsonl", ".ndjson")
_CSV: Final = (".csv", ".tsv")
_KINDS: Final = (
    "JSON lines, a JSON array, CSV with a header, parquet, text (.txt), each also as .gz, or a folder that datasets "
    "saved"
)
_AS_MESSAGES: Final = re.compile(r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:")

Record = tuple[str, Any]
"""Where it stands, and what is there: an object of known and other keys, or a line of text."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as the file gives it; exactly one of the first three after ``where`` is set."""

    where: str
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    token_ids: tuple[int, ...] | None = None
    completion_token_ids: tuple[int, ...] | None = None
    tools: tuple[Any, ...] = ()
    ignored_keys: tuple[str, ...] = field(default=(), compare=False)

    def content(self) -> list[Any]:
        """In plain types: what makes two prompts the same."""
        known = [self.text, self.messages, self.token_ids, self.completion_token_ids]
        return [*known, self.tools] if self.tools else known


def separator_in(header: str) -> str:
    """What separates the cells of a CSV, by its header: comma, semicolon or tab.

    Example:
        >>> separator_in("seq_id;position"), separator_in("prompt")
        (';', ',')
    """
    return max(",;\t", key=header.count)


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Read a prompts file, or a folder that ``datasets`` saved.

    Args:
        limit: keep the first so many prompts, and look at no further ones.

    Raises:
        PromptsError: missing, empty, of no known kind, a malformed record (named), or only some with completions.
    """
    try:
        prompts = [_prompt(*record) for record in islice(_records(path), limit)]
    except FileNotFoundError:
        raise PromptsError(f"prompts file {path} does not exist; give --prompts an existing file") from None
    except OSError as error:
        raise PromptsError(f"prompts file {path} cannot be read: {error.strerror or error}") from None
    if not prompts:
        raise PromptsError(f"prompts file {path} holds no prompt; expected {_KINDS}")
    _check_completions(prompts)
    return prompts


def _check_completions(prompts: list[Prompt]) -> None:
    with_completion = [prompt.completion_token_ids is not None for prompt in prompts]
    if any(with_completion) and not all(with_completion):
        odd = prompts[with_completion.index(not with_completion[0])]
        raise PromptsError(
            f"{odd.where}: completion_token_ids must stand on every line or on none, "
            f"found {sum(with_completion)} of {len(prompts)}; split the file in two"
        )


def _records(path: Path) -> Iterator[Record]:
    """The records of a file, whatever it is."""
    if path.is_dir():
        yield from _folder_records(path)
        return
    with path.open("rb") as file:
        head = file.read(8)
    content: bytes | None = None
    name = path.name
    if head.startswith(_GZIP):
        try:
            content = gzip.decompress(path.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise PromptsError(f"prompts file {path} is damaged gzip ({error}); copy it again") from None
        head, name = content[:8], name.removesuffix(".gz")
    packed = next((word for magic, word in _PACKED.items() if head.startswith(magic)), None)
    if packed:
        raise PromptsError(f"prompts file {path} is packed with {packed}; unpack it, or pack it with gzip")
    suffix = Path(name).suffix.lower()
    if head.startswith(_PARQUET):
        yield from _table_records(path, content, _parquet_batches)
    elif head.startswith((_ARROW, _ARROW_STREAM)):
        yield from _table_records(path, content, _arrow_batches)
    else:
        yield from _text_records(path, suffix, path.read_bytes() if content is None else content)


def _text_records(path: Path, suffix: str, content: bytes) -> Iterator[Record]:
    """The records of a file of text: JSON, CSV or lines."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptsError(f"prompts file {path} is not UTF-8 (byte {error.start}); expected {_KINDS}") from None
    if not text.strip():
        return
    if "\0" in text:
        raise PromptsError(f"prompts file {path} is no text (it holds a NUL byte); expected {_KINDS}")
    first = next(line for line in text.split("\n") if line.strip()).strip()
    if suffix in _CSV:
        yield from _csv_records(path, text)
    elif suffix in _JSON or _is_json(text, first):
        if suffix == ".txt":
            raise PromptsError(
                f"prompts file {path} holds JSON and is called text; call it .jsonl or .json (prompts that are JSON "
                'themselves: {"prompt": "..."} a line)'
            )
        yield from _json_records(path, text)
    elif suffix not in _TEXT:
        raise PromptsError(f"prompts file {path} is of no known kind ({suffix}); expected {_KINDS}")
    elif set(_header(first)) & {*_SOURCES}:
        raise PromptsError(
            f"prompts file {path} begins with the header of a table ({first[:60]}); call it .csv, or .tsv"
        )
    else:
        yield from _lines(path, text)


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """Lines that are not blank; only a line feed ends one: str.splitlines would cut inside JSON strings, too."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line.rstrip("\r")


def _is_json(text: str, first: str) -> bool:
    """Whether a text without a telling name is JSON, or was meant to be."""
    if first[0] not in "[{":
        return False
    if first in ("[", "{") or re.match(r'[\[{]\s*["{]', first):
        return True
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def _json_records(path: Path, text: str) -> Iterator[Record]:
    """Objects of an array, a line each, or a single one over several lines."""
    start = text.lstrip()
    if start[0] == "[":
        found = _parsed(str(path), text)
        yield from ((f"{path} entry {nth}", _whole(f"{path} entry {nth}", one)) for nth, one in enumerate(found, 1))
    elif start.partition("\n")[0].strip() == "{":
        yield str(path), _whole(str(path), _parsed(str(path), text))
    else:
        yield from ((where, _whole(where, _parsed(where, line))) for where, line in _lines(path, text))


def _parsed(where: str, text: str) -> Any:
    """JSON, read strictly.

    Raises:
        PromptsError: it is none.
    """
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(found, ensure_ascii=False).encode()
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise PromptsError(f"{where}: not a JSON object ({reason}); expected one per line, or an array") from None
    except UnicodeEncodeError:
        raise PromptsError(f"{where}: holds a lone surrogate, which is no text; fix the escape") from None
    except ValueError as error:  # NaN, or integers of more digits than Python converts
        raise PromptsError(f"{where}: not readable JSON ({error}); write it again") from None
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _whole(where: str, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise PromptsError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return record


def _header(line: str) -> list[str]:
    return [name.strip().strip('"') for name in line.split(separator_in(line))]


def _csv_records(path: Path, text: str) -> Iterator[Record]:
    """Rows of a table with a header, separated by commas, semicolons or tabs; empty cells are left out."""
    limit = csv.field_size_limit(2**31 - 1)  # prompts are longer than Python's 128 KiB
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator_in(text.partition("\n")[0]), strict=True)
        names = [name.strip() for name in next(rows, [])]
        _refuse_columns(path, names)
        line = rows.line_num + 1
        for cells in rows:
            where, line = f"{path}:{line}", rows.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                raise PromptsError(
                    f"{where}: {len(cells)} cells, the header has {len(names)}; quote cells that hold it"
                )
            yield where, {name: cell for name, cell in zip(names, cells, strict=True) if cell}
    except csv.Error as error:
        raise PromptsError(f"{path}:{rows.line_num}: not readable as CSV ({error}); write it again") from None
    finally:
        csv.field_size_limit(limit)


def _refuse_columns(path: Path, names: Sequence[str]) -> None:
    """A table without a column of prompts, or with one twice."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PromptsError(f"{path} has the column {twice!r} twice; keep one of them")
    if not set(names) & {*_SOURCES}:
        raise PromptsError(
            f"{path} has none of the columns {', '.join(_SOURCES)}, found {', '.join(names)[:200] or 'none'}; rename "
            "the one with the prompts"
        )


def _folder_records(path: Path) -> Iterator[Record]:
    """The rows of a folder that ``datasets`` saved (``save_to_disk``)."""
    splits, state = path / "dataset_dict.json", path / "state.json"
    if splits.is_file():
        names = _folder_json(splits).get("splits") or []
        if len(names) != 1:
            raise PromptsError(
                f"{path} holds the splits {', '.join(map(str, names)) or 'none'}; give one of them, e.g. --prompts "
                f"{path / str(next(iter(names), 'train'))}"
            )
        yield from _folder_records(path / str(names[0]))
        return
    if not state.is_file():
        tables = sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")])
        hint = f"it holds parquet files: give one of them, e.g. {tables[0]}" if tables else f"expected {_KINDS}"
        raise PromptsError(f"prompts file {path} cannot be read: a folder without datasets' state.json; {hint}")
    about = _folder_json(state)
    if about.get("_indices_data_files"):
        raise PromptsError(f"{path} was saved with indices beside its rows; save it again after flatten_indices()")
    for entry in about.get("_data_files") or []:
        part = path / str(entry.get("filename") if isinstance(entry, dict) else entry)
        if not part.is_file():
            raise PromptsError(f"{part} is missing; {state} names it: copy the folder again")
        yield from _table_records(part, None, _arrow_batches)


def _folder_json(path: Path) -> dict[str, Any]:
    try:
        return _whole(str(path), _parsed(str(path), path.read_text()))
    except UnicodeDecodeError:
        raise PromptsError(f"{path} is not UTF-8; copy the folder again") from None


Batches = Callable[[Any], tuple[Sequence[str], Iterator[Any]]]
"""A table's columns and its record batches, those that are used."""


def _table_records(path: Path, content: bytes | None, batches_of: Batches) -> Iterator[Record]:
    """Rows of parquet or Arrow; fields of nested columns that another row brought in, null here, are left out."""
    import pyarrow as pa

    row = 0
    try:
        names, batches = batches_of(path if content is None else pa.BufferReader(content))
        _refuse_columns(path, names)
        others = dict.fromkeys(name for name in names if name not in _KNOWN)
        for batch in batches:
            for found in batch.to_pylist():
                row += 1
                found = {name: _without_gaps(value) for name, value in found.items() if value is not None}
                yield f"{path} row {row}", {**others, **found}
    except PromptsError:
        raise
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise PromptsError(f"{path} cannot be read as a table after row {row}: {error}; write it again") from None


def _without_gaps(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_gaps(one) for name, one in value.items() if one is not None or name == "content"}
    return [_without_gaps(one) for one in value] if isinstance(value, list) else value


def _parquet_batches(source: Any) -> tuple[Sequence[str], Iterator[Any]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(source)
    names = list(file.schema_arrow.names)
    return names, file.iter_batches(batch_size=256, columns=[name for name in names if name in _KNOWN])


def _arrow_batches(source: Any) -> tuple[Sequence[str], Iterator[Any]]:
    import pyarrow as pa

    opened = pa.memory_map(str(source)) if isinstance(source, Path) else source
    if opened.read(len(_ARROW)) == _ARROW:
        opened.seek(0)
        file = pa.ipc.open_file(opened)
        schema, batches = file.schema, (file.get_batch(nth) for nth in range(file.num_record_batches))
    else:
        opened.seek(0)
        stream = pa.ipc.open_stream(opened)
        schema, batches = stream.schema, iter(stream)
    known = [name for name in schema.names if name in _KNOWN]
    return schema.names, (part for batch in batches for part in _small(batch.select(known)))


def _small(batch: Any) -> Iterator[Any]:
    return (batch.slice(start, 256) for start in range(0, len(batch), 256))


def _prompt(where: str, record: Any) -> Prompt:
    """One record, looked at strictly."""
    if isinstance(record, str):
        return Prompt(where, text=record)
    given = [key for key in _SOURCES if key in record]
    if len(given) != 1:
        found = " and ".join(given) or f"none; its keys are {', '.join(map(str, record))[:200] or 'none'}"
        raise PromptsError(f"{where}: expected exactly one of {', '.join(_SOURCES)}, found {found}")
    # A misspelt completion would otherwise be sampled over without a word.
    unknown = sorted(key for key in record if key not in _KNOWN)
    misspelt = [key for key in unknown if key.startswith("completion")]
    if misspelt:
        raise PromptsError(
            f"{where}: unknown key {misspelt[0]!r}; expected {', '.join(sorted(_KNOWN))} (completions are given as "
            "token ids, or left out and sampled)"
        )
    text, messages = _text_or_messages(where, record)
    tools = _tools(where, record)
    return Prompt(
        where,
        text=text,
        messages=messages,
        token_ids=_token_ids(where, record, "prompt_token_ids"),
        completion_token_ids=_token_ids(where, record, "completion_token_ids"),
        tools=tools if messages else (),
        ignored_keys=(*unknown, *(["tools"] if tools and not messages else [])),
    )


def _text_or_messages(where: str, record: dict[str, Any]) -> tuple[str | None, tuple[dict[str, Any], ...] | None]:
    """What stands under ``prompt`` or ``messages``."""
    if "messages" in record:
        return None, _messages(where, "messages", _from_text(where, "messages", record["messages"]))
    if "prompt" not in record:
        return None, None
    prompt = record["prompt"]
    if isinstance(prompt, str) and _AS_MESSAGES.match(prompt):
        prompt = _from_text(where, "prompt", prompt)
    if isinstance(prompt, list):
        if prompt and all(type(one) is int for one in prompt):
            raise PromptsError(f"{where}: prompt holds token ids; call them prompt_token_ids")
        return None, _messages(where, "prompt", prompt)
    if not isinstance(prompt, str) or not prompt:
        raise PromptsError(f"{where}: prompt must be a non-empty string, or a list of messages")
    return prompt, None


def _from_text(where: str, key: str, value: Any) -> Any:
    """A list that a cell holds as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return _parsed(where, value)
    except PromptsError:
        raise PromptsError(
            f"{where}: {key} is a list as Python prints it, or no JSON ({value[:40]}); write it with json.dumps"
        ) from None


def _messages(where: str, key: str, messages: Any) -> tuple[dict[str, Any], ...]:
    is_chat = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
    if not is_chat:
        raise PromptsError(f"{where}: {key} must be a non-empty list of objects with a role")
    return tuple(messages)


def _tools(where: str, record: dict[str, Any]) -> tuple[Any, ...]:
    """Tools for the chat template, a list or its JSON; none where there is nothing."""
    tools = _from_text(where, "tools", record.get("tools") or [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise PromptsError(f"{where}: tools must be a list of objects, as the chat template takes them")
    return tuple(tools)


def _token_ids(where: str, record: dict[str, Any], key: str) -> tuple[int, ...] | None:
    if key not in record:
        return None
    ids = _from_text(where, key, record[key])
    is_ids = isinstance(ids, list) and ids and all(type(token) is int and 0 <= token < 2**31 for token in ids)
    if not is_ids:
        raise PromptsError(f"{where}: {key} must be a non-empty list of token ids (integers >= 0)")
    return tuple(ids)
