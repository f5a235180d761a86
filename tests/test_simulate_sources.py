"""Rows from parquet, csv, jsonl and memory are one and the same batch; what no log holds is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.csv as pacsv
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moediag.corrections import compare_corrections, parse_correction, sweep_by_band, weights
from moediag.corrections.sources import Source, grpo_advantages, sequence_rewards, table_source
from moediag.corrections.statistics import masked_entropy, ratio_counts
from moediag.corrections.weight_files import refuse_weights_path, write_weights
from moediag.errors import DumpError
from moediag.importers.columns import LOGP_PAIRS

METHODS = (
    "icepop",
    "tis_token",
    "tis_sequence",
    "mis_sequence",
    "geometric_band",
    "veto",
    "kpop",
    "dppo_tv",
    "trm_max",
)


def logged(n_sequences: int = 12, seed: int = 0, words: bool = False) -> pd.DataFrame:
    """A prompt token and a response per sequence, two sequences per prompt, rows in order."""
    rng = np.random.default_rng(seed)
    length_S = rng.integers(1, 9, n_sequences) + 1
    row_T = np.repeat(np.arange(n_sequences), length_S)
    position_T = np.concatenate([np.arange(n) for n in length_S])
    infer_T = -rng.exponential(1.0, len(row_T))
    train_T = np.minimum(infer_T + 0.3 * rng.standard_t(2, len(row_T)), 0.0)
    train_T[rng.random(len(row_T)) < 0.05] = -np.inf
    is_response_T = position_T > 0
    train_T[~is_response_T] = np.nan
    return pd.DataFrame(
        {
            "seq_id": np.array([f"s{row:02d}" for row in row_T]) if words else row_T * 7,
            "position": position_T,
            "prompt_id": row_T // 2,
            "logp_train": train_T,
            "logp_infer": infer_T,
            "is_response": is_response_T,
            "token_id": rng.integers(0, 999, len(row_T)),
            "entropy": rng.exponential(1.0, len(row_T)),
            "reward": (row_T % 3 == 0).astype(float),
        }
    )


def write(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
    return path


def weights_by_key(source: Source) -> dict[str, dict[tuple[Any, int], float]]:
    keys = list(zip(source.keys["seq_id"][:].tolist(), np.asarray(source.keys["position"]).tolist(), strict=True))
    return {
        method: dict(zip(keys, source.weights(parse_correction(method)).tolist(), strict=True)) for method in METHODS
    }


@pytest.mark.parametrize("words", [False, True], ids=["numbers", "words"])
@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_every_kind_of_file_in_any_order_gives_the_same_weights_bit_for_bit(
    tmp_path: Path, ending: str, words: bool
) -> None:
    frame = logged(words=words)
    expected = weights_by_key(table_source(frame))
    shuffled = frame.sample(frac=1, random_state=3)
    found = weights_by_key(table_source(write(shuffled, tmp_path / f"t.{ending}")))
    assert found == expected
    assert any(0 < w < 1 for w in expected["icepop"].values())
    assert 0.0 in expected["geometric_band"].values()


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_whole_numbers_may_be_written_as_floats_and_csv_with_semicolons(tmp_path: Path, ending: str) -> None:
    """Bug: a position of 42.0, as pandas writes a column that once had a gap, was refused; 0.5 of a frame became 0."""
    frame = logged()
    expected = weights_by_key(table_source(frame))
    floats = frame.astype({"position": float, "token_id": float})
    path = write(floats, tmp_path / f"t.{ending}")
    if ending == "csv":
        floats.to_csv(path, index=False, sep=";")
    assert weights_by_key(table_source(path)) == weights_by_key(table_source(floats)) == expected
    with pytest.raises(DumpError, match=r"^column position needs whole numbers, found 0\.5 in row 0"):
        table_source(frame.assign(position=frame["position"] + 0.5))


def test_weights_of_a_table_are_those_of_the_python_call() -> None:
    frame = logged(40)
    response = frame[frame["is_response"]]
    source = table_source(frame)
    reward_S = response.groupby("seq_id")["reward"].first()
    advantage_S = pd.Series(grpo_advantages(reward_S, response.groupby("seq_id")["prompt_id"].first()), reward_S.index)
    advantage_T = response["seq_id"].map(advantage_S).to_numpy()
    for method in METHODS:
        direct_T = weights(
            method, response["logp_train"], response["logp_infer"], response["seq_id"], advantage=advantage_T
        )
        row_T = source.weights(parse_correction(method))
        np.testing.assert_array_equal(row_T[frame["is_response"]], direct_T, err_msg=method)
        assert (row_T[~frame["is_response"]] == 0).all()


@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_rows_changes_nothing_of_the_batch(seed: int) -> None:
    frame = logged(7)
    one, other = table_source(frame), table_source(frame.sample(frac=1, random_state=seed))
    pd.testing.assert_frame_equal(one.tokens.frame, other.tokens.frame, check_exact=True)


def test_positions_count_from_the_first_response_token() -> None:
    positions = table_source(logged()).tokens.frame.groupby("seq_id")["position"]
    assert (positions.first() == 0).all()
    assert (positions.last() == positions.size() - 1).all()


def test_rewards_of_the_data_come_before_the_synthetic_one() -> None:
    frame = logged()
    assert table_source(frame).reward.startswith("rewards as the table has them")
    hashed = table_source(frame.drop(columns="reward"))
    assert hashed.reward.startswith("synthetic")
    response = frame[frame["is_response"]]
    expected = sequence_rewards(response["token_id"], response["seq_id"] // 7, 12)
    prompt_S = response.groupby("seq_id")["prompt_id"].first().to_numpy()
    advantage_S = hashed.tokens.frame.groupby("seq_id")["advantage"].first()
    np.testing.assert_array_equal(advantage_S, grpo_advantages(expected, prompt_S))
    bare = table_source(frame.drop(columns=["reward", "token_id"]))
    assert "advantage" not in bare.tokens.frame
    assert "left out" in bare.reward
    assert "advantage" not in table_source(frame, "none").tokens.frame


def test_a_given_advantage_is_taken_as_it_is() -> None:
    frame = logged().assign(advantage=np.arange(float(len(logged()))))
    response = frame[frame["is_response"]]
    np.testing.assert_array_equal(table_source(frame).tokens.frame["advantage"], response["advantage"])


@pytest.mark.parametrize("framework", LOGP_PAIRS)
def test_a_frameworks_pair_of_names_is_taken_and_said(tmp_path: Path, framework: str) -> None:
    train, infer = LOGP_PAIRS[framework]
    frame = logged().rename(columns={"logp_train": train, "logp_infer": infer})
    source = table_source(write(frame, tmp_path / "t.parquet"))
    assert any(train in note and "logp_train" in note for note in source.notes)
    assert weights_by_key(source) == weights_by_key(table_source(logged()))


def test_half_a_pair_of_names_is_ambiguous(tmp_path: Path) -> None:
    path = write(logged().rename(columns={"logp_train": "old_log_probs"}), tmp_path / "t.csv")
    with pytest.raises(DumpError, match="lacks logp_train; found"):
        table_source(path)


def without(column: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda frame: frame.drop(columns=column)


def put(column: str, row: int, value: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame.astype({column: object}) if isinstance(value, str) else frame.copy()
        frame.loc[row, column] = value
        return frame

    return change


BAD = {
    "no-column": (without("logp_infer"), r"lacks logp_infer; found seq_id"),
    "twice": (lambda frame: pd.concat([frame, frame.iloc[[3]]]), r"1 rows stand at a place of another, first seq_id 0"),
    "positive": (put("logp_infer", 1, 0.25), r"logp_infer is above 0 in 1 rows, first seq_id 0 position 1 \(0\.25\)"),
    "reward": (put("reward", 2, 5.0), r"reward changes within 1 sequences, first at seq_id 0 position 2"),
    "no-reward": (put("reward", 2, np.nan), r"reward is missing in 1 rows, first seq_id 0 position 2"),
    "prompt": (put("prompt_id", 2, 9), r"prompt_id changes within 1 sequences"),
    "empty": (lambda frame: frame.iloc[:0], r"holds no row|cannot be read|lacks seq_id"),
    "no-response": (lambda frame: frame.assign(is_response=False), r"holds no response token"),
    "unscored": (lambda frame: frame.assign(logp_train=np.nan), r"no response token has both log-probabilities"),
    "flags": (lambda frame: frame.assign(is_response=2), r"is_response needs true/false or 1/0, found 2"),
    "fraction": (
        lambda frame: put("position", 2, 1.5)(frame.astype({"position": float})),
        r"column position needs whole numbers, found 1\.5 in row 2",
    ),
    "gap": (put("position", 2, np.nan), r"position (needs whole numbers, found nan in row 2|is empty in 1 rows)"),
    "float-ids": (lambda frame: frame.assign(seq_id=0.5), r"column seq_id"),
}


ENDINGS_AND_FAULTS = [(ending, fault) for ending in ("parquet", "csv", "jsonl") for fault in BAD]
ENDINGS_AND_FAULTS.remove(("csv", "float-ids"))  # in a csv 0.5 is a word like any other


@pytest.mark.parametrize(("ending", "fault"), ENDINGS_AND_FAULTS)
def test_what_no_log_holds_is_one_line(tmp_path: Path, ending: str, fault: str) -> None:
    change, message = BAD[fault]
    with pytest.raises(DumpError, match=message) as caught:
        table_source(write(change(logged()), tmp_path / f"t.{ending}"))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_words_among_numbers_name_the_column(tmp_path: Path, ending: str) -> None:
    frame = logged()
    frame = put("logp_train", 4, "abc")(frame) if ending != "parquet" else frame.astype({"logp_train": str})
    with pytest.raises(DumpError, match=r"logp_train|column #3|abc"):
        table_source(write(frame, tmp_path / f"t.{ending}"))


def test_words_among_numbers_of_a_frame_name_the_column() -> None:
    with pytest.raises(DumpError, match="column logp_train needs numbers"):
        table_source(put("logp_train", 4, "abc")(logged()))


def test_files_that_are_no_table(tmp_path: Path) -> None:
    whole = write(logged(), tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "text.jsonl").write_text('{"seq_id": 1\n')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "twice.csv").write_text("seq_id,position,position,logp_train,logp_infer\n1,0,0,-1,-1\n")
    (tmp_path / "dir.csv").mkdir()
    (tmp_path / "table.xlsx").write_bytes(b"x")
    names = [path.name for path in tmp_path.iterdir() if path.name != "whole.parquet"] + ["missing.csv"]
    assert len(names) == 9
    for name in names:
        with pytest.raises(DumpError) as caught:
            table_source(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_lists_in_a_cell_are_told_to_be_exploded(tmp_path: Path) -> None:
    frame = pd.DataFrame({"seq_id": [1], "position": [0], "logp_train": [[-1.0]], "logp_infer": [[-1.0]]})
    for ending in ("parquet", "jsonl"):
        with pytest.raises(DumpError, match="not a value a row"):
            table_source(write(frame, tmp_path / f"t.{ending}"))


@pytest.mark.parametrize("words", [False, True], ids=["numbers", "words"])
@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_weights_come_back_with_the_keys_in_the_order_of_the_rows(tmp_path: Path, ending: str, words: bool) -> None:
    frame = logged(words=words).sample(frac=1, random_state=5).reset_index(drop=True)
    source = table_source(frame)
    corrections = {"mine": parse_correction("icepop"), "veto": parse_correction("veto")}
    write_weights(source, corrections, tmp_path / f"w.{ending}")
    path = tmp_path / f"w.{ending}"
    found = {
        ".parquet": lambda: pd.read_parquet(path),
        ".csv": lambda: pacsv.read_csv(path).to_pandas(),  # correctly rounded; pandas' own parser need not be
        ".jsonl": lambda: pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()]),
    }[path.suffix]()
    assert list(found.columns) == ["seq_id", "position", "prompt_id", "mine", "veto"]
    assert found["seq_id"].tolist() == frame["seq_id"].tolist()
    assert found["position"].tolist() == frame["position"].tolist()
    np.testing.assert_array_equal(found["mine"], source.weights(corrections["mine"]))
    assert (found.loc[~frame["is_response"], ["mine", "veto"]] == 0).all(axis=None)
    assert [path.name for path in tmp_path.iterdir()] == [f"w.{ending}"]  # nothing left beside it


def test_weights_are_not_written_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("mine")
    for path in (tmp_path / "w.csv", tmp_path / "w.txt", tmp_path / "no" / "w.csv", tmp_path):
        with pytest.raises(DumpError):
            refuse_weights_path(path)
    refuse_weights_path(tmp_path / "w.csv", force=True)


def test_ratio_counts_hold_every_scored_token() -> None:
    frame = logged(60)
    counts = ratio_counts(table_source(frame).tokens)
    diff_T = (frame["logp_train"] - frame["logp_infer"])[frame["is_response"]]
    diff_T = diff_T[np.isfinite(diff_T)]
    assert counts["n_tokens"].sum() == len(diff_T)
    for row in counts[counts["n_tokens"] > 0].itertuples():
        assert row.n_tokens == ((diff_T >= row.bin_low) & (diff_T < row.bin_high)).sum()
    far = frame.assign(logp_train=lambda f: np.where(f.index % 7 == 1, -1000.0, f["logp_infer"]))
    counts = ratio_counts(table_source(far).tokens)  # beyond the outermost edges stand the open bins
    assert counts["n_tokens"].iloc[0] == (far.loc[far["is_response"], "logp_train"] == -1000).sum() > 0


def test_masked_entropy_counts_the_masked_tokens_of_a_plain_loop() -> None:
    frame = logged(60)
    source = table_source(frame)
    counts = masked_entropy(source.tokens, {"icepop": parse_correction("icepop")})
    response = frame[frame["is_response"]]
    response = response[np.isfinite(response["logp_train"])]
    ratio_T = np.exp(response["logp_train"] - response["logp_infer"])
    is_masked_T = (ratio_T < 0.5) | (ratio_T > 5)
    assert counts["n_masked"].sum() == is_masked_T.sum() > 0
    for row in counts.itertuples():
        is_inside_T = (response["entropy"] >= row.bin_low) & (response["entropy"] < row.bin_high)
        assert row.n_tokens == is_inside_T.sum()
        assert row.n_masked == (is_inside_T & is_masked_T).sum()


def scored_frame(n: int = 400, dtype: Any = np.float64) -> pd.DataFrame:
    """Twenty tokens a sequence, everything scored."""
    rng = np.random.default_rng(1)
    infer_T = -rng.exponential(1.0, n) - 0.01
    train_T = np.minimum(infer_T + 0.05 * rng.normal(size=n), -1e-3)
    columns = {"seq_id": np.arange(n) // 20, "position": np.arange(n) % 20}
    return pd.DataFrame({**columns, "logp_train": train_T.astype(dtype), "logp_infer": infer_T.astype(dtype)})


def statistics(source: Source, words: str) -> pd.Series:
    return compare_corrections(source.tokens, {"x": parse_correction(words)})["correction_statistics"].iloc[0]


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_log_probability_above_0_by_rounding_is_0_and_counted(tmp_path: Path, ending: str) -> None:
    """Bug: one value of +2e-7 among thousands of rows ended the command with "are these logits or probabilities?"."""
    frame = scored_frame()
    frame.loc[[5, 9], "logp_infer"] = [2e-7, 9e-5]
    source = table_source(write(frame, tmp_path / f"t.{ending}"))
    np.testing.assert_array_equal(source.tokens.logp_infer_T[[5, 9]], 0)
    assert any("2 of 400 logp_infer are above 0 by rounding, at most 9e-05 nat" in note for note in source.notes)
    rounded = table_source(frame.assign(logp_infer=frame["logp_infer"].clip(upper=0)))
    assert statistics(source, "tis_token").equals(statistics(rounded, "tis_token"))
    frame.loc[5, "logp_infer"] = 2e-4
    with pytest.raises(DumpError, match=r"logp_infer is above 0 in 1 rows, first seq_id 0 position 5 \(0.0002\)"):
        table_source(write(frame, tmp_path / f"u.{ending}"))


@pytest.mark.parametrize("side", ["logp_train", "logp_infer"])
def test_an_impossible_log_probability_is_left_out_counted_and_said(side: str) -> None:
    """Bug: one -inf on the infer side made k3 242,583, and the analysis of runs left such a token out: two rules."""
    frame = scored_frame()
    frame.loc[[3, 77], side] = -np.inf
    source = table_source(frame)
    left = statistics(table_source(frame.drop(index=[3, 77])), "mis_token:cap=inf")
    found = statistics(source, "mis_token:cap=inf")
    for name in ("n_tokens", "kept_k3", "weight_mean", "ess_token"):
        assert found[name] == pytest.approx(left[name], rel=1e-12), name
    assert (source.weights(parse_correction("tis_token"))[[3, 77]] == 0).all()
    (note,) = [note for note in source.notes if "D31-impossible-logp" in note]
    assert (
        f"2 of 400 response tokens have a log-probability of -inf ({'2 in' if side == 'logp_train' else '0 in'}" in note
    )
    assert not any("lack a log-probability" in note for note in source.notes)


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_ratio_on_the_bound_in_float32_is_kept_from_every_kind_of_file(tmp_path: Path, ending: str) -> None:
    """Bug: log of 0.5 as float32 lies 1e-9 below the bound, and 100 % of such a table was masked."""
    frame = scored_frame(dtype=np.float32)
    frame["logp_train"], frame["logp_infer"] = np.float32(np.log(0.5)), np.float32(0)
    in_full = frame.astype({"logp_train": float, "logp_infer": float})  # as Python writes a float32 tensor's numbers
    for each in (in_full,) if ending == "jsonl" else (frame, in_full):
        source = table_source(write(each, tmp_path / f"t.{ending}"))
        np.testing.assert_array_equal(source.tokens.logp_train_T, in_full["logp_train"])
        assert statistics(source, "icepop:alpha=0.5,beta=5")["masked_share"] == 0
        assert sweep_by_band(source.tokens, [0.5, 0.51], [5.0])["masked_share"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("dtype", "name", "steps"), [("float16", "float16", "0.0039 nat from -4 to -8 and 0.0078"),
                                 ("bfloat16", "bfloat16", "0.031 nat from -4 to -8 and 0.062")],
)  # fmt: skip
def test_log_probabilities_in_half_precision_get_a_note_with_their_step(
    tmp_path: Path, dtype: str, name: str, steps: str
) -> None:
    """Bug: a float16 table, with steps of 0.004 to 0.008 nat at -8, was read like any other."""
    frame = scored_frame()
    if dtype == "float16":
        half = frame.astype({"logp_train": np.float16})
        assert (np.spacing(np.float16(5)), np.spacing(np.float16(9))) == (2.0**-8, 2.0**-7)
    else:
        bits = frame["logp_train"].to_numpy(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        half = frame.assign(logp_train=bits.view(np.float32))
    for ending in ("parquet", "csv") if dtype == "bfloat16" else ("parquet",):  # a csv has float16's shortest digits
        notes = table_source(write(half, tmp_path / f"t.{ending}")).notes
        (note,) = [note for note in notes if "was stored in" in note]
        assert note.startswith(f"logp_train was stored in {name}: a step is {steps}")
    assert not any("was stored in" in note for note in table_source(frame.astype({"logp_train": np.float32})).notes)
