"""Margins: bins and quantiles against plain loops; ties, negatives and infinities in their own places."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from synthetic import make_block, make_pair, take

from moediag.analysis.margins import (
    BIN_HIGH,
    BIN_LOW,
    MarginTotals,
    margin_curve,
    margin_noise,
    margin_quantiles,
)
from moediag.errors import MoediagError
from moediag.results.pair_analysis import read_pair
from moediag.run.align import Pair, PairBlock


def _margins_of(pair: Pair) -> dict[str, MarginTotals]:
    return read_pair(pair)[1].margins


def _flips(block: PairBlock) -> np.ndarray:
    pairs = zip(block.expert_ids_train_TLK, block.expert_ids_infer_TLK, strict=True)
    return np.array([[set(a) != set(b) for a, b in zip(x, y, strict=True)] for x, y in pairs])


def _odd_margins(block: PairBlock) -> PairBlock:
    """Exact ties, negative zero, negative and tiny margins, a bin edge (1), infinity and NaN."""
    margin = block.logit_margin_infer_TL.copy()
    margin.ravel()[:9] = [0.0, -0.0, -0.5, 1e-9, 2e-6, 1.0, np.inf, np.nan, 500.0]
    return replace(block, logit_margin_infer_TL=margin)


@pytest.mark.parametrize("space", ["choice", "logit"])
def test_curve_equals_a_plain_loop(space: str) -> None:
    block = _odd_margins(make_block(flip_noise=0.5))
    margin = {"choice": block.margin_infer_TL, "logit": block.logit_margin_infer_TL}[space].astype(float)
    flips, frame = _flips(block), margin_curve(_margins_of(make_pair(block)))
    for layer in (-1, 0, 2):
        part = slice(None) if layer < 0 else [layer]
        rows = frame[(frame["space"] == space) & (frame["layer"] == layer)]
        assert rows["n_choices"].sum() == np.isfinite(margin[:, part]).sum() + np.isinf(margin[:, part]).sum()
        for _, row in rows.iterrows():
            low, high = row["bin_low"], row["bin_high"]
            inside = (margin[:, part] >= low) & (margin[:, part] < high)
            inside = margin[:, part] == 0 if low == high else inside & (margin[:, part] != 0)
            if np.isinf(high):
                inside |= np.isinf(margin[:, part])
            assert row["n_choices"] == inside.sum()
            assert row["n_flipped"] == (inside & flips[:, part]).sum()
            assert row["flip_rate"] == pytest.approx(flips[:, part][inside].mean())


def test_bins_cover_the_line_four_per_decade() -> None:
    assert np.isneginf(BIN_LOW[0])
    assert np.isposinf(BIN_HIGH[-1])
    np.testing.assert_array_equal(BIN_LOW[1:], BIN_HIGH[:-1])
    assert ((BIN_LOW >= 1e-6) & (BIN_LOW < 1e-5)).sum() == 4


def test_ties_and_negatives_have_their_own_bins() -> None:
    frame = margin_curve(_margins_of(make_pair(_odd_margins(make_block()))))
    pooled = frame[(frame["space"] == "logit") & (frame["layer"] == -1)].set_index(["bin_low", "bin_high"])
    assert pooled.loc[(0.0, 0.0), "n_choices"] == 2
    assert pooled.loc[(-np.inf, 0.0), "n_choices"] == 1
    assert pooled.loc[(0.0, BIN_HIGH[2]), "n_choices"] == 1
    assert pooled.loc[(100.0, np.inf), "n_choices"] == 2


def test_quantiles_are_order_statistics_to_the_stated_precision() -> None:
    block = make_block(n_prompts=30, flip_noise=0.5)
    flips, margin = _flips(block), block.logit_margin_infer_TL
    frame = margin_quantiles(_margins_of(make_pair(block))).set_index(["space", "group"])
    for group, values in (("all", margin.ravel()), ("flipped", margin[flips]), ("kept", margin[~flips])):
        row = frame.loc[("logit", group)]
        assert row["n_choices"] == len(values)
        for name, q in (("p01", 0.01), ("p10", 0.1), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            assert row[name] == pytest.approx(np.quantile(values, q, method="inverted_cdf"), rel=2.0**-12)


def test_quantiles_of_signed_and_tied_and_infinite_margins() -> None:
    block = make_block(n_layers=1)
    base = np.resize(np.array([-2.0, -1.0, 0.0, 0.0, np.inf], np.float32), (len(block), 1))
    frame = margin_quantiles(_margins_of(make_pair(replace(block, logit_margin_infer_TL=base))))
    row = frame[(frame["space"] == "logit") & (frame["group"] == "all")].iloc[0]
    assert row["p10"] == pytest.approx(-2.0, rel=2.0**-11)
    assert row["p50"] == 0.0
    assert row["p99"] == np.inf
    assert row["n_exact_ties"] == (base == 0).sum()


def test_merge_of_parts_equals_the_whole() -> None:
    block = make_block(flip_noise=0.4)
    whole = _margins_of(make_pair(block))
    cuts = [take(block, slice(0, 31)), take(block, slice(31, None))]
    parts = [_margins_of(make_pair(cut)) for cut in cuts]
    for space in whole:
        for merged in (MarginTotals.merge([part[space] for part in parts]), _margins_of(make_pair(*cuts))[space]):
            for name, value in vars(whole[space]).items():
                np.testing.assert_array_equal(getattr(merged, name), value)


def test_margins_of_two_sides_do_not_add_up() -> None:
    block = make_block()
    one = _margins_of(make_pair(block))["choice"]
    other = _margins_of(make_pair(replace(block, margin_infer_TL=None)))["choice"]
    assert (one.side, other.side) == ("infer", "train")
    with pytest.raises(MoediagError, match="counts of different side do not add up: infer and train"):
        MarginTotals.merge([one, other])


def test_noise_is_that_of_the_score_difference() -> None:
    """Margins of logits that differ by N(0, s) each: the border pair's difference has s * sqrt(2)."""
    rng = np.random.default_rng(0)
    block = make_block(n_prompts=200, length=60, n_layers=1)
    margin = rng.exponential(0.5, (len(block), 1)).astype(np.float32)
    ids = np.tile(np.array([0, 1], np.int16), (len(block), 1, 1))
    flipped = np.where((0.2 * rng.normal(size=margin.shape) > margin)[:, :, None], np.array([0, 2], np.int16), ids)
    pair = make_pair(
        replace(block, logit_margin_infer_TL=margin, expert_ids_train_TLK=flipped, expert_ids_infer_TLK=ids)
    )
    frame = margin_noise(_margins_of(pair))
    assert frame[frame["space"] == "logit"]["sigma"].to_numpy() == pytest.approx(0.2, rel=0.1)
    still = margin_noise(_margins_of(make_pair(replace(block, expert_ids_train_TLK=ids, expert_ids_infer_TLK=ids))))
    assert still["sigma"].isna().all()


def test_chunks_do_not_change_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_block(flip_noise=0.4)
    whole = margin_curve(_margins_of(make_pair(block)))
    monkeypatch.setattr("moediag.analysis.margins._CHOICES_PER_CHUNK", 50)
    assert margin_curve(_margins_of(make_pair(block))).equals(whole)


def test_rows_routed_in_one_arm_only_and_missing_margins_are_left_out() -> None:
    block = make_block()
    block.expert_ids_train_TLK[:5] = -1
    block.margin_infer_TL[5:8] = np.nan
    frame = margin_quantiles(_margins_of(make_pair(block))).set_index(["space", "group"])
    assert frame.loc[("choice", "all"), "n_choices"] == 3 * (len(block) - 8)
    bare = replace(
        block, **dict.fromkeys(f"{m}_{s}_TL" for m in ("margin", "logit_margin") for s in ("infer", "train"))
    )
    totals = _margins_of(make_pair(bare))
    assert margin_curve(totals).empty
    assert (margin_quantiles(totals)["n_choices"] == 0).all()


def test_flip_rate_falls_with_the_margin() -> None:
    frame = margin_curve(_margins_of(make_pair(make_block(n_prompts=60, flip_noise=0.2))))
    pooled = frame[(frame["space"] == "logit") & (frame["layer"] == -1) & (frame["n_choices"] > 100)]
    assert pooled["flip_rate"].iloc[0] > 0.25
    assert pooled["flip_rate"].iloc[-1] < 0.02


def test_no_flip_beyond_twice_the_largest_change() -> None:
    """Noise of 0.05 per logit stays below 0.3 = 6 sigma here, so margins above 0.6 cannot flip."""
    frame = margin_curve(_margins_of(make_pair(make_block(n_prompts=60, flip_noise=0.05))))
    safe = frame[(frame["space"] == "logit") & (frame["bin_low"] > 0.6)]
    assert safe["n_choices"].sum() > 100
    assert (safe["n_flipped"] == 0).all()
