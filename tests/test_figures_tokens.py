"""Figures of tokens and responses: what is drawn is what the frames say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.text import Text
from synthetic_runs import make_run

from moediag.figures import Floor
from moediag.figures.density import certainty, plot_logp_diff_by_p_infer
from moediag.figures.positions import plot_position_drift
from moediag.figures.ratios import band_edges, plot_ratio_histogram
from moediag.figures.sequences import plot_sequence_drift
from moediag.figures.style import wrapped
from moediag.figures.tails import plot_tail_curve

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def moe():
    return make_run(has_variants=True)


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text)).replace("\n", " ")


def sizes(frames):
    tokens = frames["tokens"]
    return tokens["logp_train"].to_numpy(float) - tokens["logp_infer"].to_numpy(float)


def test_tail_curve_and_its_bounds_are_the_frame(moe):
    frame = moe["tail_curve"]
    shown = frame[frame["n_above"] > 0]
    ax = plot_tail_curve({"moe": frame}, {"moe": moe["logp_metrics"]}).axes[0]
    line = next(item for item in ax.get_lines() if str(item.get_label()).startswith("moe"))
    np.testing.assert_array_equal(line.get_xdata(), shown["threshold"])
    np.testing.assert_array_equal(line.get_ydata(), shown["share_above"])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert set(shown["share_above_ci_high"]) <= set(band)


def test_tail_title_says_none_where_f2_is_zero(moe):
    metrics = moe["logp_metrics"].copy()
    metrics.loc[metrics["metric"] == "extreme_share_2", ["value", "ci_low", "ci_high"]] = 0.0
    assert "none of 4,096 tokens differs by more than a factor of 2" in (
        plot_tail_curve({"moe": moe["tail_curve"]}, {"moe": metrics}).get_suptitle().replace("\n", " ")
    )


def test_ratio_bins_hold_every_token_and_never_straddle_the_band(moe):
    values = sizes(moe)
    ax = plot_ratio_histogram({"moe": moe["tokens"]}, {"moe": moe["corrections"]}).axes[0]
    drawn = next(patch for patch in ax.patches if hasattr(patch, "get_data")).get_data()
    assert drawn.values.sum() == len(values)
    for end in (math.log(0.5), math.log(5)):
        assert np.abs(drawn.edges - end).min() < 1e-9
    row = moe["corrections"].iloc[0]
    outside = drawn.values[(drawn.edges[1:] <= math.log(0.5) + 1e-9) | (drawn.edges[:-1] >= math.log(5) - 1e-9)].sum()
    assert outside / len(values) == pytest.approx(row["below_share"] + row["above_share"])


def test_ratio_bins_stay_few_for_far_ratios():
    edges = band_edges(np.array([-80.0, 200.0]))
    assert len(edges) < 500
    assert edges[0] < -80
    assert edges[-1] > 200
    assert np.allclose(np.diff(edges), np.diff(edges)[0])


def test_density_counts_every_token_and_means_are_the_frame(moe):
    strata = moe["metrics_by_stratum"]
    ax = plot_logp_diff_by_p_infer({"moe": moe["tokens"]}, {"moe": strata}).axes[0]
    assert np.nansum(ax.collections[0].get_array().filled(0)) == len(moe["tokens"])
    rows = strata[(strata["stratifier"] == "p_infer") & (strata["metric"] == "abs_logp_diff.mean")]
    heights = {float(item.get_ydata()[0]) for item in ax.get_lines() if len(item.get_ydata()) == 2}
    assert set(rows["value"]) <= heights


def test_certainty_keeps_both_ends_of_p_on_the_axis():
    np.testing.assert_allclose(certainty(np.array([0.0, 0.5, 1.0])), [-5, 0, 5], atol=1e-4)


def test_stripes_of_rounded_log_probs_stay_apart(moe):
    """bf16 stripes must not be smoothed away: two sizes 20 % apart fall into different rows."""
    tokens = moe["tokens"].copy()
    steps = np.where(np.arange(len(tokens)) % 2, 0.0078125, 0.009375)
    tokens["logp_train"] = (tokens["logp_infer"].astype("float64") + steps).astype("float32")
    table = plot_logp_diff_by_p_infer({"moe": tokens}).axes[0].collections[0].get_array()
    assert (np.ma.count(table.reshape(-1, table.shape[-1]), axis=1) > 0).sum() == 2


def test_every_response_is_a_point_and_bins_are_the_frame():
    frames = make_run(n_tokens=4096, n_prompts=64)
    sequences, bins = frames["sequences"], frames["drift_by_length"]
    sequences = sequences.assign(n_tokens=10 + np.arange(len(sequences)))
    ax = plot_sequence_drift({"moe": sequences}, {"moe": bins}).axes[0]
    points = next(item for item in ax.get_lines() if item.get_label() == "response")
    np.testing.assert_array_equal(points.get_ydata(), sequences["log_ratio_sum"])
    drawn = next(item for item in ax.get_lines() if item.get_label() == "mean per bin")
    assert set(drawn.get_ydata()) <= set(bins["log_ratio_mean"])
    assert ax.get_ylim()[0] == -ax.get_ylim()[1], "a drift to one side must look like one"


def test_responses_of_one_length_show_how_they_differ_and_no_drift():
    """Bug: 61 of 64 points stood upon each other at the length that cut the responses off, under a word."""
    frames = make_run(n_tokens=4096, n_prompts=64)
    sequences, bins = frames["sequences"].copy(), frames["drift_by_length"]
    sequences.loc[:2, "n_tokens"] = [10, 20, 30]
    figure = plot_sequence_drift({"moe": sequences}, {"moe": bins})
    (ax,) = figure.axes
    assert "61 of 64 responses have 64 tokens, no drift can be seen" in words(figure)
    assert next(p for p in ax.patches if hasattr(p, "get_data")).get_data().values.sum() == 64
    mean = next(item for item in ax.get_lines() if str(item.get_label()).startswith("mean"))
    assert mean.get_xdata()[0] in set(bins["log_ratio_mean"])
    assert ax.get_xlim()[0] == -ax.get_xlim()[1]


@pytest.mark.parametrize(
    ("floor", "said", "lines"),
    [
        (None, "Floor: no A/A floor was measured.", 0),
        ("bit-exact", "Floor of the mean: bit-exact.", 0),
        (Floor(0.0, "repeats"), "Floor of the mean: 0 nat (repeats).", 0),
        (Floor(0.0021, "repeats"), "Floor of the mean: 0.0021 nat (repeats).", 1),
    ],
)
def test_a_floor_is_drawn_where_it_has_a_size_and_said_always(moe, floor, said, lines):
    figure = plot_position_drift({"moe": moe["drift_by_position"]}, floor=floor)
    assert said in words(figure)
    at = [
        item for item in figure.axes[0].get_lines() if len(set(item.get_ydata())) == 1 and item.get_ydata()[0] == 0.0021
    ]
    assert len(at) == lines


def test_floors_of_two_runs_are_told_apart(moe):
    frame = moe["drift_by_position"]
    text = words(plot_position_drift({"a": frame, "b": frame}, floor={"a": Floor(0.01, "x"), "b": None}))
    assert "a: Floor of the mean: 0.010 nat (x). b: Floor: no A/A floor was measured." in text


def test_words_are_wrapped_by_their_measure():
    wide, narrow = (wrapped(f"{letter * 8} " * 12, 3.0, 8) for letter in "Wi")
    assert wide.count("\n") > narrow.count("\n")
