"""Rollouts that were kept as text: a tokenizer gives the ids, both engines the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import run_here, write_jsonl
from dumps import DUMPS, imported, tokens_of, truth

from moediag.cli.main import main
from moediag.demo.tokenizer import byte_tokenizer
from moediag.errors import DumpError
from moediag.importers.registry import detect
from moediag.importers.text import TextTokenizer
from moediag.results.analyze import analyze_run
from moediag.results.report import report_run
from moediag.run.reader import open_run

VERL = DUMPS / "verl" / "rollout_data_dir"
TRL = DUMPS / "trl" / "completions"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token per byte: of text in Latin-1 the ids are known."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(4096).save_pretrained(folder)
    return folder


def ids_of(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize(("name", "path"), [("trl", TRL), ("verl", VERL)])
def test_text_becomes_tokens_with_its_rewards_and_advantages(
    tmp_path: Path, tokenizer: Path, name: str, path: Path
) -> None:
    """Against the truth's ids: text has neither the special token 256 nor, of a byte above 127, one byte alone."""
    runs = imported(name, [path], tmp_path / "series", tokenizer=tokenizer)
    assert [run.record.step for run in runs] == [1, 2]
    for step, run in enumerate(runs):
        assert run.arms() == []
        found, true = tokens_of(run), truth(step)
        assert len(found["seq_id"].unique()) == 12 - n_empty(true)
        parts = iter([part for _, part in found.groupby("seq_id")])
        for _, whole in true.groupby("seq_id"):
            texts = [
                "".join(map(chr, ids[ids < 256])) for is_response in (False, True)
                if len(ids := whole.loc[whole["is_response"] == is_response, "token_id"].to_numpy()) >= 0
            ]  # fmt: skip
            if not all(texts):
                continue
            part = next(parts)
            for is_response, text in zip((False, True), texts, strict=True):
                assert part.loc[part["is_response"] == is_response, "token_id"].tolist() == ids_of(text)
            assert part["is_trained"].tolist() == part["is_response"].tolist()
            assert part["reward"].unique().tolist() == whole["reward"].unique().tolist()
            if name == "trl":
                advantage = whole.loc[whole["is_response"], "advantage"].iloc[0]
                np.testing.assert_allclose(part.loc[part["is_response"], "advantage"], advantage, rtol=1e-6)
        (note, *_) = run.notes
        assert "they may differ from the ids that were sampled" in note
        assert run.record.tokenizer == TextTokenizer(tokenizer).record


def n_empty(true: pd.DataFrame) -> int:
    """Sequences whose prompt or response has no text."""
    texts = true[true["token_id"] < 256].groupby(["seq_id", "is_response"]).size().unstack()
    return int(texts.isna().any(axis=1).sum())


def test_prompts_of_messages_take_the_chat_template_and_others_the_special_tokens(
    tmp_path: Path, tokenizer: Path
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    begun = [*messages, {"role": "assistant", "content": "Because "}]
    answer = [{"role": "assistant", "content": "so."}]
    frame = pd.DataFrame({
        "step": 3, "prompt": [messages, messages, begun], "completion": [answer, answer, answer],
        "correct": [1.0, 0.0, 0.5], "short": [0.0, 1.0, 0.5], "advantage": [1.0, -1.0, 0.0],
    })  # fmt: skip
    path = tmp_path / "completions_00003.parquet"
    frame.to_parquet(path)
    (run,) = imported("trl", [path], tmp_path / "run", tokenizer=tokenizer)
    found = tokens_of(run)
    prompts = ["".join(map(chr, part.loc[~part["is_response"], "token_id"])) for _, part in found.groupby("seq_id")]
    assert prompts == ["Be brief.\n\nWhy?\n"] * 2 + ["Be brief.\n\nWhy?\n\nBecause "]
    assert found.groupby("seq_id")["prompt_id"].first().tolist() == [0, 0, 1]
    assert "reward" not in found
    assert any("rewards are correct, short, whose weights TRL does not log" in note for note in run.notes)
    several = frame.assign(completion=[[*answer, {"role": "tool", "content": "3"}]] * 3)
    several.to_parquet(path)
    with pytest.raises(DumpError, match="row 0: the response should be text, or one message with text"):
        imported("trl", [path], tmp_path / "other", tokenizer=tokenizer)


def test_a_text_with_a_beginning_of_text_gets_one_and_a_response_none(tmp_path: Path) -> None:
    """Bug to be feared: two of them, or one in the middle of a sequence."""
    from tokenizers.processors import TemplateProcessing

    made = byte_tokenizer(4096)
    made.add_special_tokens({"bos_token": "<s>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    made.save_pretrained(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    assert [ids.tolist() for ids in tokenizer.prompts(["ab", "<s>ab"], ["", ""])] == [[257, 97, 98]] * 2
    assert [ids.tolist() for ids in tokenizer.responses(["ab"], [""])] == [[97, 98]]


def test_text_of_any_framework_is_read_by_its_columns(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AReaL's folders of a version, a file per task, with versions and lengths beside the text."""
    for version, task in [(0, 5), (0, 6), (1, 5)]:
        (tmp_path / "areal" / str(version)).mkdir(parents=True, exist_ok=True)
        records: list[dict[str, Any]] = [
            {"task_id": task, "sample_idx": i, "seqlen": 7 + i, "prompt_len": 4, "head_version": version,
             "tail_version": version + i, "reward": float(i), "prompt": f"t{task}: ", "completion": "yes"}
            for i in range(2)
        ]  # fmt: skip
        write_jsonl(tmp_path / "areal" / str(version) / f"{task}.jsonl", records)
    assert detect(tmp_path / "areal" / "0" / "5.jsonl") == ["text"]
    words = ["import", "text", str(tmp_path / "areal"), "-o", str(tmp_path / "series")]
    assert main([*words, "--tokenizer", str(tokenizer / "tokenizer.json"), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert [(run["step"], run["n_sequences"]) for run in about["runs"]] == [(0, 4), (1, 2)]
    assert "2 of 4 sequences have another number of tokens than seqlen says" in about["runs"][0]["notes"]
    found = tokens_of(open_run(tmp_path / "series" / "step-000000"))
    versions = found[found["is_response"]].groupby("seq_id")["weight_version"].first()
    assert [None if pd.isna(version) else version for version in versions] == ["0", None, "0", None]
    assert found.groupby("seq_id")["reward"].first().tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"prompt": 3, "completion": "a"}], "line 1: the prompt should be text or a list of messages, found 3"),
        ([{"prompt": "a", "completion": None}], "line 1: the response should be text"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "line 2 lacks prompt and completion"),
        ([{"prompt": "a", "completion": "b", "reward": "x"}], "line 1: reward should be a number"),
        ([{"prompt": "a", "completion": "b", "step": 4}], "line 1: step 4 in a file of step 2"),
        ([{"prompt": "a", "completion": ""}], "holds no sequence"),
    ],
)
def test_damaged_text_is_refused_by_line(
    tmp_path: Path, tokenizer: Path, records: list[dict[str, Any]], message: str
) -> None:
    path = write_jsonl(tmp_path / "step_2.jsonl", records)
    with pytest.raises(DumpError, match=message) as caught:
        imported("text", [path], tmp_path / "out", tokenizer=tokenizer)
    assert "\n" not in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["step_2.jsonl"]


def test_what_is_no_tokenizer_and_text_without_one_are_one_line(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: text of no framework's name was called a table that lacks its columns by validate, simulate and trend."""
    plain = write_jsonl(tmp_path_factory.mktemp("text") / "rollouts.jsonl", [{"prompt": "a", "completion": "b"}])
    hint = "moediag import text PATH --tokenizer CKPT -o RUN"
    for words, message in (
        *(([command, str(plain)], hint) for command in ("validate", "simulate", "trend")),
        (["import", "verl", str(VERL), "-o", str(tmp_path / "out")],
         "moediag import verl PATH --tokenizer CKPT -o RUN"),
        (["import", "trl", str(TRL), "-o", str(tmp_path / "out"), "--tokenizer", str(tmp_path)],
         "is no folder with a tokenizer"),
        (["validate", str(TRL)], "moediag import trl PATH --tokenizer CKPT -o RUN"),
        (["trend", str(VERL)], "moediag import verl PATH --tokenizer CKPT -o RUN"),
    ):  # fmt: skip
        assert main(words) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (tmp_path / "tokenizer.json").write_text("{}")
    assert main(["import", "trl", str(TRL), "-o", str(tmp_path / "out"), "--tokenizer", str(tmp_path)]) == 1
    assert "does not load" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.engines
def test_both_engines_score_text_and_the_page_says_what_the_ids_are(tmp_path: Path, random_moe: Path) -> None:
    run = imported("trl", [TRL / "completions_00001.parquet"], tmp_path / "run", tokenizer=random_moe)[0]
    for arm in ("infer", "train"):
        done = run_here("capture", arm, random_moe, "-o", run.path)
        assert done.returncode == 0, done.stderr
    summary = analyze_run(run)
    assert summary["main_pair"] == "infer~train"
    n_tokens = int(tokens_of(run)["is_response"].sum())
    assert summary["pairs"]["infer~train"]["n_tokens"] == n_tokens > 100
    assert summary["pairs"]["infer~train"]["logp"]["abs_logp_diff"]["mean"] < 0.3
    assert summary["pairs"]["infer~train"]["routing"]["flip_rate"] < 0.5
    page = report_run(run).read_text()
    assert "they may differ from the ids that were sampled" in page
    assert "forced text" in page
    assert run_here("simulate", run.path, "--method", "icepop").returncode == 0
    other = tmp_path / "other"
    byte_tokenizer(128).save_pretrained(other)
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(text))
    swapped = imported("trl", [TRL / "completions_00001.parquet"], tmp_path / "swapped", tokenizer=other)[0]
    done = run_here("capture", "train", random_moe, "-o", swapped.path)
    assert done.returncode == 1
    assert "maps tokens to other ids than the run's" in done.stderr
