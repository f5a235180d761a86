"""Prompts files: what is accepted, and the line number in every complaint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moediag.errors import PromptsError
from moediag.prompts import read_prompts


def written(tmp_path: Path, text: str, name: str = "p.jsonl") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_plain_text_is_one_prompt_a_line(tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path, "one\n\n two \r\n", "p.txt"))
    assert [(p.line, p.text) for p in prompts] == [(1, "one"), (3, " two ")]


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
        ("[1]\n", "p.jsonl:1: expected a JSON object, found list"),
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


@settings(max_examples=300)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")))
def test_whatever_the_file_holds_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "p.jsonl"
    path.write_bytes(content)
    try:
        prompts = read_prompts(path)
    except PromptsError as error:
        complaint = str(error)
    else:
        assert prompts
        return
    assert "\n" not in complaint
