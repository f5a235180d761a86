"""An analysis in parts: what has not changed is not made again, and who makes a part changes no byte of it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_results import make_run

from moediag.cli.main import main
from moediag.errors import RunError
from moediag.results import analyze_run
from moediag.results.parts import Content, Kept, Part, make_parts
from moediag.run import pieces
from moediag.run.capture import Capture
from moediag.run.derived import derived_damage
from moediag.run.files import read_sealed
from moediag.run.reader import Run, open_run
from moediag.run.writer import RunWriter

ARMS = ("infer", "train", "train-replay")


def analysis_of(run: Path) -> dict[str, bytes]:
    """Every file that an analysis wrote."""
    files = [*(run / "analysis").rglob("*"), run / "summary.json"]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files if path.is_file()}


def parts_made(run: Path, **options: Any) -> tuple[int, int] | None:
    """(parts made, parts in all) of an analysis; None where nothing was to be done."""
    events: list[dict[str, Any]] = []
    analyze_run(open_run(run), on_event=events.append, **options)
    begun = {event["unit"]: event for event in reversed(events)}.values()
    n_all, n_kept = (sum(event[key] for event in begun) for key in ("total", "done"))
    return (n_all - n_kept, n_all) if events else None


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three arms, analysed; tests copy it."""
    path = tmp_path_factory.mktemp("parts") / "run"
    analyze_run(make_run(path, ARMS))
    return path


@pytest.fixture
def run(analysed: Path, tmp_path: Path) -> Path:
    """A copy of the analysed run."""
    return Path(shutil.copytree(analysed, tmp_path / "run"))


def test_an_unchanged_run_is_not_analysed_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every call of ``analyze`` computed everything: 26 s for 20,000 tokens in which nothing had changed."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert parts_made(run) is None
    assert main(["analyze", str(run)]) == 0
    assert "Unchanged since the last analysis" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_an_added_arm_costs_its_own_pairs(run: Path, tmp_path: Path) -> None:
    whole, arm = analysis_of(run), run / "arms" / "train-replay"
    shutil.move(arm, tmp_path / "kept")
    n_made, n_without = parts_made(run) or (-1, 0)
    assert n_made == 0  # the pairs of the arms left are the same
    shutil.move(tmp_path / "kept", arm)
    n_made, n_with = parts_made(run) or (-1, 0)
    assert n_made == n_with - n_without > 0
    assert analysis_of(run) == whole


@pytest.mark.parametrize("least_rows", [1, pieces.LEAST_ROWS])
def test_workers_change_no_byte(run: Path, least_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many shards are read together."""
    monkeypatch.setattr(pieces, "LEAST_ROWS", least_rows)
    made = []
    for workers in (1, 2):
        shutil.rmtree(run / "analysis")
        assert parts_made(run, workers=workers) is not None
        made.append(analysis_of(run))
    assert made[0] == made[1]
    assert not list(run.glob(".*"))


def test_a_run_of_many_pieces_gives_what_one_piece_gives(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are then read part by part, and rules see some shards at a time: the same to float64 rounding."""
    frames = {path: pd.read_parquet(path) for path in (run / "analysis").rglob("*.parquet")}
    summary = read_sealed(run / "summary.json")["pairs"]
    shutil.rmtree(run / "analysis")
    monkeypatch.setattr(pieces, "LEAST_ROWS", 1)
    monkeypatch.setattr(pieces, "MOST_GROUPS", 1000)
    assert len(pieces.groups_of(open_run(run))) == len(open_run(run).shards) > 1
    analyze_run(open_run(run))
    for path, frame in frames.items():
        pd.testing.assert_frame_equal(pd.read_parquet(path), frame, rtol=1e-12, atol=1e-15, obj=path.name)
    _assert_near(read_sealed(run / "summary.json")["pairs"], summary)


def _assert_near(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            _assert_near(found[key], value)
    else:
        assert found == (pytest.approx(expected, rel=1e-12) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("name", ["kept.json", "infer~train/tokens.parquet", "infer~train/ladder.parquet"])
def test_what_was_damaged_since_is_made_again(run: Path, name: str) -> None:
    """A damaged frame must not be kept: ``validate`` and ``report`` tell their reader to run ``analyze`` again."""
    whole, path = analysis_of(run), run / "analysis" / name
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    assert derived_damage(run)
    analyze_run(open_run(run))
    assert analysis_of(run) == whole
    path.unlink()
    analyze_run(open_run(run))
    assert analysis_of(run) == whole


def test_another_setting_is_another_analysis(run: Path) -> None:
    n_made, n_all = parts_made(run, no_text=True) or (0, 0)
    assert n_made == n_all > 0
    assert parts_made(run, no_text=True) is None
    assert parts_made(run) == (n_all, n_all)


def capture_again(run: Path, change: Callable[[Capture], None]) -> None:
    """The first shard of arm train once more, changed."""
    opened = open_run(run)
    shard = opened.shards[0]
    capture = opened.capture("train", shard)
    for path in (run / "arms" / "train").glob(f"{shard.stem}.*"):
        path.unlink()
    change(capture)
    dtypes = {"gate_weights_TLK": "float32"}
    RunWriter(opened).write_capture("train", shard, opened.tokens(shard), capture, {}, dtypes)


def test_a_shard_captured_again_is_a_change(run: Path) -> None:
    """The pairs of its arm are made again, the others are not."""
    kept = run / "analysis" / "infer~train-replay" / "tokens.parquet"
    before = kept.stat().st_ino

    def change(capture: Capture) -> None:
        capture.logp_T[-1] -= 0.5

    capture_again(run, change)
    n_made, n_all = parts_made(run) or (0, 0)
    assert 0 < n_made < n_all
    assert kept.stat().st_ino == before


def test_errors_that_were_overridden_once_are_errors_still(run: Path) -> None:
    def change(capture: Capture) -> None:
        assert capture.expert_ids_TLK is not None
        capture.expert_ids_TLK[:, :, 1:] = capture.expert_ids_TLK[:, :, :1]

    capture_again(run, change)
    with pytest.raises(RunError, match="validation errors"):
        analyze_run(open_run(run))
    assert analyze_run(open_run(run), force=True)["provenance"]["validation_errors"] > 0
    assert parts_made(run, force=True) is None
    with pytest.raises(RunError, match="validation errors"):
        analyze_run(open_run(run))


def test_the_number_of_workers_is_checked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDIAG_WORKERS", "many")
    assert main(["analyze", str(run)]) == 2


def end_this_process(run: Run, pieces: Iterator[Any]) -> Content:
    """What the kernel does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}, {}


def test_a_process_that_is_killed_is_one_line(run: Path, tmp_path: Path) -> None:
    parts = [Part(name, "infer~train", (), end_this_process) for name in ("a", "b")]
    with pytest.raises(RunError, match="a process was killed.*--workers 1"):
        list(make_parts(Kept(open_run(run), False), parts, tmp_path / "new", False, 2, lambda event: None))
