"""The sweep of bands against the masks themselves; frontier; the recommendation's rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_corrections import k3
from test_corrections_statistics import make_tokens, weights_of

from moediag.analysis.tokens import Tokens
from moediag.corrections import compare_corrections, parse_correction, recommend_band, sweep_by_band
from moediag.corrections.bands import frontier
from moediag.errors import MoediagError
from moediag.report.simulation_page import band_words


def test_every_band_equals_its_mask() -> None:
    tokens = make_tokens()
    sweep = sweep_by_band(tokens)
    assert len(sweep) == 400
    scored = Tokens(tokens)
    k3_T = np.array([k3(diff) for diff in scored.diff_T])
    for _, row in sweep.iterrows():
        band = {"alpha": row["alpha"], "beta": row["beta"]}
        weight_T = weights_of(tokens, "icepop", **band)[scored.is_scored_N]
        assert row["masked_share"] == pytest.approx((weight_T == 0).mean(), abs=1e-15)
        assert row["below_share"] + row["above_share"] == pytest.approx(row["masked_share"])
        assert row["kept_k3"] == pytest.approx(k3_T[weight_T > 0].mean(), rel=1e-9, nan_ok=True)
        assert row["weight_mean"] == pytest.approx(weight_T.mean(), rel=1e-12)
        assert row["weight_variance"] == pytest.approx(weight_T.var(), rel=1e-9)
        assert row["ess_token"] == pytest.approx(weight_T.sum() ** 2 / (len(weight_T) * np.square(weight_T).sum()))


def test_bounds_of_the_sweep_are_closed() -> None:
    tokens = make_tokens(unscored=False)
    diff_T = np.resize(np.log([0.5, 0.9, 1.0, 2.0, 5.0]), len(tokens))
    tokens = tokens.assign(logp_train=diff_T, logp_infer=0.0)
    sweep = sweep_by_band(tokens, [0.5, 0.9], [1.0, 5.0]).set_index(["alpha", "beta"])
    assert sweep.loc[(0.5, 5.0), "masked_share"] == 0
    assert sweep.loc[(0.9, 1.0), "masked_share"] == pytest.approx(np.mean((diff_T < np.log(0.9)) | (diff_T > 0)))
    assert sweep.loc[(0.9, 1.0), "kept_k3"] > 0


def test_the_sweep_agrees_with_the_statistics_and_with_any_chunks() -> None:
    tokens = make_tokens(n_sequences=60)
    row = compare_corrections(tokens, {"x": parse_correction("icepop")})["correction_statistics"].iloc[0]
    sweep = sweep_by_band(tokens, [0.5], [5.0], chunk_tokens=25).iloc[0]
    for name in ("masked_share", "masked_share_ci_low", "masked_share_ci_high", "kept_k3", "kept_k3_ci_high",
                 "weight_mean", "weight_variance", "ess_token", "n_tokens", "n_prompts", "below_share"):  # fmt: skip
        assert sweep[name] == pytest.approx(row[name], rel=1e-9), name


def test_a_band_of_one_point_and_of_nothing() -> None:
    tokens = make_tokens()
    sweep = sweep_by_band(tokens, [1.0, 40.0], [1.0, 40.0])
    assert sweep[["alpha", "beta"]].to_numpy().tolist() == [[1, 1], [1, 40], [40, 40]]
    assert sweep["masked_share"].iloc[2] == 1
    assert math.isnan(sweep["kept_k3"].iloc[2])
    assert not sweep["is_on_k3_frontier"].iloc[2]
    nothing = tokens.assign(logp_train=np.nan)
    assert sweep_by_band(nothing)["masked_share"].isna().all()
    assert recommend_band(sweep_by_band(nothing)).empty
    for alphas, betas in (([2.0], [1.0]), ([-1.0], [2.0]), ([math.nan], [1.0]), ([], [])):
        with pytest.raises(MoediagError, match="a sweep needs"):
            sweep_by_band(tokens, alphas, betas)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=25))
def test_frontier_equals_its_definition(points: list[tuple[int, int]]) -> None:
    cost, gain = (np.array([point[i] for point in points], dtype=float) for i in (0, 1))
    found = frontier(cost, gain)
    for i, one in enumerate(points):
        dominated = any(o != one and o[0] <= one[0] and o[1] <= one[1] for o in points)
        assert found[i] == (not dominated)


def test_k3_on_the_frontier_has_intervals() -> None:
    sweep = sweep_by_band(make_tokens(n_sequences=100, unscored=False))
    on = sweep[sweep["is_on_k3_frontier"] & sweep["kept_k3_ci_low"].notna()]
    assert len(on) >= 20
    assert ((on["kept_k3_ci_low"] < on["kept_k3"]) & (on["kept_k3"] < on["kept_k3_ci_high"])).all()


def test_the_recommended_band_follows_its_rule() -> None:
    tokens = make_tokens(n_sequences=3000, scale=0.05, unscored=False)
    sweep = sweep_by_band(tokens)
    some = sweep[sweep["masked_share"] <= 0.002]
    row = recommend_band(sweep.assign(kept_k3_ci_low=np.nan, kept_k3_ci_high=np.nan), tokens=tokens).iloc[0]
    assert row["kept_k3_ci_low"] < row["kept_k3"] < row["kept_k3_ci_high"]
    assert row["rule"] == "budget"
    assert row["masked_share"] <= 0.002
    assert row["kept_k3"] == pytest.approx(some["kept_k3"].min())
    assert row["all_k3"] == pytest.approx(sweep.loc[sweep["masked_share"] == 0, "kept_k3"].iloc[0])
    assert "at most 0.2 % of the tokens" in row["reason"]
    assert " % of the k3 of all tokens; the rest is to be found and mended" in row["reason"]
    assert "not portable" in row["caveat"]
    assert "No offline number shows that training will be stable" in row["caveat"]
    floor = 0.9 * row["kept_k3"] + 0.1 * row["all_k3"]
    above = recommend_band(sweep, floor_k3=floor).iloc[0]
    assert above["rule"] == "floor"
    enough = some[some["kept_k3"] <= floor]
    assert above["masked_share"] == enough["masked_share"].min()
    assert above["kept_k3"] <= floor
    assert recommend_band(sweep, floor_k3=row["all_k3"]).iloc[0][["masked_share", "alpha"]].tolist() == [0, 0]
    unreachable = recommend_band(sweep, floor_k3=0.0).iloc[0]
    assert unreachable["rule"] == "budget"
    assert "A/A floor of 0 nat" in unreachable["reason"]


def test_no_band_is_recommended_from_a_handful_of_masked_tokens() -> None:
    """Bug: one masked token of 512 gave "band to start from: [0.75, inf]"."""
    tokens = make_tokens(n_sequences=60, scale=0.05, unscored=False)
    sweep = sweep_by_band(tokens)
    row = recommend_band(sweep, tokens=tokens).iloc[0]
    assert row["rule"] == "cannot tell"
    assert row[["alpha", "beta", "masked_share", "kept_k3", "kept_k3_ci_low"]].isna().all()
    assert f"of {len(tokens):,} tokens" in row["reason"]
    assert "20 tokens of 10 prompts" in row["reason"]
    assert "10,000 tokens" in row["reason"]
    assert band_words(recommend_band(sweep)) == [f"No band is recommended. {row['reason']}"]
    # an engine against itself that shows as much needs no mask: that needs no masked token
    assert recommend_band(sweep, floor_k3=1.0).iloc[0]["rule"] == "floor"


@pytest.mark.parametrize(("n_masked", "n_prompts", "is_told"), [(19, 19, False), (20, 9, False), (20, 10, True)])
def test_twenty_masked_tokens_of_ten_prompts_are_enough(n_masked: int, n_prompts: int, is_told: bool) -> None:
    tokens = make_tokens(n_sequences=600, unscored=False)
    diff_T = np.where(np.arange(len(tokens)) % 2, 0.01, -0.01)
    first_T = np.flatnonzero(np.diff(tokens["prompt_id"], prepend=-1))
    diff_T[first_T[:n_prompts]] = 3.0
    extra = np.setdiff1d(np.flatnonzero(tokens["prompt_id"] == 0), first_T[:1])
    diff_T[extra[: n_masked - n_prompts]] = 3.0
    tokens = tokens.assign(logp_train=diff_T - 5, logp_infer=-5.0)
    row = recommend_band(sweep_by_band(tokens), budget=0.01).iloc[0]
    assert (row["rule"] == "budget") == is_told
    if is_told:
        assert round(row["masked_share"] * row["n_tokens"]) == n_masked


def test_masked_prompts_are_counted_band_by_band() -> None:
    tokens = make_tokens(n_sequences=60)
    for _, row in sweep_by_band(tokens, [0.0, 0.5, 0.9], [1.1, 5.0]).iterrows():
        band = {"alpha": row["alpha"], "beta": row["beta"]}
        is_masked_T = Tokens(tokens).is_scored_N & (weights_of(tokens, "icepop", **band) == 0)
        assert row["n_masked_prompts"] == tokens.loc[is_masked_T, "prompt_id"].nunique()


def test_a_mismatch_that_no_band_can_afford_is_said() -> None:
    sweep = sweep_by_band(make_tokens(n_sequences=60, scale=2.0, unscored=False), [0.5], [2.0])
    row = recommend_band(sweep).iloc[0]
    assert row["rule"] == "least masked"
    assert "found and mended, not masked" in row["reason"]
    for bad in ({"budget": 1.5}, {"floor_k3": -1.0}, {"floor_k3": math.nan}):
        with pytest.raises(MoediagError, match="budget|floor"):
            recommend_band(sweep, **bad)
