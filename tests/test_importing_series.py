"""A series grows: further steps join it, steps that are there are left alone, an interrupted import goes on."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import MOEDIAG, run_moediag
from dumps import DUMPS, imported, tokens_of
from test_importing import lines, write_lines

from moediag.cli.main import main
from moediag.errors import DumpError, RunError
from moediag.importers.registry import files_of, importer_of
from moediag.importers.rollouts import Options
from moediag.importers.write import import_dump
from moediag.run.series import open_series

FILES = [DUMPS / "nemo-rl" / f"train_data_step{step}.jsonl" for step in (1, 2)]


def state(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_further_steps_join_a_series_and_those_that_are_there_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a second import into a series was refused, so that a training that goes on was imported anew each time."""
    series = str(tmp_path / "series")
    assert main(["import", "nemo-rl", str(FILES[0]), "-o", series, "--series"]) == 0
    before = state(tmp_path / "series" / "step-000001")
    assert main(["import", "nemo-rl", str(FILES[1]), "-o", series]) == 0
    assert main(["import", "nemo-rl", str(DUMPS / "nemo-rl"), "-o", series]) == 0
    assert state(tmp_path / "series" / "step-000001") == before
    at_once = imported("nemo-rl", FILES, tmp_path / "at once")
    for one, other in zip(open_series(series).runs(), at_once, strict=True):
        assert one.record == other.record
        pd.testing.assert_frame_equal(tokens_of(one), tokens_of(other), check_exact=True)
    assert main(["trend", series]) == 0
    assert main(["import", "prime-rl", str(DUMPS / "prime-rl"), "-o", series]) == 1
    assert "holds another run or series" in capsys.readouterr().err


def test_the_same_files_from_another_folder_and_a_table_that_grew_change_nothing(tmp_path: Path) -> None:
    """Folders that the files share are another with every further step; a table of all steps is another file."""
    exports = DUMPS / "prime-rl" / "token_exports"
    imported_alone(["prime-rl", exports / "step_0"], tmp_path / "series")
    before = state(tmp_path / "series" / "step-000000")
    imported_alone(["prime-rl", exports], tmp_path / "series")
    assert state(tmp_path / "series" / "step-000000") == before
    table = tmp_path / "table.parquet"
    assert main(["export", str(tmp_path / "series"), "-o", str(table)]) == 0
    whole = pd.read_parquet(table)
    whole[whole["step"] == 0].to_parquet(table)
    imported_alone(["table", table], tmp_path / "grows")
    before = state(tmp_path / "grows" / "step-000000")
    whole.to_parquet(table)
    imported_alone(["table", table], tmp_path / "grows")
    assert open_series(tmp_path / "grows").steps == [0, 1]
    assert state(tmp_path / "grows" / "step-000000") == before


def imported_alone(words: list[object], output: Path) -> None:
    assert main(["import", *map(str, words), "-o", str(output), "--series"]) == 0


def test_a_step_with_other_contents_is_refused_and_nothing_of_the_import_is_kept(tmp_path: Path) -> None:
    imported("nemo-rl", FILES, tmp_path / "series")
    records = lines(FILES[1])
    records[3]["prev_logprobs"][0][records[3]["input_lengths"][0] - 1] -= 0.5
    other, third = tmp_path / FILES[1].name, tmp_path / "train_data_step0.jsonl"
    write_lines(other, records)
    shutil.copy(FILES[0], third)
    before = state(tmp_path / "series")
    with pytest.raises(RunError, match="step-000002 was imported with other contents or options") as caught:
        imported("nemo-rl", [third, other], tmp_path / "series")
    assert "\n" not in str(caught.value)
    assert set(state(tmp_path / "series")) == set(before)
    other.write_text(other.read_text()[:-100])
    with pytest.raises(DumpError, match="no JSON"):
        imported("nemo-rl", [third, other], tmp_path / "series")
    assert set(state(tmp_path / "series")) == set(before)
    assert main(["import", "nemo-rl", str(FILES[1]), "-o", str(tmp_path / "series"), "--num-experts", "9"]) == 0


def test_a_run_is_no_series_and_a_dump_without_a_step_joins_none(tmp_path: Path) -> None:
    imported("nemo-rl", FILES[:1], tmp_path / "run")
    with pytest.raises(RunError, match="a run becomes no series; --series makes one of the first step"):
        imported("nemo-rl", FILES, tmp_path / "run")
    with pytest.raises(RunError, match="holds another run or series"):
        imported("nemo-rl", FILES[1:], tmp_path / "run")
    path = tmp_path / "dump.jsonl"
    shutil.copy(FILES[0], path)
    with pytest.raises(DumpError, match="does not say of which step it is, as a series needs"):
        import_dump(importer_of("nemo-rl"), files_of(importer_of("nemo-rl"), [path]), tmp_path / "s", Options(),
                    as_series=True)  # fmt: skip
    assert not (tmp_path / "s").exists()


def test_a_killed_import_goes_on_where_it_was(tmp_path: Path) -> None:
    """Whole steps stay, half a step is never seen, and the same command again makes the rest."""
    folder = tmp_path / "dump"
    folder.mkdir()
    for step in range(1, 9):
        write_lines(folder / f"train_data_step{step}.jsonl", [
            {**record, "idx": 12 * i + n} for i in range(40) for n, record in enumerate(lines(FILES[0]))
        ])  # fmt: skip
    series = tmp_path / "series"
    words = ["import", "nemo-rl", str(folder), "-o", str(series)]
    process = subprocess.Popen([str(MOEDIAG), *words], stdout=subprocess.DEVNULL)
    while not list(series.glob("step-*/run.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = open_series(series).steps
    assert 0 < len(there) < 8
    for run in open_series(series).runs():
        assert len(tokens_of(run)) == 40 * 267
    before = {step: state(series / f"step-{step:06d}") for step in there}
    done = run_moediag(*words)
    assert done.returncode == 0, done.stderr
    assert open_series(series).steps == list(range(1, 9))
    assert {step: state(series / f"step-{step:06d}") for step in there} == before
    assert sorted(path.name for path in series.iterdir()) == ["series.json", *(f"step-{n:06d}" for n in range(1, 9))]


@pytest.mark.parametrize(
    ("name", "file", "size"),
    [
        ("slime", "train_data/1.pt", 3000),
        ("slime", "train_data/1.pt", 0),
        ("miles", "train_data/0_2.pt", 2000),
        ("nemo-rl", "train_data_step2.jsonl", 50),
        ("nemo-rl", "train_data_step2.jsonl", 0),
        ("prime-rl", "token_exports/step_1/rank_1.jsonl", 50),
        ("skyrl", "dumped_data/global_step_2_training_input.pkl", 0),
        ("vllm", "generate_step1.jsonl", 50),
    ],
)
def test_a_file_that_was_cut_is_not_passed_over(tmp_path: Path, name: str, file: str, size: int) -> None:
    """Bug: in a folder, a file cut in its first record was of no format, so that its step or its side was missing."""
    shutil.copytree(DUMPS / name, tmp_path / name)
    for other in (tmp_path / name).glob("completions*"):
        other.unlink()
    path = tmp_path / name / file
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DumpError, match="empty, or cut|cut short") as caught:
        imported(name, [tmp_path / name], tmp_path / "out", trust_pickle=True)
    assert path.name in str(caught.value)
    assert not (tmp_path / "out").exists()
