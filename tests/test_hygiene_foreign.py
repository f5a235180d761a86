"""``moediag validate`` on runs and on dumps of other tools: findings on stdout, exit codes, one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hygiene_captures import FAULTS, Healthy, make, plant, write_run

from moediag.cli.main import main
from moediag.errors import DumpError
from moediag.hygiene.foreign import check_dump, read_dump
from moediag.hygiene.rules import RULES
from moediag.run.capture import Capture, TokenRows

SHAPE = (16, 4, 6)


def records_of(tokens: TokenRows, train: Capture, infer: Capture, first_row: int = 0) -> list[dict[str, Any]]:
    """The pair as vLLM's own names have it; the last token has no row."""
    records = []
    for start, end in tokens.sequence_bounds():
        response = tokens.is_response_T[start:end]
        ids = tokens.token_id_T[start:end]
        record: dict[str, Any] = {
            "prompt_id": int(tokens.prompt_id_T[start]),
            "prompt_token_ids": ids[~response].tolist(),
            "token_ids": ids[response].tolist(),
        }
        for prefix, capture in (("", infer), ("train_", train)):
            record[f"{prefix}logprobs"] = capture.logp_T[start:end][response].astype(float).tolist()
            record[f"{prefix}routed_experts"] = capture.expert_ids_TLK[start + first_row : end - 1].tolist()  # type: ignore[index]
        records.append(record)
    return records


def write_dump(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pd.DataFrame(records).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("first_row", [0, 1])
def test_a_dump_comes_back_as_the_arrays_it_was_made_of(tmp_path: Path, suffix: str, first_row: int) -> None:
    tokens, train, infer = make(Healthy(shape=SHAPE, n_prompts=4, samples=2, prompt_length=6))
    path = write_dump(tmp_path / f"dump{suffix}", records_of(tokens, train, infer, first_row))
    dump = read_dump(path, 16, first_row)
    for name, array in vars(tokens).items():
        np.testing.assert_array_equal(getattr(dump.tokens, name), array)
    np.testing.assert_array_equal(dump.captures["infer"].logp_T, infer.logp_T)
    has_row = np.array([t - s >= first_row for s, e in tokens.sequence_bounds() for t in range(s, e)])
    wanted = np.where(has_row[:, None, None], infer.expert_ids_TLK, -1)  # type: ignore[arg-type]
    np.testing.assert_array_equal(dump.captures["infer"].expert_ids_TLK, wanted)  # type: ignore[arg-type]


def test_a_healthy_dump_is_quiet(tmp_path: Path) -> None:
    path = write_dump(tmp_path / "dump.jsonl", records_of(*make(Healthy(shape=SHAPE, certain_share=0))))
    inspection = check_dump(path, 16)
    assert [(f.level, f.rule) for f in inspection.findings] == [("note", "D06-last-row")]
    assert main(["validate", str(path)]) == 0


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if not f.startswith(("D34", "softmaxed", "D08", "D03-partial", "D31-zero-logp"))]
)
def test_a_fault_in_a_dump_is_named(fault: str, tmp_path: Path) -> None:
    """D31's entropy and D34 of one small layer need what a dump does not hold."""
    h = Healthy(shape=SHAPE, certain_share=0, has_scores=False, n_prompts=24)
    path = write_dump(tmp_path / "dump.jsonl", records_of(*plant(fault, h, *make(h))))
    rule = RULES[fault.split()[0]]
    errors = {f.rule for f in check_dump(path, 16).findings if f.level == "error"}
    assert rule.name in errors
    assert errors <= {rule.name, *rule.companions}
    assert main(["validate", str(path), "--num-experts", "16"]) == 3


def test_other_tokens_on_the_train_side_are_shown_with_their_neighbours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = records_of(*make(Healthy(shape=SHAPE, n_prompts=3)))
    for record in records:
        record["train_token_ids"] = list(record["token_ids"])
    records[1]["train_token_ids"][2] = 999
    assert main(["validate", str(write_dump(tmp_path / "dump.jsonl", records)), "--json"]) == 3
    content = json.loads(capsys.readouterr().out)
    (found,) = [f for f in content["findings"] if f["level"] == "error"]
    assert found["rule"] == "D32-token-ids"
    at = len(records[1]["prompt_token_ids"]) + 2
    assert (found["n"], found["n_of"], found["places"][0]["seq_id"], found["places"][0]["position"]) == (1, 3, 1, at)
    assert "999" in found["message"]
    assert content["n_errors"] == 1


def test_ids_alone_or_logprobs_alone_are_enough(tmp_path: Path) -> None:
    records = records_of(*make(Healthy(shape=SHAPE)))
    for names in (("routed_experts",), ("logprobs",), ("train_logprobs",), ("train_routed_experts", "logprobs")):
        kept = [{k: v for k, v in r.items() if k in ("prompt_token_ids", "token_ids", *names)} for r in records]
        inspection = check_dump(write_dump(tmp_path / "dump.jsonl", kept), 16)
        assert inspection.n_errors == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no sequence"),
        ("{", "line 1: no JSON"),
        ("[1]\n", "wanted a JSON object"),
        ('{"prompt_token_ids": [1]}', "sequence 0: token_ids should be"),
        ('{"prompt_token_ids": [1], "token_ids": ["a"]}', "token_ids should be a list of token ids"),
        ('{"prompt_token_ids": [1], "token_ids": [true]}', "token_ids should be a list of token ids"),
        ('{"prompt_token_ids": [1], "token_ids": [99999999999999999999]}', "no regular list of numbers"),
        ('{"prompt_token_ids": [1], "token_ids": [2]}', "neither logprobs nor routed_experts"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "logprobs": [0, 0]}', "one number per response token (1)"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "logprobs": ["x"]}', "no regular list of numbers"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "routed_experts": [1]}', "[rows][layers][K]"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "routed_experts": [[[1], [1, 2]]]}', "no regular list"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "routed_experts": [[[1]], [[1]], [[1]]]}', "3 rows from row 0"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "routed_experts": [[[70000]]]}', "no expert id"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "logprobs": [0], "prompt_id": [1]}', "prompt_id should be"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "logprobs": [0], "train_token_ids": "x"}', "no regular list"),
    ],
)
def test_bad_dumps_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    path = tmp_path / "dump.jsonl"
    path.write_text(text)
    assert main(["validate", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_other_files_are_one_line(tmp_path: Path) -> None:
    for name, data in (("dump.parquet", b"no parquet"), ("dump.jsonl", b"\xff\xfe"), ("run.json", b'{"a": 1}')):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DumpError):
            check_dump(tmp_path / name)


def test_validate_prints_errors_first_with_places_cause_and_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h = Healthy(shape=SHAPE, certain_share=0.2, n_prompts=6)
    run = write_run(tmp_path / "run", h, *plant("D03-all-zero", h, *make(h)))
    assert main(["validate", str(run.path)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("error: D03-all-zero: infer: ")
    assert lines[1].startswith("    first: sequence 0 position ")
    assert "zero-filled buffer" in lines[2]
    levels = [line.split(":")[0] for line in lines if not line.startswith(" ")]
    assert levels[:-1] == sorted(levels[:-1], key=["error", "warning", "note"].index)
    assert lines[-1].startswith(f"{run.path}: 1 errors, 0 warnings, ")
    n_rows = 2 * sum(len(run.tokens(shard)) for shard in run.shards)
    assert f" of {len(RULES)} rules applied to {n_rows:,} token rows; left out: " in lines[-1]


def test_the_table_of_rules_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--list-rules"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}  [" in out for name in RULES)
    assert main(["validate", "--list-rules", "--json"]) == 0
    assert [rule["name"] for rule in json.loads(capsys.readouterr().out)] == list(RULES)


def test_validate_without_anything_to_check_is_a_usage_error() -> None:
    assert main(["validate"]) == 2
