"""Intervals: determinism, columns at once, degenerate data, and coverage measured in small."""

from __future__ import annotations

import numpy as np
import pytest

from moediag.analysis.intervals import (
    MIN_CLUSTERS,
    Interval,
    cluster_sums,
    mean_interval,
    ratio_mean_interval,
)
from moediag.analysis.jackknife import jackknife_interval
from moediag.analysis.quantiles import FAR_MIN_CLUSTERS, quantile_interval


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


@pytest.mark.parametrize(("rate", "bounds"), [(0, (0.0, 1 - 0.025 ** (1 / 16))), (1, (0.025 ** (1 / 16), 1.0))])
def test_a_rate_of_0_or_1_is_not_certain(rate: int, bounds: tuple[float, float]) -> None:
    interval = ratio_mean_interval(np.full(16, 100 * rate), np.full(16, 100), "rate").one()
    assert (interval.value, interval.low, interval.high) == pytest.approx((rate, *bounds))


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
    assert ("prompts lie above" in interval.note) != is_given


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
    monkeypatch.setattr("moediag.analysis.resampling._CELLS_PER_CHUNK", 5_000)
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
