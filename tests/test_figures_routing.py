"""Figures of flips: what is drawn is what the frames say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import PathPatch
from matplotlib.text import Text
from synthetic_runs import make_run

from moediag.figures import Floor
from moediag.figures.excess import plot_flip_excess
from moediag.figures.flip_counts import plot_flips_per_token
from moediag.figures.flip_maps import plot_flip_map, plot_margins_by_layer
from moediag.figures.routing import plot_agreement_by_depth
from moediag.figures.swaps import pairs_of, plot_expert_swaps
from moediag.figures.ticks import layer_ticks

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def moe():
    return make_run(has_variants=True)


def line(ax, label):
    return next(item for item in ax.get_lines() if str(item.get_label()).startswith(label))


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text)).replace("\n", " ")


def cells(ax):
    return np.ma.masked_invalid(ax.collections[0].get_array())


def test_flips_per_token_are_the_frame_beside_independence(moe):
    frame = moe["flips_per_token"]
    ax = plot_flips_per_token({"moe": frame}).axes[0]
    np.testing.assert_array_equal(line(ax, "observed").get_ydata(), frame.loc[frame["n_tokens"] > 0, "share"])
    assert set(line(ax, "if layers").get_ydata()) <= set(frame["independent_share"])
    any_flip = frame.loc[frame["n_flipped_layers"] >= 1, "share"].sum()
    assert f"{100 * any_flip:.2f} % of tokens flip somewhere" in words(plot_flips_per_token({"moe": frame}))


def test_flip_map_cells_are_the_frame_and_thin_cells_have_no_rate(moe):
    frame = moe["flips_by_layer_position"].copy()
    frame.loc[frame.index[3], "n_choices"] = 7
    ax = plot_flip_map({"moe": frame}).axes[0]
    drawn = cells(ax)
    held = frame[frame["n_choices"] >= 20]
    np.testing.assert_allclose(np.sort(drawn.compressed()), np.sort(held["flip_rate"]))
    assert drawn.mask.sum() == 1
    hatched = [patch for patch in ax.patches if isinstance(patch, PathPatch) and patch.get_hatch()]
    assert len(hatched) == 1


def test_flip_map_shows_first_layer_at_the_bottom_and_marks_the_floor(moe):
    frame = moe["flips_by_layer_position"]
    figure = plot_flip_map({"moe": frame}, floor=Floor(0.005, "repeats"))
    first = cells(figure.axes[0]).reshape(6, -1)[0]
    np.testing.assert_allclose(first, frame.loc[frame["layer"] == 0, "flip_rate"])
    assert figure.axes[0].get_ylim() == (-0.5, 5.5)
    assert "line: floor, 0.50 %" in figure.axes[1].get_ylabel()


def test_margin_maps_are_the_frame_layer_by_layer(moe):
    curve, noise = moe["margin_curve"], moe["margin_noise"]
    left, right = plot_margins_by_layer({"moe": curve}, {"moe": noise}).axes[:2]
    rows = curve[(curve["space"] == "choice") & (curve["layer"] >= 0) & (curve["n_choices"] > 0)]
    per_layer = rows.groupby("layer")["n_choices"].transform("sum")
    np.testing.assert_allclose(np.sort(cells(left).compressed()), np.sort(rows["n_choices"] / per_layer))
    rates = rows.loc[rows["n_choices"] >= 20, "flip_rate"]
    np.testing.assert_allclose(np.sort(cells(right).compressed()), np.sort(rates))
    sigma = noise[(noise["space"] == "choice") & (noise["layer"] >= 0)]["sigma"]
    marks = next(item for item in right.get_lines() if item.get_marker() == "D")
    np.testing.assert_array_equal(marks.get_xdata(), sigma)


def test_excess_is_the_frame_and_groups_without_interval_are_pale(moe):
    frame = moe["flip_excess"]
    left, right = plot_flip_excess({"moe": frame}).axes
    rows = frame[frame["grouping"] == "n_flipped_layers"]
    dots = next(c for c in left.collections if c.get_label() == "flipped tokens")
    np.testing.assert_allclose(dots.get_offsets()[:, 1], rows["flipped_mean"])
    np.testing.assert_array_equal(line(left, "unflipped").get_ydata(), rows["unflipped_mean"])
    assert [alpha < 1 for alpha in np.atleast_1d(dots.get_alpha())] == list(rows["excess_ci_low"].isna())
    by_layer = frame[frame["grouping"] == "first_flipped_layer"]
    np.testing.assert_array_equal(right.containers[0][0].get_ydata(), by_layer["excess"])
    ticks = [tick.get_text() for tick in left.get_xticklabels()]
    assert ticks[0].endswith(f"\n{rows['n_tokens'].iloc[0]:,}"), "a group of two tokens must not look like a trend"


def test_both_directions_of_a_swap_are_one_pair():
    frame = pd.DataFrame(
        {"layer": [2, 2, 0], "expert_train": [4, 3, 4], "expert_infer": [3, 4, 3], "n_swaps": [14, 8, 20],
         "n_reverse": [8, 14, 0], "n_flips": [100, 100, 90]}
    )  # fmt: skip
    pairs = pairs_of(frame)
    assert pairs[["layer", "expert_train", "n_swaps", "n_reverse", "both"]].to_numpy().tolist() == [
        [2, 4, 14, 8, 22], [0, 4, 20, 0, 20]
    ]  # fmt: skip


@pytest.mark.parametrize("n_experts", [16, 128])
def test_swap_bars_and_maps_are_the_frame(n_experts):
    frame = make_run(n_tokens=8192, n_experts=n_experts)["expert_swaps"]
    figure = plot_expert_swaps({"moe": frame})
    bars, maps = figure.axes[0], [ax for ax in figure.axes if ax.get_title(loc="left").startswith("layer")]
    top = pairs_of(frame).head(12)
    assert [patch.get_width() for patch in bars.patches[: len(top)]] == list(top["n_swaps"])
    assert [-patch.get_width() for patch in bars.patches[len(top) :]] == list(top["n_reverse"])
    assert len(maps) == 4
    for ax in maps:
        rows = frame[frame["layer"] == int(ax.get_title(loc="left").split()[-1])]
        drawn = {tuple(place) for place in ax.collections[0].get_offsets().astype(int).tolist()}
        assert drawn == set(zip(rows["expert_infer"], rows["expert_train"], strict=True))


def test_the_floor_of_flips_is_drawn_as_agreement_in_single_layers(moe):
    left, right = plot_agreement_by_depth({"moe": moe["agreement_by_layer"]}, floor=Floor(0.004, "repeats")).axes
    at = [[item for item in ax.get_lines() if set(item.get_ydata()) == {0.996}] for ax in (left, right)]
    assert [len(found) for found in at] == [1, 0]


@pytest.mark.parametrize("deepest", [0, 5, 47, 60, 93])
def test_the_deepest_layer_is_always_labelled(deepest):
    ticks = layer_ticks(deepest, 8)
    assert ticks[-1] == deepest
    assert len(ticks) <= 9
    assert ticks == sorted(set(ticks))
