"""Loss masks under the frameworks' own names, in tables of simulate and of trend; rows that want one and have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_simulate_sources import write

from moediag.cli.main import main
from moediag.corrections import compare_corrections, parse_correction
from moediag.corrections.sources import Source, table_source
from moediag.errors import DumpError
from moediag.importers.columns import FACTORS, TOKEN_MASKS
from moediag.results.trend_sources import read_trend

N_SEQUENCES, N_EACH = 8, 64


def padded(mask: str | None = None, dtype: Any = int, head: int = N_EACH, seed: int = 0) -> pd.DataFrame:
    """Sequences of 64 response tokens behind masked rows of exactly 0 on both sides, the mask under some name."""
    rng = np.random.default_rng(seed)
    n = N_SEQUENCES * (head + N_EACH)
    position_T = np.arange(n) % (head + N_EACH)
    is_response_T = position_T >= head
    infer_T = np.where(is_response_T, -rng.exponential(1, n), 0.0)
    train_T = np.where(is_response_T, np.minimum(infer_T + 0.04 * rng.normal(size=n), -1e-9), 0.0)
    columns = {"seq_id": np.arange(n) // (head + N_EACH), "position": position_T,
               "logp_train": train_T, "logp_infer": infer_T}  # fmt: skip
    return pd.DataFrame(columns | ({mask: is_response_T.astype(dtype)} if mask else {}))


def n_and_k3(source: Source) -> tuple[int, float]:
    row = compare_corrections(source.tokens, {"none": parse_correction("none")})["correction_statistics"].iloc[0]
    return int(row["n_tokens"]), float(row["kept_k3"])


def bare() -> Source:
    frame = padded()
    return table_source(frame[frame["position"] >= N_EACH])


@pytest.mark.parametrize("dtype", [int, bool, float])
@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_mask_may_be_flags_or_numbers_in_any_kind_of_file(tmp_path: Path, ending: str, dtype: type) -> None:
    source = table_source(write(padded("loss_mask", dtype), tmp_path / f"t.{ending}"))
    assert n_and_k3(source) == n_and_k3(bare())


@pytest.mark.parametrize("mask", [*TOKEN_MASKS, *FACTORS])
def test_the_mask_of_every_framework_is_used_and_named(tmp_path: Path, mask: str) -> None:
    """Bug: only is_response and response_mask were known; the rows that other masks rule out counted as 512 tokens in
    perfect agreement, and k3 came out half as large."""
    table = table_source(write(padded(mask), tmp_path / "t.parquet"))
    assert n_and_k3(table) == n_and_k3(table_source(padded(mask))) == n_and_k3(bare())
    assert n_and_k3(bare())[0] == 512
    assert (f"loss mask: {mask}" in table.notes) == (mask != "is_response")
    assert not table.findings


def test_a_mask_of_tokens_and_masks_of_sequences_and_tools_multiply(tmp_path: Path) -> None:
    """Bug: sequences that NeMo-RL's sample mask rules out counted."""
    frame = padded("token_loss_mask").assign(
        sample_loss_mask=lambda f: (f["seq_id"] != 3).astype(float),
        tool_mask=lambda f: (f["position"] % 5 > 0).astype(int),
    )
    source = table_source(write(frame, tmp_path / "t.parquet"))
    kept = frame["token_loss_mask"] * frame["sample_loss_mask"] * frame["tool_mask"]
    assert len(source.tokens) == kept.sum() < 512
    assert source.tokens.n_sequences == N_SEQUENCES - 1
    assert "loss mask: token_loss_mask * sample_loss_mask * tool_mask" in source.notes
    np.testing.assert_array_equal(source.to_rows(np.ones(len(source.tokens))), kept)


def test_two_masks_of_tokens_are_equal_or_one_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a second mask was passed over in silence."""
    frame = padded("loss_mask").assign(response_mask=lambda f: f["loss_mask"])
    same = table_source(write(frame, tmp_path / "same.parquet"))
    assert "loss mask: response_mask (response_mask and loss_mask are equal)" in same.notes
    other = write(frame.assign(loss_mask=lambda f: f["loss_mask"] * (f["position"] % 2)), tmp_path / "other.parquet")
    with pytest.raises(DumpError, match=r"response_mask and loss_mask differ in 256 rows, first row 64; choose one"):
        table_source(other)
    assert main(["simulate", str(other), "--method", "none"]) == 1
    assert "--mask COLUMN" in capsys.readouterr().err
    for mask, n in (("loss_mask", 256), ("response_mask", 512)):
        assert main(["simulate", str(other), "--method", "none", "--mask", mask, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["n_scored_tokens"] == n
        unused = ({"loss_mask", "response_mask"} - {mask}).pop()
        assert f"columns not used: {unused}" in found["notes"]
    assert main(["simulate", str(other), "--mask", "padding"]) == 1
    assert "has no column padding to mask with" in capsys.readouterr().err
    assert main(["simulate", str(tmp_path), "--mask", "loss_mask"]) == 2


def test_a_mask_of_another_name_can_be_given_and_every_column_left_over_is_named(tmp_path: Path) -> None:
    frame = padded("my_mask").assign(text="a", reward=1.0, advantage=0.5, token_id=7)
    path = write(frame, tmp_path / "t.parquet")
    assert len(table_source(path, mask="my_mask").tokens) == 512
    assert "columns not used: my_mask, text, reward, token_id" in table_source(path).notes
    assert "columns not used: text, reward, token_id" in table_source(path, mask="my_mask").notes


@pytest.mark.parametrize("value", [0.5, 2, np.nan])
def test_what_is_no_flag_is_no_mask(tmp_path: Path, value: float) -> None:
    frame = padded("loss_mask", float)
    frame.loc[3, "loss_mask"] = value
    for read in (lambda: table_source(write(frame, tmp_path / "t.parquet")), lambda: table_source(frame)):
        with pytest.raises(DumpError, match="loss_mask"):
            read()


def test_padding_without_a_mask_is_a_finding_above_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: 512 rows of exactly 0 on both sides counted as tokens in perfect agreement, without a word."""
    path = write(padded(), tmp_path / "t.parquet")
    finding, *others = table_source(path).findings
    assert all(other.level == "note" for other in others)
    assert (finding.rule, finding.level, finding.n, finding.n_of) == ("D31-zero-logp", "warning", 512, 1024)
    assert main(["simulate", str(path), "--method", "icepop", "-o", str(tmp_path / "out")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.index("512 of 1,024 rows are exactly 0 on both sides") < out.index("masked [95 %]")
    assert "--mask COLUMN" in out
    for page in ("report.md", "report.html"):
        assert "512 of 1,024 rows are exactly 0 on both sides" in (tmp_path / "out" / page).read_text()


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.4])
def test_certain_tokens_are_no_padding(rate: float) -> None:
    """Of 60 healthy tables with tokens that are certain on both sides, all last ones among them, none is accused."""
    for seed in range(20):
        frame = padded(head=0, seed=seed)
        rng = np.random.default_rng(seed)
        is_certain_T = (rng.random(len(frame)) < rate) | (frame["position"] == N_EACH - 1)
        frame.loc[is_certain_T, ["logp_train", "logp_infer"]] = 0.0
        assert not serious(frame)


def test_rounding_above_0_is_not_taken_for_padding() -> None:
    """A log-probability that is set to 0 for being above it by rounding is no exact zero of a buffer."""
    frame = padded()
    is_zero = frame["logp_infer"] == 0
    assert serious(frame)
    assert not serious(frame.assign(logp_infer=frame["logp_infer"].where(~is_zero, 2e-7)))


def serious(frame: pd.DataFrame) -> list[str]:
    """Findings above a note."""
    return [found.rule for found in table_source(frame).findings if found.level != "note"]


@pytest.mark.parametrize("mask", ["completion_mask", "sample_mask", None])
def test_a_series_over_steps_knows_the_same_masks(tmp_path: Path, mask: str | None) -> None:
    """Bug: trend knew is_response only, and every step's k3 was halved by the padding."""
    frame = pd.concat([padded(mask, seed=step).assign(step=step) for step in range(3)])
    source = read_trend([write(frame, tmp_path / "t.csv")], None, lambda *_: None)
    k3 = source.trend[source.trend["metric"] == "kl_infer_train_k3"]
    if mask is None:
        assert (k3["n_tokens"] == 1024).all()
        assert "1,536 of 3,072 rows are exactly 0 on both sides" in source.findings[0].message
        return
    assert k3["value"].iloc[0] == pytest.approx(n_and_k3(bare())[1], rel=1e-6)
    assert (k3["n_tokens"] == 512).all()
    assert f"loss mask: {mask}" in source.notes
    frame["action_mask"] = 1
    frame["loss_mask"] = 0
    with pytest.raises(DumpError, match=r"differ in [\d,]+ rows, first row \d+; keep one of them"):
        read_trend([write(frame, tmp_path / "u.csv")], None, lambda *_: None)
