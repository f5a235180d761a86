"""One reader of flat tables: simulate, trend and validate take the same columns and say the same about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_hygiene_logged import log_softmax, sampled, table
from test_simulate_sources import write

from moediag.cli.main import main
from moediag.corrections.sources import table_source
from moediag.errors import DumpError
from moediag.hygiene.foreign import check_file
from moediag.importers.columns import KNOWN, LOGP_PAIRS
from moediag.importers.tokens import TokenTable
from moediag.results.trend_sources import read_trend


def logged(n_steps: int = 1, **arguments: Any) -> pd.DataFrame:
    """Tokens of some steps, infer's own samples."""
    steps = [table(*sampled(step, **arguments)).assign(step=step) for step in range(n_steps)]
    return pd.concat(steps, ignore_index=True)


def trend_of_file(path: Path) -> Any:
    return read_trend([path], None, lambda *_: None)


READERS: dict[str, Callable[[Path], Any]] = {
    "simulate": table_source,
    "trend": trend_of_file,
    "validate": check_file,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="logp_infer"), r"lacks logp_infer; found seq_id"),
        (lambda t: pd.concat([t, t.iloc[[3]]]), r"1 rows stand at a place of another, first .*seq_id 0 position 3"),
        (lambda t: t.assign(logp_infer=-t["logp_infer"]), r"logp_infer is above 0 in [\d,]+ rows, first .*seq_id 0"),
        (lambda t: t.assign(is_response=False), "holds no response token; check the loss mask"),
        (lambda t: t.assign(logp_train=np.nan), "no response token has both log-probabilities"),
        (lambda t: t.assign(loss_mask=1, action_mask=0), "the loss masks loss_mask and action_mask differ"),
        (lambda t: t.assign(prompt_id=t["position"] // 30), r"prompt_id changes within 32 sequences"),
        (lambda t: t.assign(position="x"), "column position wants whole numbers, found"),
    ],
)
def test_every_reader_refuses_the_same_in_the_same_words(
    tmp_path: Path, reader: str, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    path = write(change(logged()), tmp_path / "t.parquet")
    with pytest.raises(DumpError, match=message) as caught:
        READERS[reader](path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("framework", LOGP_PAIRS)
def test_the_names_of_a_framework_are_known_to_trend_and_validate_too(tmp_path: Path, framework: str) -> None:
    """Bug: simulate alone knew the frameworks' names; trend took such a table for one row per step."""
    pair = dict(zip(("logp_train", "logp_infer"), LOGP_PAIRS[framework], strict=True))
    ours, theirs = (write(logged(2).rename(columns=names), tmp_path / f"{len(names)}.csv") for names in ({}, pair))
    expected, found = (trend_of_file(path) for path in (ours, theirs))
    pd.testing.assert_frame_equal(found.trend.drop(columns="source"), expected.trend.drop(columns="source"))
    assert f"column {pair['logp_train']} taken as logp_train" in found.notes
    one = [write(logged().rename(columns=names), tmp_path / f"one-{len(names)}.csv") for names in ({}, pair)]
    assert check_file(one[0]).findings == check_file(one[1]).findings


def test_validate_reads_a_table_of_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: validate refused the very tables that simulate checks by its rules."""
    train, infer = sampled(3)
    healthy = write(table(train, infer), tmp_path / "healthy.csv")
    assert main(["validate", str(healthy), "--strict"]) == 0
    assert f"{2 * train.size:,} token rows" in capsys.readouterr().out
    scaled = write(table(train / 0.7, infer), tmp_path / "scaled.jsonl")
    assert main(["validate", str(scaled), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [one["rule"] for one in found if one["level"] == "error"] == ["D10-temperature"]
    assert found == json.loads(json.dumps([one.record() for one in table_source(scaled).findings]))


def test_trend_does_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    frame = logged(3)
    one = trend_of_file(write(frame, tmp_path / "t.parquet"))
    other = trend_of_file(write(frame.sample(frac=1, random_state=2), tmp_path / "t.parquet"))
    pd.testing.assert_frame_equal(one.trend, other.trend, check_exact=True)
    assert one.findings == other.findings


def test_a_sequence_of_another_step_is_another_sequence(tmp_path: Path) -> None:
    tokens = TokenTable.of(write(logged(3), tmp_path / "t.parquet")).read()
    assert len(tokens.start_S) == 3 * 32
    assert tokens.seq_id_S.tolist() == 3 * list(range(32))
    np.testing.assert_array_equal(np.bincount(tokens.row_T), 60)


def test_every_known_column_says_what_it_holds() -> None:
    names = [name for column in KNOWN.values() for name in (column.name, *column.aliases)]
    assert len(names) == len(set(names))
    assert all(column.meaning for column in KNOWN.values())


def at_temperatures(temperature_S: np.ndarray, is_processed: tuple[bool, bool], seed: int = 0) -> pd.DataFrame:
    """Sequences sampled at their temperatures; log-probabilities of (train, infer) after it, or before it."""
    rng = np.random.default_rng(seed)
    shape = (len(temperature_S), 60)
    logits = rng.normal(size=(*shape, 100)) * rng.gamma(2, 2, (*shape, 1))
    noisy = logits + 0.02 * rng.normal(size=logits.shape)
    scale = temperature_S[:, None, None]
    token = (log_softmax(logits / scale) + rng.gumbel(size=logits.shape)).argmax(axis=-1)[..., None]
    sides = (
        log_softmax(side / scale if processed else side)
        for side, processed in zip((noisy, logits), is_processed, strict=True)
    )
    frame = table(*(np.take_along_axis(side, token, axis=-1)[..., 0] for side in sides))
    return frame.assign(temperature=np.repeat(temperature_S, shape[1]))


MIXED = np.where(np.arange(128) % 4 == 0, 0.6, 1.0)


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_simulate_trend_and_validate_say_the_same_about_temperatures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    """Bug: tokens sampled at 0.6 were compared as if they were at 1, the column passed over."""
    frame = at_temperatures(MIXED, (True, True)).assign(step=0)
    path = write(frame.rename(columns={"temperature": "temperatures"}), tmp_path / f"t.{ending}")
    wanted = "1,920 of 7,680 tokens were sampled at temperature 0.6, 5,760 at 1"
    for command in (["simulate", str(path), "--method", "icepop", "-o", str(tmp_path / "out")], ["trend", str(path)],
                    ["validate", str(path)]):  # fmt: skip
        assert main(command) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert f"warning: D10-sampling-temperature: infer~train: {wanted}" in out
    assert wanted in (tmp_path / "out" / "report.md").read_text()
    for read in READERS.values():
        assert [one.rule for one in read(path).findings if one.level != "note"] == ["D10-sampling-temperature"]


@pytest.mark.parametrize("temperature_S", [MIXED, np.where(MIXED < 1, 1.6, 1.0), np.full(64, 0.8)])
@pytest.mark.parametrize("is_processed", [(True, True), (False, False), (False, True), (True, False)])
def test_raw_against_processed_is_an_error_though_most_tokens_are_at_1(
    temperature_S: np.ndarray, is_processed: tuple[bool, bool]
) -> None:
    found = [one for one in table_source(at_temperatures(temperature_S, is_processed)).findings if one.level != "note"]
    errors = ["D10-temperature"] if is_processed[0] != is_processed[1] else []
    assert [one.rule for one in found if one.level == "error"] == errors
    assert "D10-sampling-temperature" in [one.rule for one in found]


def test_temperatures_of_1_and_unknown_ones_raise_nothing() -> None:
    frame = at_temperatures(np.ones(64), (True, True))
    unknown = frame.assign(temperature=np.where(frame["position"] % 3 == 0, np.nan, 1.0))
    for some in (frame, unknown, frame.assign(temperature=np.nan)):
        assert not [one for one in table_source(some).findings if one.level != "note"]
    greedy = frame.assign(temperature=np.where(frame["seq_id"] == 5, 0.0, unknown["temperature"]))
    (found,) = [one for one in table_source(greedy).findings if one.rule == "D10-sampling-temperature"]
    assert (
        "60 of 3,840 tokens were sampled at temperature 0, 2,520 at 1, 1,260 at one that is not known" in found.message
    )


@pytest.mark.parametrize("value", [-0.5, np.inf])
def test_what_is_no_temperature_is_refused(tmp_path: Path, value: float) -> None:
    frame = at_temperatures(np.ones(8), (True, True)).assign(step=0)
    frame.loc[63, "temperature"] = value
    path = write(frame, tmp_path / "t.parquet")
    for read in READERS.values():
        with pytest.raises(DumpError, match="found another in 1 rows, first (step 0 )?seq_id 1 position 3"):
            read(path)
