"""What schema 1 could not hold, written by the real writer, read, paired, analysed and validated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from records import arm_of, checkpoint_of, made_otherwise, new_run

from moediag.corrections.sources import run_source
from moediag.errors import IncompleteRunError, RunConflictError, RunError
from moediag.hygiene import check_run
from moediag.results import analyze_run, report_run
from moediag.results.pair_analysis import analyze_pair
from moediag.results.trend import measure_trend
from moediag.run.capture import (
    Capture,
    TokenRows,
    _is_absent,
    arrays_of,
    decode_tokens,
    encode_prompts,
    encode_tokens,
    split_into_shards,
)
from moediag.run.create import create_run
from moediag.run.reader import Run, open_run
from moediag.run.records import ArmRecord, Imported, Router, RunRecord, TokensFrom
from moediag.run.series import create_series, open_series
from moediag.run.writer import RunWriter

N_PROMPTS, LENGTH = 10, 12
IMPORTED = Imported(format="slime rollout_data", files={"rollout_0.pt": "ab" * 32}, notes=("one rollout step",))


@dataclass
class Made:
    """Token rows of some conversations and what two sides say of them; tests change what they are about."""

    tokens: TokenRows
    infer: Capture
    train: Capture
    infer_record: dict[str, Any]
    train_record: dict[str, Any]


def made(layers: int = 2, n_experts: int = 8, top_k: int = 2) -> Made:
    """Prompts of 4 tokens and responses of 8; train differs by up to 0.1 nat and flips now and then."""
    rng, n = np.random.default_rng(0), N_PROMPTS * LENGTH
    position_T = np.tile(np.arange(LENGTH), N_PROMPTS).astype(np.int32)
    seq_T = np.repeat(np.arange(N_PROMPTS), LENGTH)
    tokens = TokenRows(
        seq_id_T=seq_T.astype(np.int64),
        prompt_id_T=seq_T.astype(np.int64),
        sample_index_T=np.zeros(n, np.int32),
        position_T=position_T,
        token_id_T=rng.integers(0, 100, n),
        is_response_T=position_T >= 4,
    )
    logp_T = np.where(tokens.is_response_T, -rng.exponential(1.0, n) - 0.2, np.nan)
    logits = rng.normal(size=(n, layers, n_experts))
    infer = Capture(logp_T=logp_T.astype(np.float32), expert_ids_TLK=top(logits, top_k))
    wobble = rng.uniform(-0.1, 0.1, n)
    train = Capture(
        logp_T=(logp_T + wobble).astype(np.float32),
        expert_ids_TLK=top(logits + 0.1 * rng.normal(size=logits.shape), top_k),
    )
    routers = tuple(Router(decoder_layer=layer, n_experts=n_experts, top_k=top_k) for layer in range(layers))
    records = ({"routers": routers, "arrays": ("logp_T", "expert_ids_TLK")} for _ in range(2))
    return Made(tokens, infer, train, *records)


def top(logits_TLE: np.ndarray, top_k: int) -> np.ndarray:
    return np.argsort(-logits_TLE, axis=2)[:, :, :top_k].astype(np.int16)


def imported(path: Path, content: Made, infer: str = "rollout", train: str = "trainer", **record: Any) -> Run:
    """The run that an importer of another framework's dump makes: no checkpoint, no prompts, no sampling."""
    run = create_run(
        path,
        RunRecord(
            moediag_version="0",
            configuration={"files": IMPORTED.files},
            tokens=TokensFrom(origin="imported"),
            shards=tuple(split_into_shards(N_PROMPTS, 4)),
            main_pair=(train, infer),
            **record,
        ),
        None,
        None,
    )
    writer = RunWriter(run)
    sides = (
        (infer, "infer", content.infer, content.infer_record),
        (train, "train", content.train, content.train_record),
    )
    for name, role, _, changes in sides:
        writer.begin_arm(
            ArmRecord(
                **{
                    "name": name,
                    "role": role,
                    "engine": "slime",
                    "no_checkpoint": "the dump names none",
                    "origin": IMPORTED,
                    **changes,
                }
            )
        )
    for shard in run.shards:
        keep_T = np.isin(content.tokens.seq_id_T, list(shard.seq_ids))
        tokens = rows_of(content.tokens, keep_T)
        for name, _, capture, _ in sides:
            arrays = {key: array[keep_T] for key, array in capture.arrays().items()}
            writer.write_capture(name, shard, tokens, Capture(**arrays), {}, {})
        writer.write_tokens(shard, tokens)
    return open_run(path)


def rows_of(tokens: TokenRows, keep_T: np.ndarray) -> TokenRows:
    return TokenRows(**{name: None if array is None else array[keep_T] for name, array in vars(tokens).items()})


def errors(run: Run) -> list[str]:
    return [finding.line() for finding in check_run(run) if finding.level == "error"]


def mean_of(run: Run) -> float:
    return float(analyze_run(run)["pairs"]["rollout~trainer"]["logp"]["abs_logp_diff"]["mean"])


def test_an_imported_run_has_no_checkpoint_prompts_or_sampling_and_arms_of_any_name(tmp_path: Path) -> None:
    content = made()
    run = imported(tmp_path / "run", content)
    assert (run.main_arms, run.reference("infer"), run.arms()[0]) == (("trainer", "rollout"), "rollout", "rollout")
    assert run.checkpoint_of("trainer") is None
    assert run.arm("trainer").origin == IMPORTED
    with pytest.raises(IncompleteRunError, match="no table of prompts"):
        run.prompts()
    assert errors(run) == []
    diff_T = (content.train.logp_T - content.infer.logp_T)[content.tokens.is_response_T]
    assert mean_of(run) == pytest.approx(np.abs(diff_T.astype(np.float64)).mean(), rel=1e-6)
    assert report_run(run).exists()
    assert run_source(run, run.main_arms).tokens.logp_train_T.shape == diff_T.shape


def test_a_record_needs_a_reason_for_what_it_lacks_and_a_pair_for_a_change() -> None:
    fine = {
        "name": "a",
        "role": "infer",
        "engine": "x",
        "origin": IMPORTED,
        "arrays": ("logp_T",),
        "no_checkpoint": "?",
    }
    ArmRecord(**fine)  # type: ignore[arg-type]
    for wrong in ({"no_checkpoint": ""}, {"variant_of": "b"}, {"change": "repeat"}, {"arrays": ("entropy_T",)}):
        with pytest.raises(ValueError, match=r"reason|belong together|lack logp_T"):
            ArmRecord(**{**fine, **wrong})  # type: ignore[arg-type]


def test_tool_turns_count_nowhere_but_in_positions(tmp_path: Path) -> None:
    """Rows that a tool wrote are response rows outside the loss mask; what a dump has for them is junk."""
    content = made()
    plain = content.tokens
    is_tool_T = (plain.position_T >= 7) & (plain.position_T < 9)
    junk_T = np.where(is_tool_T, np.float32(-50.0), content.train.logp_T)
    tokens = replace(
        plain,
        is_trained_T=plain.is_response_T & ~is_tool_T,
        turn_T=np.select([plain.position_T < 7, plain.position_T < 9], [0, 1], 2).astype(np.int32),
        weight_version_T=np.where(plain.seq_id_T % 2 == 0, "step-4", None).astype(object),
        advantage_T=np.where(plain.is_response_T, plain.seq_id_T - 4.5, np.nan),
        reward_T=np.full(len(plain), 1.0),
    )
    content = replace(content, tokens=tokens, train=replace(content.train, logp_T=junk_T))
    run = imported(tmp_path / "run", content)
    back = [run.tokens(shard) for shard in run.shards]
    for name, array in vars(tokens).items():
        found = np.concatenate([getattr(rows, name) for rows in back])
        np.testing.assert_array_equal(found, array)
    trained_T = tokens.is_trained_T
    assert trained_T is not None
    block = next(run.pair("rollout", "trainer").blocks())
    np.testing.assert_array_equal(block.position_T[:6], [0, 1, 2, 5, 6, 7])
    diff_T = (content.train.logp_T - content.infer.logp_T)[trained_T].astype(np.float64)
    assert mean_of(run) == pytest.approx(np.abs(diff_T).mean(), rel=1e-6)
    assert np.abs(diff_T).max() < 0.2
    assert errors(run) == []
    assert len(run_source(run, run.main_arms).tokens) == trained_T.sum()


def test_tokens_without_ids_are_compared_all_the_same(tmp_path: Path) -> None:
    content = made()
    with_ids = mean_of(imported(tmp_path / "with", content))
    bare = replace(content, tokens=replace(content.tokens, token_id_T=np.full(len(content.tokens), -1)))
    run = imported(tmp_path / "without", bare)
    import pyarrow.parquet as pq

    assert pq.read_table(run.path / "tokens/shard-00000.parquet")["token_id"].null_count == 4 * LENGTH
    assert mean_of(run) == with_ids
    assert errors(run) == []
    assert report_run(run).exists()


def test_routing_of_one_side_alone_is_left_out_with_the_reason(tmp_path: Path) -> None:
    content = made()
    content = replace(content, train=content.train.unrouted(), train_record={"arrays": ("logp_T",)})
    run = imported(tmp_path / "run", content)
    pair = run.pair("rollout", "trainer")
    assert pair.left_out == {"routing": "trainer kept no expert ids"}
    summary = analyze_run(run)
    found = summary["pairs"]["rollout~trainer"]
    assert found["routing"] is None
    assert found["left_out"] == pair.left_out
    assert "routing left out: trainer kept no expert ids" in summary["verdict"]["evidence"]
    page = report_run(run).read_text()
    assert "trainer kept no expert ids" in page
    assert "dense" not in page.split("<details")[0]
    assert errors(run) == []


def test_layers_are_compared_where_both_sides_have_the_same_router(tmp_path: Path) -> None:
    """Three MoE layers against two, of which one has another K: what is left is one layer, and it is said."""
    content = made(layers=3)
    ids_TLK = content.train.expert_ids_TLK
    assert ids_TLK is not None
    wide_TLK = np.concatenate([ids_TLK[:, :2], np.full((len(ids_TLK), 2, 1), -1, np.int16)], axis=2)
    wide_TLK[:, 1] = top(np.random.default_rng(1).normal(size=(len(ids_TLK), 1, 8)), 3)[:, 0]
    routers = (
        Router(decoder_layer=0, n_experts=8, top_k=2),
        Router(decoder_layer=1, n_experts=8, top_k=3),
    )
    content = replace(
        content,
        train=replace(content.train, expert_ids_TLK=wide_TLK),
        train_record={**content.train_record, "routers": routers},
    )
    # of two layers of two sizes the larger K is the common one, so nothing is left to compare
    run = imported(tmp_path / "none", content)
    assert run.pair("rollout", "trainer").decoder_layer_L == ()
    routers = (*routers, Router(decoder_layer=2, n_experts=8, top_k=2))
    wide_TLK = np.concatenate([wide_TLK, np.pad(ids_TLK[:, 2:], ((0, 0), (0, 0), (0, 1)), constant_values=-1)], axis=1)
    content = replace(
        content,
        train=replace(content.train, expert_ids_TLK=wide_TLK),
        train_record={**content.train_record, "routers": routers},
    )
    run = imported(tmp_path / "run", content)
    pair = run.pair("rollout", "trainer")
    assert (pair.decoder_layer_L, pair.top_k, pair.n_experts) == ((0, 2), 2, 8)
    assert "1 of 3 MoE layers are not compared" in pair.left_out["routing"]
    block = next(pair.blocks())
    rows = np.flatnonzero(content.tokens.is_response_T[: 4 * LENGTH]) - 1
    np.testing.assert_array_equal(block.expert_ids_train_TLK, wide_TLK[rows][:, [0, 2], :2])
    infer_TLK = content.infer.expert_ids_TLK
    assert infer_TLK is not None
    same_TL = (np.sort(infer_TLK[:, [0, 2]]) == np.sort(wide_TLK[:, [0, 2], :2])).all(axis=2)
    behind_T = np.flatnonzero(content.tokens.is_response_T) - 1
    frame = analyze_pair(pair).agreement_by_layer
    assert frame is not None
    np.testing.assert_allclose(frame["same_set_rate"], same_TL[behind_T].mean(axis=0))
    assert errors(run) == []
    assert "MoE layers are not compared" in str(analyze_run(run)["pairs"]["rollout~trainer"]["left_out"])


def test_another_k_on_one_side_is_no_flip_in_every_row(tmp_path: Path) -> None:
    content, wide = made(top_k=2), made(top_k=3)
    content = replace(content, train=wide.train, train_record=wide.train_record)
    run = imported(tmp_path / "run", content)
    assert analyze_run(run)["pairs"]["rollout~trainer"]["routing"] is None
    assert errors(run) == []


def test_a_sequence_whose_prompt_is_not_known_begins_with_its_response(tmp_path: Path) -> None:
    content = made()
    keep_T = content.tokens.is_response_T
    tokens = rows_of(content.tokens, keep_T)
    tokens = replace(tokens, position_T=tokens.position_T - 4)
    sides = [
        Capture(**{name: array[keep_T] for name, array in side.arrays().items()})
        for side in (content.infer, content.train)
    ]
    run = imported(tmp_path / "run", replace(content, tokens=tokens, infer=sides[0], train=sides[1]))
    block = next(run.pair("rollout", "trainer").blocks())
    assert block.expert_ids_infer_TLK is not None
    is_first_T = block.position_T == 0
    assert (block.expert_ids_infer_TLK[is_first_T] == -1).all()  # nothing that is known of routed the first token
    assert (block.expert_ids_infer_TLK[~is_first_T] >= 0).all()
    rows = np.flatnonzero(tokens.position_T[: 4 * 8] > 0) - 1
    ids_TLK = sides[0].expert_ids_TLK
    assert ids_TLK is not None
    np.testing.assert_array_equal(block.expert_ids_infer_TLK[~is_first_T], ids_TLK[rows])
    summary = analyze_run(run)
    assert summary["pairs"]["rollout~trainer"]["n_tokens"] == keep_T.sum()
    assert errors(run) == []


def test_an_arm_that_another_arm_says_nothing_of_is_compared_across(tmp_path: Path) -> None:
    """A second rollout arm, of a name that says nothing: paired with train because of its role."""
    content = made()
    run = imported(tmp_path / "run", content)
    writer = RunWriter(run)
    fp8 = run.arm("rollout").model_copy(
        update={"name": "x", "variant_of": "rollout", "change": "checkpoint", "no_checkpoint": "fp8, not named"}
    )
    writer.begin_arm(fp8)
    for shard in run.shards:
        writer.write_capture("x", shard, run.tokens(shard), run.capture("rollout", shard), {}, {})
    pairs = analyze_run(run)["pairs"]
    assert {"rollout~trainer", "x~trainer", "x~rollout"} == {*pairs}
    assert pairs["x~rollout"]["logp"]["abs_logp_diff"]["max"] == 0


@st.composite
def token_tables(draw: st.DrawFn) -> TokenRows:
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    n = sum(lengths)
    position_T = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    begins = draw(st.integers(0, 3))
    is_response_T = position_T >= begins
    some = draw(hnp.arrays(bool, n))
    numbers = hnp.arrays(np.float64, n, elements=st.floats(allow_nan=True, width=64))
    versions = st.lists(st.none() | st.text(max_size=3), min_size=n, max_size=n)
    known = draw(versions)
    whole = {
        "is_trained_T": is_response_T & some,
        "turn_T": draw(hnp.arrays(np.int32, n, elements=st.integers(-1, 9))),
        "weight_version_T": np.array([*known, None], dtype=object)[:n],
        "advantage_T": draw(numbers),
        "reward_T": draw(numbers),
    }
    return TokenRows(
        seq_id_T=np.repeat(np.arange(len(lengths)), lengths).astype(np.int64),
        prompt_id_T=np.repeat(np.arange(len(lengths)), lengths).astype(np.int64),
        sample_index_T=np.zeros(n, np.int32),
        position_T=position_T,
        token_id_T=draw(hnp.arrays(np.int64, n, elements=st.integers(-1, 2**31))),
        is_response_T=is_response_T,
        **{name: array for name, array in whole.items() if draw(st.booleans())},
    )


def test_a_router_without_zero_experts_is_written_as_before() -> None:
    """Bug: ``n_zero_experts`` was always written, so earlier checkouts of schema 2 could not read new runs."""
    plain = Router(decoder_layer=0, n_experts=8, top_k=2)
    assert set(plain.content()) == {"decoder_layer", "n_experts", "top_k", "spec", "proof"}
    zero = Router(decoder_layer=0, n_experts=12, top_k=2, n_zero_experts=4)
    checkpoint = checkpoint_of(layers=(0,)).content()
    assert "n_zero_experts" not in checkpoint["routers"][0]
    for router in (plain, zero):
        assert Router.model_validate_json(router.model_dump_json()) == router
    assert zero.content()["n_zero_experts"] == 4


@given(token_tables())
def test_a_token_table_comes_back_bit_for_bit_whatever_is_not_known(tokens: TokenRows) -> None:
    back = decode_tokens(encode_tokens(tokens), "here")
    for name, array in vars(tokens).items():
        found = getattr(back, name)
        if name == "is_trained_T":
            np.testing.assert_array_equal(found, tokens.is_scored_T)
        elif array is None:
            assert found is None
        elif found is None:  # known of no token: as good as not known
            assert _is_absent(name.removesuffix("_T"), array).all()
        else:
            np.testing.assert_array_equal(found, array)
            assert found.dtype == array.dtype


def test_new_options_are_taken_while_nothing_is_captured_and_then_refused_by_name(tmp_path: Path) -> None:
    """Bug: a typo in --max-tokens before anything was captured needed --force, whose warning then sounded like loss."""
    prompts, checkpoint = encode_prompts([[1], [2]], None), checkpoint_of((0,))
    run = new_run(tmp_path / "run", prompts, 2, 1, checkpoint, configuration={"max_tokens": 5})
    writer = RunWriter(run)
    writer.begin_arm(arm_of(run, "infer"))
    writer.begin_arm(made_otherwise(arm_of(run, "infer"), configuration={"dtype": "float32"}))  # no shard yet
    again = new_run(tmp_path / "run", prompts, 2, 1, checkpoint, configuration={"max_tokens": 6})
    assert again.record.configuration == {"max_tokens": 6}
    assert again.arms() == []
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    writer = RunWriter(again)
    writer.begin_arm(arm_of(again, "infer", arrays=arrays_of("ids", is_routed=False, has_entropy=False), routers=()))
    tokens = TokenRows(*(np.array(column) for column in ([0, 0], [0, 0], [0, 0], [0, 1], [1, 2], [False, True])))
    writer.write_capture("infer", again.shards[0], tokens, Capture(np.array([np.nan, -1], np.float32)), {}, {})
    with pytest.raises(RunConflictError, match="max_tokens: 6 there, 7 given"):
        new_run(tmp_path / "run", prompts, 2, 1, checkpoint, configuration={"max_tokens": 7})
    with pytest.raises(RunConflictError, match="dtype: 'bfloat16' there, 'float32' given"):
        writer.begin_arm(made_otherwise(again.arm("infer"), configuration={"dtype": "float32"}))
    other = checkpoint_of((0,), 16, source="models/other")
    asked = {"max_tokens": 6, "weights_sha256": other.weights_sha256}
    with pytest.raises(RunConflictError, match="checkpoint: models/tiny .* there, models/other .* given"):
        new_run(tmp_path / "run", prompts, 2, 1, other, configuration=asked)


def test_a_series_is_a_folder_of_runs_that_know_their_step(tmp_path: Path) -> None:
    series = create_series(tmp_path / "series", "0", "slime dump")
    for step in (40, 80):
        imported(series.run_path(step), made(), step=step)
    found = open_series(tmp_path / "series")
    assert (found.steps, [run.record.step for run in found.runs()]) == ([40, 80], [40, 80])
    trend = measure_trend([found.path], None, None).source
    assert sorted(set(trend.trend["step"])) == [40, 80]
    assert trend.step_origin == "run.json"
    with pytest.raises(RunConflictError, match="is a series of slime dump"):
        create_series(tmp_path / "series", "0", "verl dump")
    with pytest.raises(RunError, match="not empty and holds no series.json"):
        create_series(tmp_path, "0")
    found.run_path(40).rename(found.run_path(41))
    with pytest.raises(RunError, match="is of step 40, its folder says 41"):
        list(open_series(tmp_path / "series").runs())


def test_a_series_may_be_a_table_of_steps_alone(tmp_path: Path) -> None:
    import io

    import pandas as pd

    sink = io.BytesIO()
    frame = pd.DataFrame({"step": range(10), "kl_infer_train_k3": np.linspace(1e-3, 2e-3, 10)})
    frame.to_parquet(sink)
    series = create_series(tmp_path / "series", "0", "logged", sink.getvalue())
    assert len(measure_trend([series.path], None, None).source.trend) == 10
    (series.path / "steps.parquet").write_bytes(b"changed")
    with pytest.raises(RunError, match="is damaged"):
        measure_trend([series.path], None, None)


def test_probes_partials_and_diagnosis_have_a_place(tmp_path: Path) -> None:
    run = imported(tmp_path / "run", made())
    for folder in ("arms/rollout/probes", "partials", "diagnosis"):
        (run.path / folder).mkdir(parents=True)
        (run.path / folder / "layer-0.safetensors").write_bytes(b"probe")
    assert check_run(run) == []
