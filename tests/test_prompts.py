"""Prompts files: every kind that people have is read or refused in one line, never taken for another."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moediag.engines.tokenised import tokenise
from moediag.errors import PromptsError
from moediag.prompts import Prompt, read_prompts

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def written(tmp_path: Path, text: str, name: str = "p.jsonl") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_plain_text_is_one_prompt_a_line(tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path, "one\n\n two \r\n", "p.txt"))
    assert [(p.where, p.text) for p in prompts] == [(f"{tmp_path}/p.txt:1", "one"), (f"{tmp_path}/p.txt:3", " two ")]


def test_a_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path: Path) -> None:
    """str.splitlines cut JSON lines at U+2028, which JSON strings may hold unescaped."""
    prompts = read_prompts(written(tmp_path, '{"prompt": "a\u2028b"}\n'))
    assert prompts[0].text == "a\u2028b"


def test_each_kind_of_record_is_read(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    lines = [{"prompt": "a"}, {"messages": chat}, {"prompt_token_ids": [1, 2], "other": 1}]
    prompts = read_prompts(written(tmp_path, "".join(json.dumps(line) + "\n" for line in lines)))
    assert prompts[0].text == "a"
    assert prompts[1].messages == tuple(chat)
    assert prompts[2].token_ids == (1, 2)
    assert prompts[2].ignored_keys == ("other",)


def test_limit_keeps_the_first_prompts_and_reads_no_further(tmp_path: Path) -> None:
    assert len(read_prompts(written(tmp_path, '{"prompt": "a"}\nnot json\n'), limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no prompt"),
        ("\n \n", "holds no prompt"),
        ('{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: not a JSON object"),
        ("[1]\n", "p.jsonl entry 1: expected a JSON object, found int"),
        ('"a"\n', "p.jsonl:1: expected a JSON object, found str"),
        ('{"question": "a"}\n', "found none; its keys are question"),
        ('{"prompt": [1, 2]}\n', "call them prompt_token_ids"),
        ('{"prompt": ["a"]}\n', "p.jsonl:1: prompt must be a non-empty list of objects with a role"),
        ("{\"prompt\": \"[{'role': 'user'}]\"}\n", "a list as Python prints it"),
        ('{"messages": [{"role": "user"}], "tools": "add"}\n', "tools is a list as Python prints it, or no JSON"),
        ('{"messages": [{"role": "user"}], "tools": [1]}\n', "tools must be a list of objects"),
        ('{"prompt": "a", "completion": "b"}\n', "completions are given as token ids"),
        ('{"text": "a"}\n', "p.jsonl:1: expected exactly one of"),
        ('{"prompt": "a", "prompt_token_ids": [1]}\n', "p.jsonl:1: expected exactly one of"),
        ('{"prompt": ""}\n', "p.jsonl:1: prompt must be a non-empty string"),
        ('{"prompt": "\\ud800"}\n', "lone surrogate"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}\n', "lone surrogate"),
        ('{"messages": [{"role": "user", "content": NaN}]}\n', "NaN is not JSON"),
        ('{"prompt": "a", "completion_tokens_ids": [1]}\n', "unknown key 'completion_tokens_ids'"),
        ('{"messages": []}\n', "p.jsonl:1: messages must be"),
        ('{"prompt_token_ids": [1, -1]}\n', "p.jsonl:1: prompt_token_ids must be"),
        ('{"prompt_token_ids": [true]}\n', "p.jsonl:1: prompt_token_ids must be"),
        ('{"prompt": "a", "completion_token_ids": []}\n', "completion_token_ids must be"),
        ('{"prompt": "a", "completion_token_ids": [1]}\n{"prompt": "b"}\n', "p.jsonl:2: completion_token_ids must"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(PromptsError) as error:
        read_prompts(written(tmp_path, text))
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_file_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match="does not exist"):
        read_prompts(tmp_path / "absent.jsonl")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptsError, match="not UTF-8"):
        read_prompts(tmp_path / "b.txt")
    with pytest.raises(PromptsError, match="cannot be read"):
        read_prompts(tmp_path)


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def saved_dataset(folder: Path, *shards: dict[str, Any], **state: Any) -> Path:
    """A folder as ``datasets`` writes it with save_to_disk (arrow_dataset.py): streams, and state.json naming them."""
    folder.mkdir()
    names = [f"data-{nth:05}-of-{len(shards):05}.arrow" for nth in range(len(shards))]
    for name, columns in zip(names, shards, strict=True):
        table = pa.table(columns)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    content = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps({**content, **state}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def csv_text(*rows: list[str], separator: str = ",") -> str:
    sink = io.StringIO()
    csv.writer(sink, delimiter=separator).writerows(rows)
    return sink.getvalue()


LINES = '{"prompt": "a; b"}\n{"prompt": "c"}\n'
ARRAY = json.dumps([{"prompt": "a; b"}, {"prompt": "c"}], indent=1)
TABLE = [["prompt", "answer"], ["a; b", "1"], ["c", ""]]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a; b\n\nc\n"),
        ("prompts", "a; b\nc"),
        ("p.jsonl", LINES),
        ("p.json", LINES),
        ("prompts", LINES),
        ("p.dat", LINES),
        ("p.jsonl", "\ufeff" + LINES),
        ("p.json", ARRAY),
        ("p.jsonl", ARRAY),
        ("prompts", ARRAY),
        ("p.csv", csv_text(*TABLE)),
        ("p.csv", csv_text(*TABLE, separator=";")),
        ("p.tsv", csv_text(*TABLE, separator="\t")),
        ("p.csv", "\ufeff" + csv_text(*TABLE)),
        ("p.csv", 'prompt\n"a; b"\n\nc\n'),
    ],
)
def test_the_same_prompts_in_every_kind_of_text(tmp_path: Path, name: str, text: str, is_packed: bool) -> None:
    """A JSON array, a CSV and JSON lines without a telling name used to be read as lines of text."""
    path = tmp_path / f"{name}{'.gz' * is_packed}"
    content = text.encode()
    path.write_bytes(gzip.compress(content) if is_packed else content)
    assert [prompt.text for prompt in read_prompts(path)] == ["a; b", "c"]


def test_gzip_is_known_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(gzip.compress(LINES.encode()))
    assert len(read_prompts(tmp_path / "p.jsonl")) == 2


def test_a_single_object_over_several_lines_is_one_prompt(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps({"prompt": "a"}, indent=2), "p.json")
    assert [prompt.text for prompt in read_prompts(path)] == ["a"]


def test_csv_cells_hold_lines_quotes_and_lists(tmp_path: Path) -> None:
    rows = [["messages", "prompt_token_ids"], [json.dumps(CHAT), ""], ["", "[1, 2]"]]
    chat, ids = read_prompts(written(tmp_path, csv_text(*rows), "p.csv"))
    assert chat.messages == tuple(CHAT)
    assert ids.token_ids == (1, 2)
    long = 'one\ntwo "three"\n' + "x" * 200_000  # Python's own limit is 131,072
    path = written(tmp_path, csv_text(["prompt"], [long], ["b"]), "q.csv")
    assert [(p.where, p.text) for p in read_prompts(path)] == [(f"{path}:2", long), (f"{path}:5", "b")]


@pytest.mark.parametrize("key", ["prompt", "messages"])
def test_message_lists_stand_under_prompt_too(tmp_path: Path, key: str) -> None:
    """verl and TRL keep the messages in the column prompt; a list there used to be refused."""
    path = written(tmp_path, json.dumps({key: CHAT}) + "\n" + json.dumps({key: json.dumps(CHAT)}) + "\n")
    assert [prompt.messages for prompt in read_prompts(path)] == [tuple(CHAT)] * 2


def test_parquet_as_verl_and_trl_write_it(tmp_path: Path) -> None:
    """Nested columns have every key in every row; keys that a row does not have come back as null and are left out."""
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [TOOL]}]
    columns = {"data_source": ["gsm8k"] * 2, "prompt": [CHAT, talk], "tools": [[], [TOOL]]}
    first, second = read_prompts(parquet(tmp_path / "train.parquet", columns))
    assert (first.where, first.messages, first.tools) == (f"{tmp_path}/train.parquet row 1", tuple(CHAT), ())
    assert first.ignored_keys == ("data_source",)
    assert second.messages == (talk[0], {**talk[1], "tool_calls": [TOOL]})
    assert second.tools == (TOOL,)
    assert first.content() == [None, tuple(CHAT), None, None]  # runs without tools keep the digest that they had


def test_parquet_of_text_and_ids_and_its_limit(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", {"prompt": [f"{n}" for n in range(600)]})
    assert [prompt.text for prompt in read_prompts(path, 300)] == [f"{n}" for n in range(300)]
    path = parquet(tmp_path / "i.parquet", {"prompt_token_ids": [[1], [2]], "completion_token_ids": [[3], [4]]})
    assert [(p.token_ids, p.completion_token_ids) for p in read_prompts(path)] == [((1,), (3,)), ((2,), (4,))]


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    folder = saved_dataset(tmp_path / "d", {"prompt": [CHAT], "id": [1]}, {"prompt": [CHAT[1:]], "id": [2]})
    prompts = read_prompts(folder)
    assert [prompt.messages for prompt in prompts] == [tuple(CHAT), tuple(CHAT[1:])]
    assert prompts[1].where == f"{folder}/data-00001-of-00002.arrow row 1"
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["d"]}')
    assert read_prompts(tmp_path) == prompts
    assert [one.messages for one in read_prompts(folder / "data-00000-of-00002.arrow")] == [tuple(CHAT)]


def test_an_arrow_file_is_read_like_a_stream(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b"]})
    with pa.OSFile(str(tmp_path / "p.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.arrow")] == ["a", "b"]


def _two_splits(path: Path) -> Path:
    path.mkdir()
    (path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return path


def _folder_of_parquet(path: Path) -> Path:
    path.mkdir()
    parquet(path / "train-00000-of-00001.parquet", {"prompt": ["a"]})
    return path


def _without_a_shard(path: Path) -> Path:
    saved_dataset(path, {"prompt": ["a"]}, {"prompt": ["b"]})
    (path / "data-00001-of-00002.arrow").unlink()
    return path


def _cut(path: Path) -> Path:
    parquet(path, {"prompt": ["a"] * 100})
    path.write_bytes(path.read_bytes()[:-20])
    return path


def _of(content: bytes | str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("name", "make", "complaint"),
    [
        ("p.txt", _of(LINES), "holds JSON and is called text; call it .jsonl"),
        ("p.txt", _of(ARRAY), "holds JSON and is called text; call it .jsonl"),
        ("prompts", _of('{"prompt": "a"'), "prompts:1: not a JSON object"),
        ("prompts", _of('[\n{"prompt": "a"},\n'), "prompts: not a JSON object"),
        ("p.txt", _of(csv_text(*TABLE)), "begins with the header of a table (prompt,answer); call it .csv"),
        ("prompts", _of("prompt;answer\na;1\n"), "begins with the header of a table"),
        ("p.yaml", _of("- a\n- b\n"), "of no known kind (.yaml)"),
        ("p.csv", _of(LINES), "has none of the columns prompt, messages, prompt_token_ids, found {"),
        ("p.csv", _of("question,answer\na,b\n"), "found question, answer; rename"),
        ("p.csv", _of("prompt,prompt\na,b\n"), "has the column 'prompt' twice"),
        ("p.csv", _of("prompt,answer\na, b, c\n"), "p.csv:2: 3 cells, the header has 2"),
        ("p.csv", _of('prompt,answer\na,1\n"b,2\n'), "not readable as CSV"),
        ("p.csv", _of("prompt,answer\n,1\n"), "p.csv:2: expected exactly one of"),
        ("p.csv", _of("prompt,messages\n[{'role': 'user'}],\n"), "a list as Python prints it"),
        ("p.csv", _of("prompt\n"), "holds no prompt"),
        ("p.txt", _of("a\0b\n"), "is no text (it holds a NUL byte)"),
        ("p.pt", _of(b"PK\x03\x04rest"), "packed with zip"),
        ("p.jsonl.zst", _of(b"\x28\xb5\x2f\xfdrest"), "packed with zstd"),
        ("p.txt", _of("a\n".encode("utf-16")), "not UTF-8"),
        ("p.gz", _of(gzip.compress(b"a" * 1000)[:-6]), "damaged gzip"),
        ("p.gz", _of(gzip.compress(b"")), "holds no prompt"),
        ("p.parquet", _cut, "cannot be read"),
        ("p.parquet", _of("a\nb\n"), "of no known kind (.parquet)"),
        ("p.parquet", lambda path: parquet(path, {"question": ["a"]}), "found question; rename"),
        ("p.parquet", lambda path: parquet(path, {"prompt": ["a", None]}), "p.parquet row 2: expected exactly one of"),
        ("p.parquet", lambda path: parquet(path, {"prompt": pa.array([], pa.string())}), "holds no prompt"),
        ("p.parquet", lambda path: parquet(path, {"prompt": [1, 2]}), "p.parquet row 1: prompt must be a non-empty"),
        ("d", _two_splits, "d holds the splits train, test; give one of them, e.g. --prompts"),
        ("d", _folder_of_parquet, "train-00000-of-00001.parquet"),
        ("d", _without_a_shard, "data-00001-of-00002.arrow is missing"),
        ("d", lambda path: saved_dataset(path, {"prompt": ["a"]}, _indices_data_files=[{}]), "flatten_indices"),
    ],
)
def test_what_is_not_read_is_refused_with_what_to_do(
    tmp_path: Path, name: str, make: Callable[[Path], Path], complaint: str
) -> None:
    """Each of these was read as lines of text, or ended in a traceback."""
    path = make(tmp_path / name)
    with pytest.raises(PromptsError) as error:
        read_prompts(path)
    assert complaint in str(error.value)
    assert str(tmp_path) in str(error.value)


TEMPLATE = "{% if tools %}tools {{ tools|length }} {% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"


def chat_checkpoint(checkpoint: Path, folder: Path, template: str) -> Any:
    """A checkpoint whose tokenizer has a chat template."""
    import shutil

    from moediag.engines.checkpoint import open_checkpoint

    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return open_checkpoint(str(folder))


def test_tools_reach_the_chat_template_or_are_refused(random_moe: Path, tmp_path: Path) -> None:
    """The column tools used to be passed over with a remark."""
    prompts = [Prompt("p:1", messages=tuple(CHAT), tools=(TOOL,)), Prompt("p:2", messages=tuple(CHAT))]
    with_tools = chat_checkpoint(random_moe, tmp_path / "a", TEMPLATE)
    tokenizer_ids = tokenise(with_tools, prompts, False)
    assert len(tokenizer_ids[0]) - len(tokenizer_ids[1]) == len("tools 1 ")  # a byte a token
    without = chat_checkpoint(random_moe, tmp_path / "b", TEMPLATE.partition("{% endif %}")[2])
    assert tokenise(without, prompts[1:], False) == tokenizer_ids[1:]
    with pytest.raises(PromptsError, match="p:1: the checkpoint's chat template has no place for tools"):
        tokenise(without, prompts, False)


BEGINNINGS = (b"", b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff", b"\x1f\x8b\x08", b"[", b'{"prompt":', b"prompt;x\n")


@settings(max_examples=400)
@given(
    beginning=st.sampled_from(BEGINNINGS),
    rest=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")),
    suffix=st.sampled_from(["", ".jsonl", ".json", ".csv", ".txt", ".parquet"]),
)
def test_whatever_the_file_holds_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, beginning: bytes, rest: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(beginning + rest)
    try:
        prompts = read_prompts(path)
    except PromptsError as error:
        complaint = str(error)
    else:
        assert prompts
        return
    assert "\n" not in complaint
