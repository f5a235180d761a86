"""``moediag export``: files of loggers opened by the loggers' own readers, and tables by other tools."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scripted_engine import make_scripted_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from moediag import Watch
from moediag.cli.main import main
from moediag.watch import STEPS
from tests.test_watch import batch

RECIPES = Path(__file__).parents[1] / "reports" / "recipes.md"
Scalars = dict[str, list[tuple[int, float]]]


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    """The folder of a watch, three steps."""
    watch = Watch(tmp_path / "watched")
    for step in (0, 5, 9):
        watch.step(step, **batch(step))
    return tmp_path / "watched"


def read_tensorboard(folder: Path) -> Scalars:
    """As TensorBoard itself loads them."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [(event.step, float(event.tensor_proto.float_val[0])) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def read_wandb(folder: Path) -> Scalars:
    """The history in an offline run: its file is a LevelDB log whose records are wandb's own messages."""
    (path,) = folder.rglob("*.wandb")
    found: Scalars = {}
    for record in _records(path.read_bytes()):
        message = wandb_internal_pb2.Record.FromString(record)
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in message.history.item}
        for name, value in items.items():
            if not name.startswith("_"):
                found.setdefault(name, []).append((message.history.step.num, float(value)))
    return found


def _records(data: bytes, block: int = 32_768) -> Iterator[bytes]:
    whole, at = b"", 7
    while at + 7 <= len(data):
        if (left := block - at % block) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        if kind in (1, 4):  # whole, or the last of its pieces
            yield whole
            whole = b""
        at += 7 + length


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb}


def steps_of(folder: Path) -> Scalars:
    """The rows of steps.jsonl, by name."""
    rows = [json.loads(line) for line in (folder / STEPS).read_text().splitlines()]
    names = [name for name in rows[0] if name not in ("step", "n_prompts", "restart", "n_findings")]
    return {
        f"mismatch/{name}": known
        for name in names
        if (known := [(row["step"], row[name]) for row in rows if row[name] is not None])
    }


@pytest.mark.parametrize("logger", READERS)
def test_a_logger_has_every_name_step_and_value_of_a_watched_training(
    watched: Path, tmp_path: Path, logger: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(watched), "--format", logger, "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    found, expected = READERS[logger](out), steps_of(watched)
    assert len(expected) > 40
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in values]
        np.testing.assert_allclose([x for _, x in found[name]], [x for _, x in values], rtol=1e-6, err_msg=name)
    assert f"{len(expected)} scalars at 3 steps" in printed
    assert ("wandb sync" if logger == "wandb" else "tensorboard --logdir") in printed
    table = tmp_path / "table"
    assert main(["export", str(watched / STEPS), "--format", logger, "-o", str(table)]) == 0
    assert READERS[logger](table) == found
    capsys.readouterr()
    assert main(["export", str(watched), "--format", logger, "-o", str(out)]) == 1  # curves would be doubled
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"moediag: {out} exists; give -o a new folder, or --force to add to it"
    )


def test_wandb_sends_nothing_whatever_its_mode(watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    assert main(["export", str(watched), "--format", "wandb", "-o", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out" / "wandb").glob("offline-run-*"))) == 1


def test_a_run_is_one_step(tmp_path: Path) -> None:
    make_scripted_run(tmp_path / "run", n_prompts=8)
    assert main(["export", str(tmp_path / "run"), "--format", "tensorboard", "-o", str(tmp_path / "out")]) == 0
    found = read_tensorboard(tmp_path / "out")
    diff = _abs_diff(tmp_path)
    assert [step for step, _ in found["mismatch/abs_logp_diff.mean"]] == [0]
    assert found["mismatch/abs_logp_diff.mean"][0][1] == pytest.approx(diff.mean(), rel=1e-6)
    assert found["mismatch/n_tokens"] == [(0, len(diff))]


@pytest.mark.parametrize("logger", READERS)
def test_a_library_that_is_not_there_is_one_line(
    watched: Path, tmp_path: Path, logger: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == logger]:
        monkeypatch.delitem(sys.modules, name)

    class Missing:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.partition(".")[0] == logger:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    assert main(["export", str(watched), "--format", logger, "-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"moediag: this needs {logger}, which is not installed here; pip install 'moediag[{logger}]'"
    )


def test_a_table_of_tokens_is_the_same_in_every_format(tmp_path: Path) -> None:
    make_scripted_run(tmp_path / "run", n_prompts=8)
    frames = []
    for format_, suffix in (("table", "parquet"), ("arrow", "arrow"), ("csv", "csv")):
        path = tmp_path / f"tokens.{suffix}"
        assert main(["export", str(tmp_path / "run"), "--format", format_, "-o", str(path)]) == 0
        frames.append({"parquet": pd.read_parquet, "arrow": pd.read_feather, "csv": pd.read_csv}[suffix](path))
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frame, frames[0], check_dtype=False, rtol=1e-7)
    assert main(["export", str(tmp_path / "run"), "--format", "csv", "-o", str(tmp_path / "tokens.parquet")]) == 1


def test_the_recipes_for_databases_find_the_worst_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reports/recipes.md says for DuckDB and polars, on what it says to export."""
    make_scripted_run(tmp_path / "runs" / "moe", n_prompts=8)
    monkeypatch.chdir(tmp_path)
    text = RECIPES.read_text().split("### In a logger, or in a database")[1].split("\n### ")[0]
    commands = [line.split() for line in text.splitlines() if line.startswith("moediag export runs/moe")]
    assert [main(command[1:]) for command in commands] == [0, 0]
    tokens = pd.read_parquet("runs/tokens.parquet").query("is_trained")
    nat = (tokens["logp_train"] - tokens["logp_infer"]).abs().astype(float).groupby(tokens["seq_id"])
    expected = pd.DataFrame({"n": nat.size(), "nat": nat.mean()}).sort_values("nat", ascending=False)[:5]
    recipes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(recipes) == 2
    for code in recipes:
        scope: dict[str, Any] = {}
        exec(code, scope)
        worst = pd.DataFrame({name: scope["worst"][name].to_numpy() for name in ("seq_id", "n", "nat")})
        assert worst["seq_id"].tolist() == expected.index.tolist()
        assert worst["n"].tolist() == expected["n"].tolist()
        np.testing.assert_allclose(worst["nat"], expected["nat"], rtol=1e-5)


def _abs_diff(folder: Path) -> np.ndarray:
    """abs(logp_train - logp_infer) of the scored tokens of the run in a folder, from its exported table."""
    assert main(["export", str(folder / "run"), "-o", str(folder / "all.parquet")]) == 0
    tokens = pd.read_parquet(folder / "all.parquet").query("is_trained").dropna(subset=["logp_train", "logp_infer"])
    return (tokens["logp_train"].astype(float) - tokens["logp_infer"].astype(float)).abs().to_numpy()
