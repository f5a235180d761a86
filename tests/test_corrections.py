"""IcePop weights and the table of presets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_block, make_pair

from moediag.analysis import scored_tokens, token_frame
from moediag.corrections import ICEPOP_PRESETS, IcepopPreset, corrections_table, icepop_weights
from moediag.errors import MoediagError

LOGP = st.floats(-30, 0)


@given(st.lists(st.tuples(LOGP, LOGP), max_size=30), st.floats(0.01, 1), st.floats(1, 50))
def test_weights_equal_a_plain_loop(pairs: list[tuple[float, float]], alpha: float, beta: float) -> None:
    weights = icepop_weights([a for a, _ in pairs], [b for _, b in pairs], alpha, beta)
    assert weights.dtype == np.float64
    for weight, (train, infer) in zip(weights, pairs, strict=True):
        diff = train - infer
        inside = np.log(alpha) <= diff <= np.log(beta)
        assert weight == (pytest.approx(math.exp(diff)) if inside else 0.0)


def test_band_is_closed_and_exact_at_its_bounds() -> None:
    low, high = np.log(0.5), np.log(5.0)
    just_outside = [np.nextafter(low, -1), np.nextafter(high, 9)]
    assert icepop_weights([low, high], [0.0, 0.0]) == pytest.approx([0.5, 5.0])
    assert icepop_weights(just_outside, [0.0, 0.0]).tolist() == [0.0, 0.0]


def test_unscored_tokens_have_no_weight_rather_than_zero() -> None:
    weights = icepop_weights([np.nan, -1.0, -np.inf, -1.0], [-1.0, np.nan, -1.0, -1.0])
    np.testing.assert_array_equal(weights, [np.nan, np.nan, np.nan, 1.0])


def test_open_bands_and_absurd_ratios_stay_finite() -> None:
    weights = icepop_weights([0.0, -900.0], [-900.0, 0.0], 0.0, math.inf)
    assert weights == pytest.approx([math.exp(20), math.exp(-20)])


def test_empty_arrays_give_empty_weights() -> None:
    assert icepop_weights([], []).shape == (0,)


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (-0.1, 5.0), (math.nan, 5.0), (0.5, math.nan), (0.0, 0.0)])
def test_an_impossible_band_is_an_error(alpha: float, beta: float) -> None:
    with pytest.raises(MoediagError, match="band"):
        icepop_weights([0.0], [0.0], alpha, beta)


def test_different_shapes_are_an_error() -> None:
    with pytest.raises(MoediagError, match="shape"):
        icepop_weights([0.0, 1.0], [0.0])


def test_table_equals_the_weights() -> None:
    block = make_block(diff_scale=1.0)
    block.logp_infer_T[::11] = np.nan
    tokens = token_frame(make_pair(block))
    scored = scored_tokens(tokens)
    frame = corrections_table(tokens)
    assert frame["method"].tolist() == ["icepop_0.5_5.0", "icepop_0.5_2.0", "icepop_0.2_5.0"]
    for preset, (_, row) in zip(ICEPOP_PRESETS, frame.iterrows(), strict=True):
        weights = icepop_weights(scored["logp_train"], scored["logp_infer"], preset.alpha, preset.beta)
        assert row["n_tokens"] == len(scored)
        assert row["masked_share"] == pytest.approx(np.mean(weights == 0))
        assert row["masked_share"] == pytest.approx(row["below_share"] + row["above_share"])
        assert row["masked_share_ci_low"] < row["masked_share"] < row["masked_share_ci_high"]


def test_table_of_nothing_scored_is_nan_and_of_no_preset_is_empty() -> None:
    block = make_block()
    block.logp_train_T[:] = np.nan
    tokens = token_frame(make_pair(block))
    frame = corrections_table(tokens)
    assert frame["masked_share"].isna().all()
    assert (frame["n_tokens"] == 0).all()
    assert corrections_table(tokens, ()).empty


def test_a_wider_band_masks_no_more() -> None:
    tokens = token_frame(make_pair(make_block(diff_scale=1.0)))
    bands = tuple(IcepopPreset(1 / width, width, "test") for width in (1.1, 2.0, 5.0, 50.0))
    assert corrections_table(tokens, bands)["masked_share"].is_monotonic_decreasing
