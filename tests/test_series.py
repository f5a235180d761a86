"""The series by step: the numbers are those of the tokens, however the table is kept."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engine import make_scripted_run
from test_run_vocabulary import make_run as make_vocabulary_run

from moediag.analysis.declarations import TOKENS
from moediag.analysis.logprobs import logp_metrics
from moediag.analysis.series import (
    KL_METRICS,
    MARKS,
    MASKED,
    TREND_BY_STEP,
    delta_metric,
    metric_rows,
    standard_error_of,
    step_metrics,
    trend_of,
    trend_recurrence,
)
from moediag.analysis.vocabulary import exact_divergences
from moediag.errors import DumpError
from moediag.hygiene.series import Schedule, check_series
from moediag.results.trend import Given, measure_trend, outcome_lines
from moediag.results.trend_sources import read_trend, steps_of
from moediag.run.files import read_sealed, write_sealed


def make_tokens(seed=0, n_prompts=12, scale=0.2):
    """Response tokens of two samples per prompt."""
    rng = np.random.default_rng(seed)
    length = rng.integers(5, 20, 2 * n_prompts)
    seq_id = np.repeat(np.arange(2 * n_prompts), length)
    infer = -rng.exponential(1.0, len(seq_id)) - 1.0
    train = np.minimum(infer + scale * rng.standard_t(3, len(seq_id)), 0.0)
    position = np.concatenate([np.arange(n) for n in length])
    return pd.DataFrame(
        {"seq_id": seq_id, "prompt_id": seq_id // 2, "position": position, "logp_train": train, "logp_infer": infer}
    )


def token_table(steps=(0, 10, 20)):
    return pd.concat([make_tokens(step).assign(step=step) for step in steps], ignore_index=True)


def silent(*_):
    pass


def value_of(trend, metric, step=0):
    rows = metric_rows(trend, metric)
    return float(rows.loc[rows["step"] == step, "value"].iloc[0])


def test_the_numbers_of_a_step_are_those_of_a_plain_loop():
    tokens = make_tokens()
    trend = step_metrics(0, "here", tokens)
    diffs = [t - i for t, i in zip(tokens["logp_train"], tokens["logp_infer"], strict=True)]
    n = len(diffs)
    assert value_of(trend, "abs_logp_diff.mean") == pytest.approx(sum(abs(d) for d in diffs) / n)
    assert value_of(trend, "kl_infer_train_k1") == pytest.approx(-sum(diffs) / n)
    assert value_of(trend, "kl_infer_train_k3") == pytest.approx(sum(math.exp(d) - 1 - d for d in diffs) / n)
    assert value_of(trend, "extreme_share_2") == sum(max(math.exp(d), math.exp(-d)) > 2 for d in diffs) / n
    assert value_of(trend, MASKED) == sum(not 0.5 <= math.exp(d) <= 5 for d in diffs) / n
    assert set(trend["n_tokens"]) == {n}
    assert set(trend["n_prompts"]) == {12}
    np.testing.assert_allclose(trend["se"] * 2 * 1.959964, trend["value_ci_high"] - trend["value_ci_low"], rtol=1e-6)


def test_a_step_says_what_the_report_of_its_run_says():
    """Same values and intervals as frame logp_metrics of the same tokens."""
    tokens = make_tokens(n_prompts=70)
    frame = tokens.assign(**{c.name: 0 for c in TOKENS.columns if c.name not in tokens})
    there = logp_metrics(TOKENS.validate(frame)).set_index("metric")
    float32 = {name: tokens[name].astype(np.float32) for name in ("logp_train", "logp_infer")}
    trend = step_metrics(0, "here", tokens.assign(**float32)).set_index("metric")
    for metric in set(trend.index) - {MASKED}:
        ours = trend.loc[metric, ["value", "value_ci_low", "value_ci_high"]].to_numpy(float)
        theirs = there.loc[metric, ["value", "ci_low", "ci_high"]].to_numpy(float)
        np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_the_order_of_rows_changes_nothing(seed):
    tokens = make_tokens(1)
    shuffled = tokens.sample(frac=1.0, random_state=seed)
    one, other = step_metrics(3, "x", tokens), step_metrics(3, "x", shuffled)
    numbers = ["value", "value_ci_low", "value_ci_high"]
    np.testing.assert_allclose(one[numbers], other[numbers], rtol=1e-9)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_the_kind_of_file_changes_no_number(tmp_path, kind):
    table = token_table()
    # a prompt row and an unscored token, which take no part
    prompt = table.iloc[:1].assign(position=-1, logp_train=np.nan, is_response=False)
    table = pd.concat([prompt, table.assign(is_response=True)], ignore_index=True)
    path = tmp_path / f"tokens.{kind}"
    write(table, path)
    source = read_trend([path], None, silent)
    expected = trend_of(step_metrics(step, path.name, make_tokens(step)) for step in (0, 10, 20))
    pd.testing.assert_frame_equal(source.trend, expected, rtol=1e-12)
    assert source.step_origin == "column step"
    assert any("are a KL only if infer sampled" in note for note in source.notes)


def write(table, path):
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_dict("records")).replace("NaN", "null"))


def test_without_prompts_every_sequence_counts_and_that_is_said(tmp_path):
    path = tmp_path / "t.parquet"
    token_table((0,)).drop(columns="prompt_id").to_parquet(path)
    source = read_trend([path], None, silent)
    assert set(source.trend["n_prompts"]) == {24}
    assert any("prompt_id" in note for note in source.notes)


def test_a_table_of_steps_keeps_its_metrics_and_errors(tmp_path):
    table = pd.DataFrame(
        {
            "step": [0, 50, 100],
            "mean_abs_logp_diff": [0.02, 0.03, 0.04],
            "k3": [1e-3, 2e-3, 4e-3],
            "k3_se": [1e-4, np.nan, 4e-4],
            "kl": [1e-3, 2e-3, np.nan],
            "kl_ci_low": [0.5e-3, 1e-3, np.nan],
            "kl_ci_high": [1.5e-3, 3e-3, np.nan],
            "reward": [0.1, 0.2, 0.3],
            "n_tokens": [100, 200, 300],
        }
    )
    path = tmp_path / "steps.csv"
    table.to_csv(path, index=False)
    source = read_trend([path], None, silent)
    trend = source.trend
    assert set(trend["metric"]) == {"abs_logp_diff.mean", "kl_infer_train_k3", "kl", "reward"}
    k3 = metric_rows(trend, "kl_infer_train_k3")
    np.testing.assert_array_equal(k3["se"], [1e-4, np.nan, 4e-4])
    np.testing.assert_allclose(k3["value_ci_high"].iloc[0], 1e-3 + 1.959964e-4, rtol=1e-6)
    kl = metric_rows(trend, "kl")
    np.testing.assert_allclose(kl["se"].iloc[1], standard_error_of(1e-3, 3e-3))
    assert k3["note"].iloc[1].startswith("the table has neither k3_se")
    assert metric_rows(trend, "reward")["unit"].iloc[0] == "as given"
    assert list(metric_rows(trend, "kl")["n_tokens"]) == [100, 200, 300]
    assert "column k3 is read as kl_infer_train_k3" in source.notes
    # kl lacks a step, so the k3 that every step has stands for delta
    assert delta_metric(trend) == "kl_infer_train_k3"
    assert delta_metric(trend, "reward") == "reward"
    with pytest.raises(DumpError, match="no metric k9"):
        delta_metric(trend, "k9")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.drop(columns="step"), "no column step"),
        (lambda t: t.drop(columns="logp_train"), "lacks logp_train"),
        (lambda t: pd.concat([t, t.iloc[[3]]]), "1 rows stand at a"),
        (lambda t: t.assign(logp_train=-t["logp_train"]), "log-probabilities are at most 0"),
        (lambda t: t.assign(is_response=False), "no response token"),
        (lambda t: t[["step"]], "no column of numbers beside step"),
        (lambda t: t[["step"]].assign(k3=1.0), "more than one row"),
        (lambda t: pd.DataFrame({"step": [0, 1], "k3": [1.0, 2.0], "k3_se": [1.0, -1.0]}), "at least 0"),
        (lambda t: pd.DataFrame({"step": [0, 7], "k3": [1.0, -0.2]}), "at least 0 by definition, found -0.2 at step 7"),
        (lambda t: pd.DataFrame({"step": [0, 1], "icepop_masked_share": [0.1, 1.2]}), "between 0 and 1"),
        (lambda t: pd.DataFrame({"step": [0, 1], "k3": [1.0, 2.0], "mismatch_kl": 1.0}), "are one metric"),
    ],
)
def test_what_no_log_holds_is_refused_in_one_line(tmp_path, change, complaint):
    path = tmp_path / "t.parquet"
    change(token_table((0,))).to_parquet(path)
    with pytest.raises(DumpError, match=complaint):
        read_trend([path], None, silent)


def test_runs_get_their_steps_from_their_names_and_their_numbers_from_their_tokens(tmp_path):
    paths = [tmp_path / f"step-{step}" for step in (50, 0)]
    runs = [make_scripted_run(path, n_prompts=8, seed=seed) for seed, path in enumerate(paths)]
    source = read_trend(paths, None, silent)
    assert source.step_origin.startswith("the trailing number")
    assert list(dict.fromkeys(source.trend["step"])) == [0, 50]
    assert set(source.trend.loc[source.trend["step"] == 50, "source"]) == {"step-50"}
    logp_train, logp_infer = (
        np.concatenate([getattr(block, f"logp_{side}_T") for block in runs[0].pair("train", "infer").blocks()])
        for side in ("train", "infer")
    )
    expected = np.abs(logp_train.astype(float) - logp_infer).mean()
    assert value_of(source.trend, "abs_logp_diff.mean", 50) == pytest.approx(expected)
    assert read_trend(paths, [1, 2], silent).step_origin == "--steps"
    with pytest.raises(DumpError, match="names 1 steps, found 2 runs"):
        read_trend(paths, [1], silent)


def test_a_run_that_keeps_whole_distributions_gives_the_exact_kl(tmp_path):
    run = make_vocabulary_run(tmp_path / "step-7", n_prompts=9)
    trend = read_trend([run.path], None, silent).trend
    exact = exact_divergences(run).measures.set_index("measure").loc["kl_infer_train_exact"]
    row = metric_rows(trend, "kl_infer_train_exact").iloc[0]
    assert (row["step"], row["value"], row["n_tokens"]) == (7, exact["value"], exact["n_tokens"])
    assert delta_metric(trend) == "kl_infer_train_exact"


def test_text_that_infer_did_not_sample_freely_has_no_k3_that_stands_for_the_kl(tmp_path):
    run = make_scripted_run(tmp_path / "step-1", n_prompts=8)
    manifest = read_sealed(run.path / "run.json")
    write_sealed(run.path / "run.json", {**manifest, "sampling": {**manifest["sampling"], "temperature": 0.7}})
    found = measure_trend([run.path], None, None)
    assert not found.source.is_kl
    assert "step-1: sampling not neutral, so k1 and k3 are statistics and no KL" in found.source.notes
    assert found.delta is None
    assert "no KL" in found.recurrence.reason
    assert "k3 statistic (no KL)" in "\n".join(outcome_lines(found))
    assert measure_trend([run.path], None, "kl_infer_train_k3").delta == "kl_infer_train_k3"


def test_steps_are_the_order_where_names_hold_no_numbers_or_one_twice():
    assert steps_of(["b", "a"], None)[0] == [0, 1]
    assert steps_of(["x1", "y1"], None)[0] == [0, 1]
    assert steps_of(["x10", "y2"], None)[0] == [10, 2]


def test_a_step_twice_is_refused():
    with pytest.raises(DumpError, match="step 3 is there more than once"):
        trend_of([step_metrics(3, "a", make_tokens()), step_metrics(3, "b", make_tokens(1))])


def test_without_a_kl_nothing_is_fitted():
    trend = step_metrics(0, "x", make_tokens())
    found = trend_recurrence(trend[trend["metric"] == MASKED], None)
    assert found.outcome == "cannot tell"
    assert "no KL" in found.reason


def steps_table(tmp_path, **columns):
    path = tmp_path / "steps.csv"
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


def test_k1_may_be_negative_and_k3_only_by_rounding(tmp_path):
    """Bug: a negative k3, which no tokens have, was taken; one of float32 rounding is set to 0, with a note."""
    source = read_trend([steps_table(tmp_path, step=[0, 1], k1=[-0.1, 0.1], k3=[-1e-7, 1e-3])], None, silent)
    assert value_of(source.trend, "kl_infer_train_k1") == -0.1
    assert value_of(source.trend, "kl_infer_train_k3") == 0.0
    assert any("k3: 1 values beyond their range by rounding" in note for note in source.notes)


def test_tokens_that_a_side_calls_impossible_are_left_out_and_counted(tmp_path):
    """Bug: -inf on one side or both left k3 and F(2) without a word."""
    table = token_table()
    table.loc[[0, 1], "logp_train"] = -np.inf
    table.loc[[1, 2], "logp_infer"] = -np.inf
    table.loc[3, "logp_infer"] = np.nan
    path = tmp_path / "tokens.parquet"
    table.to_parquet(path)
    source = read_trend([path], None, silent)
    assert source.notes[0].startswith(
        f"D31-impossible-logp: 3 of {len(table):,} tokens have a log-probability of -inf (at 1 of 3"
    )
    without = step_metrics(0, path.name, table[table["step"] == 0].drop(index=[0, 1, 2, 3]))
    assert value_of(source.trend, "kl_infer_train_k3") == value_of(without, "kl_infer_train_k3")


def test_an_infinite_metric_is_a_warning(tmp_path):
    """Bug: a metric that is infinite at one step vanished from every sentence."""
    found = measure_trend([steps_table(tmp_path, step=range(10), k3=[0.1] * 9 + [np.inf], k3_se=0.01)], None, None)
    expected = "warning: infinite-metric: kl_infer_train_k3: infinite at 1 of 10 steps, first at step 9"
    assert outcome_lines(found)[0] == found.findings[0].line() == expected
    assert "agree" not in found.recurrence.reason


@pytest.mark.parametrize("column", ["mean_abs_logp_diff", "k1", "k3"])
@pytest.mark.parametrize("steps", [(0, 2), (0, 1, 2)])
def test_a_collapse_after_two_steps_is_no_rounding(tmp_path, column, steps):
    """Bug: .0175, then 66.5 two steps later, was only "cannot tell"."""
    values = [0.0175, 0.9, 66.5] if len(steps) == 3 else [0.0175, 66.5]
    found = measure_trend([steps_table(tmp_path, step=steps, **{column: values})], None, None)
    assert [one.rule for one in found.findings] == ["D25-first-update"]
    lines = " ".join(outcome_lines(found)[:2])
    for words in ("no rounding does this", "66.5", "after 0.0175 at step 0", "weight sync (transfer dtype", "lr = 0"):
        assert words in lines


def test_a_mismatch_that_is_beyond_rounding_from_the_first_step_is_not_put_down_to_an_update(tmp_path):
    found = measure_trend([steps_table(tmp_path, step=[0, 1], mean_abs_logp_diff=[1.33, 60.0])], None, None)
    assert [one.rule for one in found.findings] == ["beyond-rounding"]
    lines = " ".join(outcome_lines(found)[:2])
    assert "1.33 nat at step 0 and 60 at step 1, from the first on: no rounding does this" in lines
    assert "weight sync" not in lines


def test_a_start_far_above_what_is_published_is_said_with_its_source(tmp_path):
    """Bug: a KL of 0.05 at the first step, where below 0.01 is recommended, passed without a word."""
    found = measure_trend([steps_table(tmp_path, step=[0, 20], kl_sample_train_v1=[0.05, 0.1])], None, None)
    assert [(one.rule, one.where) for one in found.findings] == [("start-level", "kl_infer_train_k1")]
    assert found.findings[0].message.startswith("starts at 0.05 (step 0), 5 times 0.01 (Tinker's documentation")
    assert "no drift of training" in found.findings[0].message


@pytest.mark.parametrize(
    "columns",
    [
        {"mean_abs_logp_diff": [0.019, 0.02, 0.05]},
        {"k3": [1.5e-3, 9e-3, 2e-2]},
        {"k3": [1e-6, 1e-5, 1e-3]},  # tenfold and more, but still below what healthy training starts from
        {"k3": [0.012, 0.15, 0.012], "k3_se": [0.01, 0.1, 0.01]},  # one step carried by a token, as its error says
        {"kl_ref": [0.0, 5.0, 60.0]},
    ],
)
def test_what_others_publish_as_healthy_raises_no_warning(tmp_path, columns):
    assert not measure_trend([steps_table(tmp_path, step=[0, 1, 2], **columns)], None, None).findings


def by_step(values, **columns):
    """A table of steps whose metric is mean abs logp diff."""
    return dict(step=range(len(values)), mean_abs_logp_diff=values, **columns)


def rules(path, given=None):
    return [one.rule for one in measure_trend([path], None, None, given=given or Given()).findings]


def test_the_same_collapse_at_learning_rate_0_is_not_the_learning(tmp_path):
    """The two-way sharded run of the report: 0.0175, then 66.5, with lr = 0 alike; 0.017 unsharded stays quiet."""
    collapse = by_step([0.0175, 0.0175, 66.5])
    assert rules(steps_table(tmp_path, **collapse, lr=[0.0] * 3)) == ["D27-lr-zero", "D25-first-update"]
    assert rules(steps_table(tmp_path, **collapse, lr=[0.0, 1e-6, 1e-6])) == ["D25-first-update"]
    assert rules(steps_table(tmp_path, **collapse), Given(lr=0.0)) == ["D27-lr-zero", "D25-first-update"]
    assert rules(steps_table(tmp_path, **by_step([0.017, 0.0171, 0.0169]), lr=[0.0] * 3)) == []


def test_a_slow_growth_at_learning_rate_0_is_the_engine_s_state(tmp_path):
    grows = [0.015 * 1.05**i for i in range(12)]
    assert rules(steps_table(tmp_path, **by_step(grows), lr=[0.0] * 12)) == ["D27-lr-zero"]
    assert rules(steps_table(tmp_path, **by_step(grows), lr=[1e-6] * 12)) == []
    level = 0.015 * np.exp(0.05 * np.random.default_rng(0).normal(size=12))
    assert rules(steps_table(tmp_path, **by_step(level), lr=[0.0] * 12)) == []


def test_growth_that_restarts_take_back_is_the_engine_s_state(tmp_path):
    """A stale cache: 5 % a step, back to the start at each of three restarts; without marks nothing is concluded."""
    noise = np.exp(0.01 * np.random.default_rng(0).normal(size=24))
    values, restart = 0.015 * 1.05 ** (np.arange(24) % 6) * noise, [int(i % 6 == 0 and i > 0) for i in range(24)]
    assert rules(steps_table(tmp_path, **by_step(values), restart=restart)) == ["D26-grows-resets"]
    assert rules(steps_table(tmp_path, **by_step(values)), Given(restarts=frozenset({6, 12, 18}))) == [
        "D26-grows-resets"
    ]
    assert rules(steps_table(tmp_path, **by_step(values))) == []
    grows_on = 0.015 * 1.02 ** np.arange(24) * noise
    assert rules(steps_table(tmp_path, **by_step(grows_on), restart=restart)) == []


@pytest.mark.filterwarnings("error")
def test_a_share_that_is_0_at_neighbouring_steps_is_quiet_over_restarts(tmp_path):
    """Bug: numpy's "invalid value encountered in subtract" reached the terminal: the logarithm of 0, minus itself."""
    share = [0.001, 0.0, 0.0, 0.001, 0.0, 0.0, 0.001, 0.001]
    table = steps_table(tmp_path, **by_step([0.015] * 8), extreme_share_2=share, restart=[0, 0, 0, 0, 1, 0, 0, 0])
    assert "D26-grows-resets" not in rules(table)


def test_a_level_that_only_fluctuates_is_quiet_at_learning_rate_0_and_over_restarts():
    """200 series of noise alone: at 1 in 1,000 each, none is expected of either rule."""
    rng, fired = np.random.default_rng(0), 0
    for _ in range(200):
        n = int(rng.integers(3, 40))
        rows = {"step": range(n), "source": "x", "metric": "abs_logp_diff.mean", "n_tokens": 100, "n_prompts": 10}
        level = 0.015 * np.exp(0.2 * rng.normal(size=n))
        more = {
            "value_ci_low": np.nan,
            "value_ci_high": np.nan,
            "se": np.nan,
            "unit": "nat",
            "direction": "",
            "note": "",
        }
        trend = TREND_BY_STEP.validate(pd.DataFrame({**rows, "value": level, **more}))
        restarts = frozenset(rng.choice(np.arange(1, n), size=max(1, n // 6), replace=False).tolist())
        fired += len(check_series(trend, Schedule({}, restarts)))
        fired += len(check_series(trend, Schedule(dict.fromkeys(range(n), 0.0))))
    assert fired <= 2


def test_a_rate_or_a_restart_is_no_metric(tmp_path):
    source = read_trend([steps_table(tmp_path, **by_step([0.01, 0.011]), lr=[1e-6, 0], restart=[0, 1])], None, silent)
    assert set(source.trend["metric"]) == {"abs_logp_diff.mean"}
    assert source.schedule == Schedule({0: 1e-6, 1: 0.0}, frozenset({1}))


def test_a_table_of_tokens_of_very_many_steps_is_thinned_and_that_is_said(tmp_path, monkeypatch):
    """Bug: 100,000 steps ran without end or warning."""
    monkeypatch.setattr("moediag.results.trend_sources.MOST_TOKEN_STEPS", 3)
    path = tmp_path / "tokens.parquet"
    token_table((0, 1, 2, 3, 4, 5, 6)).to_parquet(path)
    source = read_trend([path], None, silent)
    assert list(dict.fromkeys(source.trend["step"])) == [0, 3, 6]
    assert any("3 of 7 steps are measured" in note for note in source.notes)


def test_every_mark_has_a_source_and_a_metric_that_is_there():
    metrics = set(step_metrics(0, "x", make_tokens())["metric"]) | set(KL_METRICS)
    assert all(mark.metric in metrics and mark.source for mark in MARKS)


def test_no_token_scored_is_no_number():
    empty = step_metrics(0, "x", make_tokens().assign(logp_train=np.nan))
    assert empty["value"].isna().all()
    assert set(empty["n_tokens"]) == {0}
    assert TREND_BY_STEP.validate(empty)["se"].isna().all()
