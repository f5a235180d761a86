"""A run or arm in which nothing was captured yet takes another configuration; one that holds a shard refuses it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_jsonl
from records import arm_of, checkpoint_of, made_otherwise, run_record
from scripted_engine import write_scripted_shard
from test_run_directory import contents

from moediag.cli.main import main
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.errors import RunConflictError
from moediag.run.capture import encode_prompts
from moediag.run.create import create_run
from moediag.run.reader import Run, open_run
from moediag.run.records import Sampling
from moediag.run.writer import RunWriter

CHECKPOINT = Path(__file__).parent / "fixtures" / "ring-tiny"
PROMPTS = encode_prompts([[1, 2, 3], [4]], None)


def begun(path: Path, name: str = "models/a", max_tokens: int = 5) -> Run:
    """A run of a checkpoint and an option, as a command begins it."""
    checkpoint = checkpoint_of((1,), source=name, weights_sha256=f"{name} weights")
    configuration = {
        "weights_sha256": checkpoint.weights_sha256,
        "config_sha256": checkpoint.config_sha256,
        "max_tokens": max_tokens,
    }
    record = run_record(
        PROMPTS, 2, 1, checkpoint, configuration=configuration, sampling=Sampling(max_tokens=max_tokens, seed=0)
    )
    return create_run(path, record, PROMPTS, checkpoint)


def test_a_run_that_holds_nothing_takes_another_configuration(tmp_path: Path) -> None:
    """A typing error in the first command used to ask for --force, with nothing there that it could have saved."""
    run = begun(tmp_path / "run")
    RunWriter(run).begin_arm(arm_of(run, "infer"))
    new = begun(tmp_path / "run", "models/b", max_tokens=6)
    assert new.record.configuration["max_tokens"] == 6
    assert new.arms() == []
    assert new.checkpoint(str(new.record.checkpoint)).source == "models/b"
    assert {path.name for path in (new.path / "checkpoints").iterdir()} == {f"{new.record.checkpoint}.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert contents(begun(tmp_path / "run", "models/b", max_tokens=6).path) == contents(new.path)


def test_a_run_that_holds_one_shard_refuses_and_names_models_and_options(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    RunWriter(run).begin_arm(arm_of(run, "infer"))
    write_scripted_shard(RunWriter(run), "infer", run.shards[0])
    before = contents(run.path)
    with pytest.raises(RunConflictError) as error:
        begun(tmp_path / "run", "models/b", max_tokens=6)
    line = str(error.value)
    assert (
        "checkpoint: models/a (weights models/a, config c) there, models/b (weights models/b, config c) given" in line
    )
    assert "max_tokens: 5 there, 6 given" in line
    assert "use another -o or --force" in line
    assert "weights_sha256" not in line
    assert "\n" not in line
    assert contents(run.path) == before


def test_data_of_an_arm_without_its_sidecar_is_no_reason_to_lose_it(tmp_path: Path) -> None:
    """A kill between the two leaves data of minutes: the same command goes on, another one is refused."""
    run = begun(tmp_path / "run")
    RunWriter(run).begin_arm(arm_of(run, "infer"))
    write_scripted_shard(RunWriter(run), "infer", run.shards[0])
    (run.path / "arms/infer/shard-00000.json").unlink()
    with pytest.raises(RunConflictError, match="max_tokens"):
        begun(tmp_path / "run", max_tokens=6)
    assert open_run(run.path).record == run.record


def test_a_run_that_holds_nothing_is_not_taken_from_who_is_about_to_fill_it(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    with RunWriter(run).in_use():
        with pytest.raises(RunConflictError, match="max_tokens: 5 there, 6 given"):
            begun(tmp_path / "run", max_tokens=6)
        assert open_run(run.path).record == run.record
    assert begun(tmp_path / "run", max_tokens=6).record.configuration["max_tokens"] == 6


def test_prompts_of_a_planned_run_are_those_of_the_last_command(tmp_path: Path) -> None:
    """Planned by the real plan, of given completions too, whose token table is there before any arm."""
    checkpoint = open_checkpoint(str(CHECKPOINT))
    asked = [
        [{"prompt_token_ids": [1, 2]}],
        [{"prompt_token_ids": [1, 2], "completion_token_ids": [3, 4]}],
        [{"prompt_token_ids": [5]}, {"prompt_token_ids": [6, 7]}],
    ]
    for i, records in enumerate(asked):
        path = write_jsonl(tmp_path / f"{i}.jsonl", records)
        run = make_plan(checkpoint, path, SamplingOptions(max_tokens=4)).create(tmp_path / "run", force=False)
        prompts, completions = run.prompt_tokens()
        assert prompts == [record["prompt_token_ids"] for record in records]
        assert completions == ([[3, 4]] if "completion_token_ids" in records[0] else None)
        assert run.has_tokens(run.shards[0]) == (completions is not None)


def test_an_arm_that_holds_nothing_is_begun_anew_and_one_with_a_shard_is_not(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    writer = RunWriter(run)
    first, second, third = (made_otherwise(arm_of(run, "infer"), configuration={"dtype": d}) for d in ("a", "b", "c"))
    writer.begin_arm(first)
    with writer.claim("infer", run.shards[0]), pytest.raises(RunConflictError, match="dtype: 'a' there, 'b' given"):
        RunWriter(run).begin_arm(second)  # somebody is about to fill it
    assert writer.begin_arm(second) == run.arm("infer") == second
    write_scripted_shard(writer, "infer", run.shards[0])
    with pytest.raises(RunConflictError, match="dtype: 'b' there, 'c' given"):
        writer.begin_arm(third)
    assert run.arm("infer") == second


@pytest.mark.parametrize("recipe", ["train-fp64", "Infer", "old policy", ""])
def test_an_unknown_recipe_is_an_error_that_names_those_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    assert main(["capture", recipe, str(CHECKPOINT), "-o", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "train-perturbed" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["", ".hidden", "../train", "a/b", "a b", "infer~train", "-x", "é"])
def test_a_name_that_no_arm_can_have_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """A name is a folder's, and a part of its pairs' names: infer~train."""
    run = begun(tmp_path / "run")
    before = contents(run.path)
    assert main(["capture", "train", str(CHECKPOINT), "-o", str(run.path), f"--name={name}"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"--name {name}: expected letters, digits" in err
    assert contents(run.path) == before
