"""Dumps of other frameworks as runs: every number at its place, damage refused, everything downstream works on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from dumps import DUMPS, check_tokens, imported, matched, tokens_of, truth

from moediag.cli.main import main
from moediag.errors import DumpError

TEXT = {
    "nemo-rl": ("logp_infer", "logp_train_prompt", "advantage", "reward"),
    "prime-rl": ("logp_infer", "logp_train_prompt", "entropy_train", "advantage"),
}
"""Format -> what it holds of the truth."""


@pytest.mark.parametrize("name", TEXT)
def test_every_number_of_a_dump_is_at_its_place(tmp_path: Path, name: str) -> None:
    runs = imported(name, [DUMPS / name], tmp_path / "series")
    assert len(runs) == 2
    for step, run in enumerate(runs):
        found, true = tokens_of(run), truth(step)
        check_tokens(found, matched(found, true), TEXT[name])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("name", TEXT)
def test_a_damaged_dump_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    """A line cut, left out or written twice; a column of another width; nothing half-written is left."""
    folder = tmp_path / "dump"
    shutil.copytree(DUMPS / name, folder)
    path = sorted(folder.rglob("*.jsonl"))[0]
    whole = lines(path)
    text = path.read_text()

    def refused(message: str) -> None:
        with pytest.raises(DumpError, match=message) as caught:
            imported(name, [folder], tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)
        assert sorted(one.name for one in tmp_path.iterdir()) == ["dump"]

    path.write_text(text[: len(text) // 2])
    refused("no JSON")
    write_lines(path, [*whole[:1], *whole[2:]])
    refused("a line is missing or written twice")
    write_lines(path, [whole[0], *whole])
    refused("a line is missing or written twice")
    key = "prev_logprobs" if name == "nemo-rl" else "trainer_logprobs"
    values = whole[0][key][0] if name == "nemo-rl" else whole[0][key]
    short = values[:-1]
    write_lines(path, [{**whole[0], key: [short] if name == "nemo-rl" else short}, *whole[1:]])
    refused(f"{key} should hold {len(values)} numbers, one per token, found {len(values) - 1}")
    probabilities = [2.0 for _ in values]
    write_lines(path, [{**whole[0], key: [probabilities] if name == "nemo-rl" else probabilities}, *whole[1:]])
    refused("is 2, above 0; are these logits or probabilities")


def test_a_missing_rank_and_a_mixed_step_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "token_exports"
    shutil.copytree(DUMPS / "prime-rl" / "token_exports", folder)
    (folder / "step_0" / "rank_0.jsonl").rename(tmp_path / "kept")
    with pytest.raises(DumpError, match="lacks rank_0.jsonl"):
        imported("prime-rl", [folder], tmp_path / "out")
    shutil.copy(folder / "step_1" / "rank_0.jsonl", folder / "step_0" / "rank_0.jsonl")
    with pytest.raises(DumpError, match="step 1 in a folder of step 0"):
        imported("prime-rl", [folder], tmp_path / "out")


def test_an_import_appears_whole_or_not_and_the_same_again_changes_nothing(tmp_path: Path, capsys) -> None:
    folder, output = str(DUMPS / "nemo-rl"), str(tmp_path / "out")
    assert main(["import", "nemo-rl", folder, "-o", output]) == 0
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert main(["import", "nemo-rl", f"{folder}/*.jsonl", "-o", output]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == made
    capsys.readouterr()
    assert main(["import", "prime-rl", str(DUMPS / "prime-rl"), "-o", output]) == 1
    assert "holds another run or series; give -o a new folder, or --force" in capsys.readouterr().err
    assert main(["import", "prime-rl", str(DUMPS / "prime-rl"), "-o", output, "--force"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["series.json", "step-000000", "step-000001"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert main(["import", "nemo-rl", folder, "-o", str(tmp_path / "other"), "--force"]) == 1
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_what_a_path_is_can_be_told_before(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--detect", str(DUMPS / "nemo-rl"), str(DUMPS / "prime-rl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: len(paths) for name, paths in found.items() if name != "unknown"} == {"nemo-rl": 2, "prime-rl": 4}
    assert main(["import", "nemo-rl", str(DUMPS / "prime-rl/token_exports/step_0/rank_0.jsonl"), "-o", "x"]) == 1
    assert "it looks like prime-rl" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prime-rl"])
def test_everything_downstream_works_on_an_imported_run(tmp_path: Path, name: str) -> None:
    assert main(["import", name, str(DUMPS / name), "-o", str(tmp_path / "series")]) == 0
    first, second = sorted(map(str, (tmp_path / "series").glob("step-*")))
    for words in (
        ["validate", first], ["analyze", first], ["analyze", second], ["report", first], ["simulate", first],
        ["compare", first, second, "-o", str(tmp_path / "compare")],
        ["trend", str(tmp_path / "series"), "-o", str(tmp_path / "trend")],
    ):  # fmt: skip
        assert main(words) == 0, words
