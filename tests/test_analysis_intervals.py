"""Intervals: determinism, columns at once, degenerate data, and coverage measured in small."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from moediag.statistics.intervals import (
    MIN_CLUSTERS,
    Interval,
    cluster_sums,
    jackknife_interval,
    mean_interval,
    ratio_mean_interval,
)
from moediag.statistics.quantiles import FAR_MIN_CLUSTERS, quantile_interval


def _clustered(rng: np.random.Generator, n_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    cluster_T = np.repeat(np.arange(n_clusters), rng.integers(10, 60, n_clusters))
    scale_C = np.exp(rng.normal(0, 0.5, n_clusters))
    return np.abs(scale_C[cluster_T] * rng.normal(size=len(cluster_T))), cluster_T


def test_cluster_sums_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    cluster_T, values = rng.integers(0, 5, 40), rng.normal(size=(40, 3))
    expected = [sum(values[t] for t in range(40) if cluster_T[t] == c) for c in sorted(set(cluster_T))]
    np.testing.assert_allclose(cluster_sums(values, cluster_T), expected)


@pytest.mark.parametrize("kind", ["signed", "positive", "rate"])
def test_many_columns_equal_one_by_one_and_repeat_bit_for_bit(kind: str) -> None:
    rng = np.random.default_rng(1)
    n_CM = rng.integers(5, 50, (20, 4))
    sum_CM = rng.binomial(n_CM, 0.3)
    together = ratio_mean_interval(sum_CM, n_CM, kind)  # type: ignore[arg-type]
    for column in range(4):
        alone = ratio_mean_interval(sum_CM[:, column], n_CM[:, column], kind).one()  # type: ignore[arg-type]
        assert alone.value == pytest.approx(sum_CM[:, column].sum() / n_CM[:, column].sum())
        assert (alone.low, alone.high) == pytest.approx((together.low_M[column], together.high_M[column]), rel=1e-12)
        assert alone.low < alone.value < alone.high
    again = ratio_mean_interval(sum_CM, n_CM, kind)  # type: ignore[arg-type]
    np.testing.assert_array_equal(together.low_M, again.low_M)


def test_signed_interval_negates_with_its_data() -> None:
    rng = np.random.default_rng(2)
    sums, n = rng.normal(size=30), rng.integers(5, 50, 30)
    plus, minus = ratio_mean_interval(sums, n).one(), ratio_mean_interval(-sums, n).one()
    assert (minus.value, minus.low, minus.high) == pytest.approx((-plus.value, -plus.high, -plus.low))


def _of_events(n_events: int, n_clusters: int, n_per_cluster: int = 309) -> Interval:
    """Events that stand alone in their prompts, as far as there are prompts."""
    events_C = np.bincount(np.arange(n_events) % n_clusters, minlength=n_clusters)
    return ratio_mean_interval(events_C, np.full(n_clusters, n_per_cluster), "rate").one()


@pytest.mark.parametrize("n_clusters", [8, 16, 32, 64, 256])
def test_more_events_never_make_the_rate_surer_to_be_low(n_clusters: int) -> None:
    """Bug: 0 of 19,772 tokens was shown as "0 to 5.60 %", 2 of 19,772 as "up to 0.053 %"."""
    found = [_of_events(n_events, n_clusters) for n_events in range(13)]
    assert (np.diff([one.high for one in found]) >= 0).all()
    assert all(one.high - one.low >= 0.9 * found[0].high for one in found)
    # not as sure as independent tokens would be, nor as unsure as one trial per prompt
    assert 1 - 0.025 ** (1 / (309 * n_clusters)) < found[0].high < 1 - 0.025 ** (1 / n_clusters)


def test_none_of_20000_tokens_is_told_from_a_percent() -> None:
    """Bug: without a single event of 64 prompts the upper bound was 5.60 %, whatever their length."""
    assert _of_events(0, 64).high < 0.0006


def test_bounds_at_no_event_equal_the_formula_in_plain_steps() -> None:
    """Two supposed prompts with the events that a gamma of squared CV 5 makes likely; Student's t of their freedom."""
    n_C = [40.0, 10.0, 25.0, 300.0, 80.0, 80.0, 5.0, 60.0, 100.0]
    total, square, n = sum(n_C), sum(x * x for x in n_C), len(n_C)
    exponent = math.log(40) * 5 * square / total**2
    events = min((math.exp(exponent) - 1) / exponent, square / total)
    kurtosis = (n + 2) * 2 / 2**2
    t = stats.t.ppf(0.975, 2 * (n + 2) / (kurtosis - 1))
    effect = min(events * n / (n - 1) * (t / stats.norm.ppf(0.975)) ** 2, square / total)
    found = ratio_mean_interval(np.zeros(n), n_C, "rate").one()
    assert (found.low, found.high) == pytest.approx((0.0, stats.beta.ppf(0.975, 1, total / effect)))


def test_one_trial_per_prompt_is_clopper_and_pearson() -> None:
    """Bug: 1 of 16 prompts with one trial each was taken for less than a third of that, for fear of clustering."""
    for n_events in (0, 1, 3, 8):
        found = _of_events(n_events, 16, 1)
        exact = stats.binomtest(n_events, 16).proportion_ci(0.95, "exact")
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


events_and_trials = st.lists(
    st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=8, max_size=40
)


@given(events_and_trials)
def test_a_rate_and_its_complement_have_mirrored_bounds(prompts: list[tuple[int, int]]) -> None:
    events_C, n_C = np.array(prompts, dtype=np.float64).T
    rate, rest = (ratio_mean_interval(x, n_C, "rate").one() for x in (events_C, n_C - events_C))
    assert (rest.low, rest.high) == pytest.approx((1 - rate.high, 1 - rate.low), abs=1e-9)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1


@given(events_and_trials)
@example([(0, 1)] * 4 + [(1, 1), (0, 103), (0, 114), (2, 143)])  # one prompt much longer than the others' mean
def test_no_event_is_never_surer_than_some_events(prompts: list[tuple[int, int]]) -> None:
    """Whatever the arrangement of the events and the lengths of the prompts."""
    events_C, n_C = np.array(prompts, dtype=np.float64).T
    none, some = (ratio_mean_interval(x, n_C, "rate").one() for x in (0 * events_C, events_C))
    assert some.high >= none.high
    assert some.low <= 1 - none.high


def test_a_hair_of_an_event_moves_the_bounds_by_a_hair() -> None:
    n_C = np.full(20, 150.0)
    none, hair = (ratio_mean_interval(x * np.eye(20)[0], n_C, "rate").one() for x in (0.0, 1e-6))
    assert (hair.low, hair.high) == pytest.approx((none.low, none.high), abs=1e-8)


@pytest.mark.parametrize("n_clusters", [16, 64])
@pytest.mark.parametrize("squared_cv", [0.0, 2.0])
def test_rare_events_are_covered_with_and_without_clustering(n_clusters: int, squared_cv: float) -> None:
    """From half an event per set, where most sets have none, to two dozen; prompts alike, or differing much."""
    rng, n_sets = np.random.default_rng(11), 1000
    n_C = rng.integers(50, 700, n_clusters)[:, None]
    for n_events in (0.5, 2, 5, 8, 12, 24):
        rate = n_events / n_C.sum()
        differ = rng.gamma(1 / squared_cv, squared_cv, (n_clusters, n_sets)) if squared_cv else np.ones(n_sets)
        found = ratio_mean_interval(np.minimum(rng.poisson(rate * n_C * differ), n_C), n_C, "rate")
        assert np.mean((found.low_M <= rate) & (rate <= found.high_M)) > 0.92


def test_events_that_come_by_the_sequence_are_counted_by_the_sequence() -> None:
    """No sequence dropped of 64 says no more than none of 64 trials, however many tokens they have."""
    n_C = np.full(64, 300.0)
    tokens, sequences = (ratio_mean_interval(np.zeros(64), n_C, "rate", n_per_event=n).one() for n in (1.0, 300.0))
    assert tokens.high < 0.001
    assert sequences.high == pytest.approx(1 - 0.025 ** (1 / 64))


@pytest.mark.parametrize("kind", ["signed", "positive", "rate"])
def test_share_of_the_largest_prompt(kind: str) -> None:
    """Of the sum of sizes, so that prompts of opposite sign do not hide each other; rates have none."""
    sums_C, n_C = np.array([1.0, 1, 1, 1, 1, 1, 1, 1, -12 if kind == "signed" else 12]), np.full(9, 20)
    share = ratio_mean_interval(sums_C, n_C, kind).one().largest_share  # type: ignore[arg-type]
    assert share == pytest.approx(np.nan if kind == "rate" else 0.6, nan_ok=True)


def test_equal_rates_everywhere_still_have_a_width() -> None:
    interval = ratio_mean_interval(np.full(16, 30), np.full(16, 100), "rate").one()
    assert interval.low < 0.3 < interval.high


@pytest.mark.parametrize(
    ("interval", "reason"),
    [
        (ratio_mean_interval(np.zeros(0), np.zeros(0)).one(), "no data"),
        (ratio_mean_interval(np.zeros(20), np.zeros(20), "rate").one(), "no data"),
        (ratio_mean_interval(np.arange(MIN_CLUSTERS - 1), np.ones(MIN_CLUSTERS - 1)).one(), "needs 8"),
        (ratio_mean_interval(np.full(20, 3.0), np.ones(20), "positive").one(), "no variation"),
        (ratio_mean_interval(np.full(20, 0.1) * np.arange(20), np.arange(20)).one(), "no variation"),
        (ratio_mean_interval(np.r_[np.inf, np.ones(20)], np.ones(21)).one(), "not finite"),
        (quantile_interval(np.zeros(0), np.zeros(0, int), 0.5), "no data"),
        (quantile_interval(np.zeros(50), np.arange(50), 0.5), "equal"),
        (quantile_interval(np.arange(50.0), np.arange(50) % 7, 0.5), "needs 8"),
        (quantile_interval(np.arange(100.0), np.arange(100), 0.99), "beyond the quantile"),
        (quantile_interval(np.arange(9000.0), np.arange(9000) % 63, 0.99), f"needs {FAR_MIN_CLUSTERS}"),
        (jackknife_interval(np.zeros((0, 2)), lambda s: s[..., 0], "log"), "no data"),
        (jackknife_interval(np.ones((7, 2)), lambda s: s[..., 0] / s[..., 1], "log"), "needs 8"),
        (jackknife_interval(np.ones((9, 2)), lambda s: s[..., 0] / s[..., 1], "log"), "no variation"),
        (jackknife_interval(np.ones((9, 2)), lambda s: s[..., 0] * np.nan, "linear"), "not finite"),
    ],
)
def test_no_interval_comes_with_its_reason(interval: Interval, reason: str) -> None:
    assert np.isnan(interval.low)
    assert np.isnan(interval.high)
    assert reason in interval.note


def test_a_mean_over_nothing_is_nan_with_n_0() -> None:
    interval = ratio_mean_interval(np.zeros((9, 2)), np.array([[0, 1]] * 9), "positive")
    assert np.isnan(interval.value_M[0])
    assert interval.n_clusters_M.tolist() == [0, 9]


@pytest.mark.parametrize(
    ("n_clusters", "n_tokens", "is_given"), [(40, 20_000, True), (40, 15_000, False), (9, 40_000, False)]
)
def test_p999_needs_20_exceedances_from_10_clusters(n_clusters: int, n_tokens: int, is_given: bool) -> None:
    rng = np.random.default_rng(3)
    interval = quantile_interval(rng.random(n_tokens), np.arange(n_tokens) % n_clusters, 0.999)
    assert np.isfinite(interval.value) == is_given
    assert (" above it; the tail needs" in interval.note) != is_given


def test_quantile_value_is_numpys_and_lies_inside() -> None:
    values_T, cluster_T = _clustered(np.random.default_rng(4), 40)
    for q in (0.1, 0.5, 0.9):
        interval = quantile_interval(values_T, cluster_T, q)
        assert interval.value == np.quantile(values_T, q)
        assert interval.low < interval.value < interval.high


def test_chunked_draws_do_not_change_with_many_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk or many: the same random stream, hence the same interval."""
    rng = np.random.default_rng(5)
    sums, n = rng.exponential(size=50), rng.integers(1, 9, 50)
    whole = ratio_mean_interval(sums, n, "positive").one()
    monkeypatch.setattr("moediag.statistics.resampling._CELLS_PER_CHUNK", 5_000)
    chunked = ratio_mean_interval(sums, n, "positive").one()
    assert (whole.low, whole.high) == pytest.approx((chunked.low, chunked.high), rel=1e-12)


@pytest.mark.parametrize("kind", ["signed", "positive"])
def test_mean_covers_about_95_percent(kind: str) -> None:
    """Truth: E|N(0,1)| exp(sigma^2 / 2); 0.90 leaves three standard errors at 200 data sets below 0.945."""
    rng, truth = np.random.default_rng(6), np.sqrt(2 / np.pi) * np.exp(0.125)
    intervals = [mean_interval(*_clustered(rng, 30), kind) for _ in range(200)]  # type: ignore[arg-type]
    assert np.mean([i.low <= truth <= i.high for i in intervals]) > 0.90


def test_rate_and_median_cover_about_95_percent() -> None:
    rng, hits = np.random.default_rng(7), []
    for _ in range(200):
        cluster_T = np.repeat(np.arange(30), 40)
        event_T = rng.random(1200) < rng.beta(2, 18, 30)[cluster_T]
        rate = mean_interval(event_T, cluster_T, "rate")
        centred = rng.normal(size=1200) + rng.normal(size=30)[cluster_T]
        median = quantile_interval(centred, cluster_T, 0.5)
        hits.append((rate.low <= 0.1 <= rate.high, median.low <= 0 <= median.high))
    assert (np.mean(hits, axis=0) > 0.90).all()
