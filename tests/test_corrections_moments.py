"""Moments of weights of any size: against exact sums, merged in parts, scaled, in the statistics and in the sweep."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_corrections_statistics import make_tokens

from moediag.corrections import compare_corrections, parse_correction, sweep_by_band
from moediag.corrections.sums import Moments

WEIGHTS = st.lists(st.one_of(st.floats(2e-9, 5e8), st.sampled_from([0.0, 1.0, 1 + 2.0**-40, 2e-9])), min_size=1)


def exact(values: list[float]) -> tuple[float, float]:
    """Variance and effective share, in rational numbers."""
    total, square = sum(map(Fraction, values)), sum(Fraction(w) ** 2 for w in values)
    variance = square / len(values) - (total / len(values)) ** 2
    return float(variance), float(total**2 / (len(values) * square)) if square else math.nan


def share(values) -> float:
    return float(Moments.of(np.array(values)).effective_share_G[0])


@given(WEIGHTS, st.integers(1, 5))
def test_moments_equal_exact_sums_however_the_weights_are_parted(values: list[float], n_parts: int) -> None:
    """Bug: the effective sample size came from moments of w - 1, and weights of 1e-8, 2e-8, 3e-8 gave 1.2 for .857."""
    variance, effective = exact(values)
    parted = sum(map(Moments.of, np.array_split(np.array(values), n_parts)), Moments.none())
    for found in (Moments.of(np.array(values)), parted):
        assert found.n_G[0] == len(values)
        assert found.effective_share_G[0] == pytest.approx(effective, rel=1e-12, nan_ok=True)
        # the largest weight sets what float64 can know of a deviation
        assert found.variance_G[0] == pytest.approx(variance, rel=1e-9, abs=1e-30 * max(values) ** 2)


@given(WEIGHTS.filter(any), st.integers(-90, 90), st.floats(1e-20, 1e20))
def test_the_effective_share_is_a_share_and_knows_no_scale(values: list[float], power: int, factor: float) -> None:
    found = share(values)
    assert 0 < found <= 1
    assert share(np.array(values) * 2.0**power) == found
    assert share(np.array(values) * factor) == pytest.approx(found, rel=1e-12)


@given(st.lists(st.tuples(st.floats(1e-8, 1e8), st.integers(0, 3)), min_size=1), st.lists(st.booleans(), min_size=4))
def test_groups_joined_are_the_group_of_their_values(rows: list[tuple[float, int]], chosen: list[bool]) -> None:
    values, groups = np.array([value for value, _ in rows]), np.array([group for _, group in rows])
    some = values[np.array(chosen[:4])[groups]]
    joined = Moments.of(values, groups, 4).joined(np.array([chosen[:4]]))
    alone = Moments.of(some)
    for name in ("n_G", "mean_G", "square_G"):
        np.testing.assert_allclose(getattr(joined, name), getattr(alone, name), rtol=1e-11)


def tokens_of(diff_T: np.ndarray, length: int = 1) -> pd.DataFrame:
    row_T = np.arange(len(diff_T))
    return pd.DataFrame(
        {
            "logp_train": diff_T - 30.0,
            "logp_infer": -30.0,
            "seq_id": row_T // length,
            "prompt_id": row_T // length,
            "position": row_T % length,
        }
    )


def statistics(tokens: pd.DataFrame, words: str, **options):
    return compare_corrections(tokens, {"x": parse_correction(words)}, **options)["correction_statistics"].iloc[0]


@pytest.mark.parametrize("words", ["tis_token", "tis_sequence", "mis_token:cap=inf", "icepop:alpha=0,beta=5"])
@pytest.mark.parametrize("chunk_tokens", [1, 65_536])
def test_small_weights_keep_their_effective_sample_size(words: str, chunk_tokens: int) -> None:
    """Bug: three tokens with weights 1e-8, 2e-8 and 3e-8 had an effective sample size of 120 %."""
    row = statistics(tokens_of(np.log([1e-8, 2e-8, 3e-8])), words, chunk_tokens=chunk_tokens)
    assert row["ess_token"] == pytest.approx(36 / 42, rel=1e-9)
    assert row["ess_sequence"] == pytest.approx(36 / 42, rel=1e-9)
    assert row["weight_variance"] == pytest.approx(2e-16 / 3, rel=1e-6)


@pytest.mark.parametrize("clamped", [-25.0, 25.0])
def test_weights_that_are_all_at_the_clamp_are_all_effective(clamped: float) -> None:
    """Bug: where every log-ratio was clamped, the effective sample size came out as no number."""
    row = statistics(tokens_of(np.full(80, clamped), length=8), "mis_token:cap=inf")
    assert row["ess_token"] == row["ess_sequence"] == 1
    assert row["weight_variance"] == pytest.approx(0, abs=1e-30 * math.exp(2 * clamped))


def test_product_weights_of_long_responses_equal_an_exact_sum() -> None:
    """Bug: 32 responses of 16,384 tokens with a small drift had a sequence ESS of .150 where .147 is right."""
    rng = np.random.default_rng(3)
    diff_T = rng.normal(-1e-3, 0.008, 32 * 16_384)
    row = statistics(tokens_of(diff_T, 16_384), "tis_sequence")
    weights = [math.exp(math.fsum(part)) for part in np.split(diff_T, 32)]
    assert max(weights) < 1e-5
    assert row["ess_sequence"] == pytest.approx(exact(weights)[1], rel=1e-9)
    assert row["ess_token"] == pytest.approx(exact(weights)[1], rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, -18.0])
def test_the_sweep_knows_small_weights_too(shift: float) -> None:
    """Bug: bands that keep small ratios only had effective sample sizes above 1, or none."""
    tokens = make_tokens(unscored=False)
    diff_T = np.clip(tokens["logp_train"] - tokens["logp_infer"], -1, 1) + shift
    tokens = tokens.assign(logp_train=diff_T - 20, logp_infer=-20.0)
    ratio_T = np.exp(tokens["logp_train"] - tokens["logp_infer"])
    bounds = [0.0, *np.exp(shift + np.array([-0.5, 0.0, 0.3])).tolist(), math.inf]
    sweep = sweep_by_band(tokens, bounds, bounds, chunk_tokens=25)
    for _, row in sweep.iterrows():
        weight_T = np.where((ratio_T >= row["alpha"]) & (ratio_T <= row["beta"]), ratio_T, 0.0)
        variance, effective = exact(weight_T.tolist())
        assert row["weight_mean"] == pytest.approx(math.fsum(weight_T) / len(weight_T), rel=1e-12)
        assert row["weight_variance"] == pytest.approx(variance, rel=1e-10)
        assert row["ess_token"] == pytest.approx(effective, rel=1e-10, nan_ok=True)
