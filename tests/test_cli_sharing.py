"""`moediag capture --shard-index I --num-shards N`: what is refused, and what a worker says of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripted_engine import CONFIGURATION, create_scripted_run, fill_scripted_run, make_scripted_run

from moediag.cli import jobs
from moediag.cli.main import main
from moediag.engines.arms import arm_request
from moediag.engines.checkpoint import Checkpoint, open_checkpoint
from moediag.errors import IncompleteRunError, RunConflictError
from moediag.run.capture import WHOLE, Slice
from moediag.run.files import read_sealed, write_sealed
from moediag.run.reader import Run, open_run
from moediag.run.writer import RunWriter

CHECKPOINT = Path(__file__).parent / "fixtures" / "ring-tiny"


@pytest.fixture
def checkpoint() -> Checkpoint:
    return open_checkpoint(str(CHECKPOINT))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--shard-index", "0"), "--shard-index is given without --num-shards"),
        (("--num-shards", "2"), "--num-shards is given without --shard-index"),
        (("--shard-index", "2", "--num-shards", "2"), "expected an index from 0 to 1 (0-based)"),
        (("--shard-index", "-1", "--num-shards", "2"), "--shard-index -1 with --num-shards 2"),
        (("--shard-index", "0", "--num-shards", "0"), "--num-shards 0"),
    ],
)
def test_a_worker_that_cannot_be_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: tuple[str, ...], complaint: str
) -> None:
    run = tmp_path / "run"
    assert main(["capture", "infer", str(CHECKPOINT), "-o", str(run), *options]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert complaint in err
    assert not run.exists()


def half_filled(tmp_path: Path) -> Run:
    """Three of six shards, by worker 0 of 2."""
    fill_scripted_run(tmp_path / "run", {"n_prompts": 6, "shard_size": 1}, Slice(0, 2), ("infer",))
    return of_checkpoint(open_run(tmp_path / "run"))


def of_checkpoint(run: Run) -> Run:
    """The run as if its arms had loaded the checkpoint that the commands here are given."""
    record = open_checkpoint(str(CHECKPOINT)).record
    for path in run.path.glob("arms/*/arm.json"):
        write_sealed(path, {**read_sealed(path), "checkpoint": record.digest})
    return run


def asked(run: Run, checkpoint: Checkpoint, *recipes: str, worker: Slice = WHOLE, **options: Any) -> jobs.Arms:
    requests = [arm_request(recipe, {**CONFIGURATION, **options}, given=False) for recipe in recipes]
    return jobs.Arms(RunWriter(run, worker), requests, dict.fromkeys(("infer", "train"), checkpoint))


def test_a_worker_whose_slice_is_complete_says_what_remains(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Checkpoint
) -> None:
    run = half_filled(tmp_path)
    with RunWriter(run).claim("infer", run.shards[1]):
        jobs.capture(asked(run, checkpoint, "infer", worker=Slice(0, 2)), is_shared=True)
    err = capsys.readouterr().err
    assert "slice 0/2 is complete, nothing to capture" in err
    assert "3 of 6 shards of arm infer remain (1 being captured by others now)" in err


def test_a_command_that_needs_the_whole_arm_does_not_go_on_without_it(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """`profile` beside another worker: the train arm is not begun while shards of infer are still on the way."""
    run = half_filled(tmp_path)
    with pytest.raises(
        IncompleteRunError, match="3 of 6 shards of arm infer remain .* when the other workers are done"
    ):
        jobs.capture(asked(run, checkpoint, "infer", "train", worker=Slice(0, 2)))
    assert run.arms() == ["infer"]


def test_a_slice_without_shards_leaves_no_arm_behind(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """More workers than shards: the idle one must not write an arm.json that no engine stands behind."""
    run = create_scripted_run(tmp_path / "run", n_prompts=2, shard_size=1)
    jobs.capture(asked(run, checkpoint, "infer", worker=Slice(5, 8)), is_shared=True)
    assert run.arms() == []


def test_complete_shards_without_an_arm_record_say_what_to_do(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """They used to count as complete for `capture` and as absent for `analyze`, each sending to the other."""
    run = make_scripted_run(tmp_path / "run")
    (run.path / "arms/infer/arm.json").unlink()
    with pytest.raises(IncompleteRunError, match=r"every shard but no arm\.json"):
        jobs.capture(asked(run, checkpoint, "infer"))


def test_another_configuration_of_a_complete_arm_is_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    run = of_checkpoint(make_scripted_run(tmp_path / "run"))
    with pytest.raises(RunConflictError, match="dtype: 'bfloat16' there, 'float32' given"):
        jobs.capture(asked(run, checkpoint, "infer", dtype="float32"))


def test_another_checkpoint_of_a_complete_arm_is_refused_by_name(tmp_path: Path, checkpoint: Checkpoint) -> None:
    run = make_scripted_run(tmp_path / "run")
    with pytest.raises(RunConflictError, match="checkpoint: models/scripted .* there, .*ring-tiny .* given"):
        jobs.capture(asked(run, checkpoint, "infer"))


def test_an_arm_joins_no_run_that_does_not_say_how_it_was_sampled(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A sealed run.json without a seed used to end `capture` in a KeyError."""
    run = make_scripted_run(tmp_path / "run")
    manifest = read_sealed(run.path / "run.json")
    del manifest["sampling"]["seed"]
    write_sealed(run.path / "run.json", manifest)
    assert main(["capture", "train", str(CHECKPOINT), "-o", str(run.path)]) == 1
    assert "does not say sampling ['seed']" in capsys.readouterr().err
