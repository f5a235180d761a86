"""Levels of the log-ratio: constant offsets, changes inside sequences, estimates that their own sample cannot carry."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_hygiene_logged import findings_of, sampled, serious, table

from moediag.cli.main import main
from moediag.hygiene.foreign import check_file
from moediag.hygiene.levels import OFFSET_SPREADS, change_point, not_estimable
from moediag.results.trend import measure_trend


def noisy(seed: int, shape: tuple[int, int] = (32, 320), noise: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    return sampled(seed, shape, noise)


@pytest.mark.parametrize("side", [0, 1])
def test_a_constant_offset_is_named_whichever_side_it_is_on(side: int) -> None:
    sides = list(noisy(0))
    sides[side] = sides[side] - 0.1
    mean, spread = float((sides[0] - sides[1]).mean()), float((sides[0] - sides[1]).std())
    assert abs(mean) > 2 * OFFSET_SPREADS * spread
    (found,) = [one for one in findings_of(table(*sides)) if one.level != "note"]
    assert found.rule == "constant-offset"
    assert f"is {mean:.4g} nat on average with a standard deviation of {spread:.2g}" in found.message


def test_an_offset_below_the_spread_is_the_mean_ratio_s_to_tell() -> None:
    """An offset of one standard deviation is not the same in every token."""
    train, infer = noisy(1)
    assert serious(findings_of(table(train - float((train - infer).std()), infer))) == ["D09-mean-ratio"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("noise", [0.002, 0.05, 0.3])
def test_honest_noise_of_any_size_is_no_offset_and_no_change(seed: int, noise: float) -> None:
    assert serious(findings_of(table(*noisy(seed, noise=noise)))) == []


def updated_in_the_middle(seed: int, factor: float, at: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Noise of the logits that is ``factor`` times as large from token ``at`` on: an older weight version."""
    train, infer = noisy(seed, noise=0.02)
    wild, also = noisy(seed, noise=0.02 * factor)
    late = np.arange(train.shape[1]) >= at
    assert np.array_equal(infer, also)
    return np.where(late, wild, train), infer


def test_a_change_of_weights_inside_sequences_is_named_with_its_place() -> None:
    found = [one for one in findings_of(table(*updated_in_the_middle(0, 8))) if one.level != "note"]
    assert [one.rule for one in found] == ["regime-change"]
    assert found[0].n is not None
    assert found[0].n > 20
    assert all(abs(place.position - 120) < 24 for place in found[0].places)


def test_a_change_in_one_sequence_of_many_is_named_too() -> None:
    train, infer = noisy(0, noise=0.02)
    changed = updated_in_the_middle(0, 12)[0]
    train[7] = changed[7]
    found = [one for one in findings_of(table(train, infer)) if one.rule == "regime-change"]
    assert [place.seq_id for place in found[0].places] == [7]


def test_hard_text_after_easy_text_is_no_change_of_regime() -> None:
    """The level of abs(logp_diff) itself changes fiftyfold: tokens are near certain in the first half."""
    rng = np.random.default_rng(0)
    easy = np.arange(400) < 200
    p = np.where(easy, rng.uniform(0.9, 0.98, (32, 400)), rng.uniform(0.02, 0.5, (32, 400)))
    infer = np.log(p)
    train = infer + 0.1 * (1 - p) * rng.normal(size=p.shape)
    size = np.abs(train - infer)
    assert size[:, 200:].mean() > 9 * size[:, :200].mean()
    assert "regime-change" not in serious(findings_of(table(train, infer)))


@pytest.mark.parametrize("seed", range(4))
def test_levels_that_stay_for_a_while_are_no_change_of_regime(seed: int) -> None:
    """Levels more alike over neighbours (0.17 at lag 1, 0.04 at lag 8) than on any of 395 captured pairs, where the
    median is 0: an autoregressive log-level."""
    rng = np.random.default_rng(seed)
    _, infer = noisy(seed, (64, 400))
    log_level = np.zeros(infer.shape)
    for i in range(1, infer.shape[1]):
        log_level[:, i] = 0.8 * log_level[:, i - 1] + 0.4 * rng.normal(size=len(infer))
    train = infer + 0.03 * np.exp(log_level) * -np.expm1(infer) * rng.normal(size=infer.shape)
    assert "regime-change" not in serious(findings_of(table(train, infer)))


def test_chance_shows_a_change_no_more_often_than_its_bound() -> None:
    """2,000 sequences of noise: the share below a chance of 1 % and of 10 % is at most that."""
    rng = np.random.default_rng(0)
    chances = np.array([change_point(rng.exponential(size=250))[1] for _ in range(2000)])
    assert (chances < 0.01).mean() <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / 2000)
    assert (chances < 0.1).mean() <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 2000)


@given(st.integers(0, 2**31), st.integers(192, 400))
def test_the_place_of_a_change_is_that_of_a_plain_loop(seed: int, n: int) -> None:
    level = np.random.default_rng(seed).standard_t(3, n) ** 2
    median, sums, total = np.median(level), [], 0.0
    mean_side = sum(float(x > median) - float(x < median) for x in level) / 2 / n
    for x in level:
        total += (float(x > median) - float(x < median)) / 2 - mean_side
        sums.append(abs(total))
    at, chance = change_point(level)
    assert sums[at - 1] == pytest.approx(max(sums[:-1]))
    assert 0 <= chance <= 1


@pytest.mark.parametrize("tail", [1.2, 2.0, math.inf])
@pytest.mark.parametrize("growth", [1.0, 5.0, 10.0])
def test_a_bug_found_a_level_that_rises_slowly_is_no_change_of_regime(growth: float, tail: float) -> None:
    """Levels that grew fivefold over 400 tokens were called a sharp change in one table of twenty: the sums pass a slow
    rise in the end, and one large value beside the place gave the ratio."""
    rng = np.random.default_rng(int(growth))
    infer = -rng.exponential(size=(640, 400))
    size = rng.normal(size=infer.shape) if math.isinf(tail) else rng.standard_t(tail, infer.shape)
    rise = 1 + (growth - 1) * np.arange(400) / 400
    train = np.minimum(infer + 0.05 * rise * size * -np.expm1(infer), 0.0)
    assert "regime-change" not in [one.rule for one in findings_of(table(train, infer))]


def versions_of(shape: tuple[int, ...], at: int) -> np.ndarray:
    return np.where(np.arange(shape[1]) < at, "4", "5")[None].repeat(shape[0], axis=0).astype(object)


def test_weights_that_change_inside_sequences_are_counted_and_placed(tmp_path: Path) -> None:
    """A rollout resumed after a weight update (verl issue 6029): what stands on either side of the seam is of two
    models, and nothing said so."""
    train, infer = noisy(0, (12, 60))
    version = versions_of(train.shape, 40)
    version[:6] = "5"
    version[:, -1] = None
    found = findings_of(table(train, infer), weight_version_T=version.ravel())
    assert [(one.rule, one.level) for one in found] == [("mixed-versions", "note")]
    assert (found[0].n, found[0].n_of) == (6 * 40, 12 * 59)
    assert [(place.seq_id, place.position) for place in found[0].places] == [(i, 40) for i in range(6, 11)]
    assert "in 6 of 12 sequences weights change, at 6 places (version 4 to 5 at the first)" in found[0].message
    frame = table(train, infer).assign(weight_version=version.ravel())
    frame.to_parquet(tmp_path / "t.parquet")
    assert [one.message for one in check_file(tmp_path / "t.parquet").findings] == [found[0].message]


@pytest.mark.parametrize("factor", [1 / 4, 1.0, 4.0])
def test_segments_of_earlier_weights_that_differ_more_or_less_are_a_warning(factor: float) -> None:
    train, infer = noisy(0, (32, 120), noise=0.05)
    other, _ = noisy(0, (32, 120), noise=0.05 * factor)
    train = np.where(np.arange(120) < 50, other, train)
    found = findings_of(table(train, infer), weight_version_T=versions_of(train.shape, 50).ravel())
    if factor == 1:
        assert [one.rule for one in found] == ["mixed-versions"]
        return
    assert serious(found) == ["stale-segments"]
    (message,) = [one.message for one in found if one.rule == "stale-segments"]
    uncertain, early = infer < math.log(0.99), np.broadcast_to(np.arange(120) < 50, infer.shape)
    size = np.abs(train.astype(np.float32).astype(float) - infer.astype(np.float32).astype(float))
    level = size / -np.expm1(infer)
    ratio = level[uncertain & early].mean() / level[uncertain & ~early].mean()
    means = [f"{size[uncertain & part].mean():.3g} nat" for part in (early, ~early)]
    assert all(mean in message for mean in means)
    assert f"{ratio:.3g} times as much" in message


def of_a_healthy_run(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of a healthy DeepSeek-V4 run as published (verl, issue 7242): d = -0.0045 + N(0, 0.1), 64 x 240."""
    rng = np.random.default_rng(seed)
    infer = -rng.exponential(1.0, (64, 240)) - 0.5
    return infer - 0.0045 + 0.1 * rng.normal(size=infer.shape), infer


def test_a_chi2_of_products_below_0_is_not_estimable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: chi2_seq = -0.8811 was printed like any number; no chi2 is below 0."""
    train, infer = of_a_healthy_run()
    log_ratio = (train - infer).sum(axis=1) - 2.0
    train = train - 2.0 / 240  # so that this sample of 64 lacks what would carry it
    rows = np.repeat(np.arange(64), 240)
    (found,) = not_estimable(train.ravel(), infer.ravel(), rows, "infer~train")
    chi2 = sum(math.exp(2 * x) for x in log_ratio) / 64 - 1
    ess = sum(math.exp(x) for x in log_ratio) ** 2 / sum(math.exp(2 * x) for x in log_ratio)
    assert chi2 < 0
    assert f"is {chi2:.4g} (at most -0." in found.message
    assert f"effective sample size of {ess:.1f}" in found.message
    path = tmp_path / "log.parquet"
    table(train, infer).to_parquet(path)
    assert main(["simulate", str(path), "--method", "icepop"]) == 0
    assert "note: not-estimable: infer~train: chi2 of the sequences' ratios is" in capsys.readouterr().out


def test_an_estimable_chi2_is_quiet() -> None:
    train, infer = noisy(0)
    assert not not_estimable(train.ravel(), infer.ravel(), np.repeat(np.arange(32), 320), "x")
    assert not not_estimable([], [], np.zeros(0, int), "x")


def test_trend_says_that_a_logged_chi2_is_not_estimable(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    pd.DataFrame({"step": [0, 1], "chi2_seq": [0.2, -0.8811]}).to_csv(path, index=False)
    (found,) = measure_trend([path], None, None).findings
    assert (found.rule, found.level, found.where) == ("not-estimable", "note", "chi2_sequence")
    assert "-0.8811 at step 1, below 0 at 1 of 2 steps: the mean of squared ratios is 0.119 there" in found.message


def test_simulate_says_that_the_mean_ratio_is_not_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: 0.9947 [0.9934, 0.9959] over 15,360 tokens, the cheapest check there is, went without a word."""
    train, infer = of_a_healthy_run()
    path = tmp_path / "log.parquet"
    table(train - 0.0055, infer).to_parquet(path)
    assert main(["simulate", str(path), "--method", "icepop"]) == 0
    assert capsys.readouterr().out.startswith("warning: D09-mean-ratio: infer~train: mean of train's over infer's")


def two_columns(path: Path, train: np.ndarray, infer: np.ndarray) -> Path:
    pd.DataFrame({"logp_train": train.ravel(), "logp_infer": infer.ravel()}).to_parquet(path)
    return path


def test_two_columns_and_nothing_else_are_one_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a table of two log-probabilities per token was refused for want of sequences that nothing needed."""
    path = two_columns(tmp_path / "two.parquet", *noisy(0))
    assert main(["validate", str(path)]) == 0
    out = capsys.readouterr().out
    assert "note: no-sequences: infer~train: neither seq_id nor position: rows are one cluster" in out
    assert main(["simulate", str(path), "--method", "icepop:alpha=0.5,beta=5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n_scored_tokens"], found["n_scored_prompts"]) == (32 * 320, 1)
    assert any("there is no interval" in note for note in found["notes"])
    (row,) = [row for row in found["frames"]["correction_statistics"] if row["correction"].startswith("icepop")]
    assert row["masked_share"] is not None
    assert row["masked_share_ci_low"] is row["masked_share_ci_high"] is None


def test_two_columns_show_faults_that_need_no_order_and_no_others(tmp_path: Path) -> None:
    train, infer = noisy(0)
    for sides, expected in (
        ((train - 0.1, infer), ["constant-offset"]),
        ((train / 0.7, infer), ["D10-temperature"]),
        ((np.roll(train.ravel(), 1), infer), ["D09-mean-ratio"]),  # that it is a shift needs an order
        (updated_in_the_middle(0, 8), []),
    ):
        found = check_file(two_columns(tmp_path / "two.parquet", *sides)).findings
        assert [one.rule for one in found if one.level != "note"] == expected


def test_one_of_the_two_that_name_a_place_is_not_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.parquet"
    table(*noisy(0)).drop(columns="position").to_parquet(path)
    assert main(["validate", str(path)]) == 1
    assert "lacks position" in capsys.readouterr().err
    two_columns(path, *noisy(0))
    assert main(["import", "table", str(path), "-o", str(tmp_path / "run")]) == 1
    assert "lacks seq_id and position, which a run needs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
