"""The figure of explained and forecast flips: what is drawn is what the frames say, by the best method alone."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.text import Text
from synthetic_runs import make_run

from moediag.analysis.flips.explained import BORDER_ONLY, best_method, flip_headlines, source_words
from moediag.analysis.margins import MIN_CHOICES
from moediag.figures import Floor, draw_figure, figures_left_out
from moediag.figures.excess import plot_flip_excess
from moediag.figures.explained import LEAST, plot_explained_flips

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def moe():
    return make_run(has_variants=True)


def drawn(frames, **options):
    return plot_explained_flips(
        *({"moe": frames[name]} for name in ("explained_flips", "flip_calibration", "forecast_flips")), **options
    )


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text)).replace("\n", " ")


def line(ax, label):
    return next(item for item in ax.get_lines() if item.get_label() == label)


def test_rates_of_the_best_method_are_the_frame(moe):
    frame = moe["explained_flips"]
    rows = frame[(frame["method"] == "all_pairs") & (frame["layer"] >= 0)]
    ax = drawn(moe).axes[0]
    np.testing.assert_array_equal(line(ax, "explained").get_ydata(), rows["explained"])
    bars = next(item for item in ax.containers if item.get_label() == "observed")
    np.testing.assert_array_equal(bars.lines[0].get_ydata(), rows["observed"])
    ends = np.array([segment[:, 1] for segment in bars.lines[2][0].get_segments()])
    np.testing.assert_allclose(ends, rows[["observed_ci_low", "observed_ci_high"]])


def test_forecasts_are_the_frame_and_silent_ones_are_named(moe):
    frame = moe["forecast_flips"]
    ax = drawn(moe).axes[0]
    rows = frame[(frame["noise_from"] == "train~train-perturbed") & (frame["layer"] >= 0)]
    shown = line(ax, "forecast: if it had the noise of train-perturbed").get_ydata()
    np.testing.assert_array_equal(shown, rows["forecast"])
    assert "No flip forecast, not drawn: noise of infer-repeat." in words(drawn(moe))


def test_calibration_is_the_frame_and_its_error_is_said(moe):
    frame = moe["flip_calibration"]
    curve = frame[(frame["method"] == "all_pairs") & (frame["layer"] == -1)]
    rows = curve[(curve["predicted"] >= LEAST) & (curve["n_choices"] >= MIN_CHOICES) & (curve["observed"] > 0)]
    figure = drawn(moe)
    bars = next(item for item in figure.axes[1].containers if item.get_label() == "all layers")
    np.testing.assert_array_equal(bars.lines[0].get_ydata(), rows["observed"])
    pooled = moe["explained_flips"].iloc[0]
    assert f"mean error {100 * pooled['calibration_error']:.2g} %" in words(figure)
    below = curve[curve["predicted"] < LEAST]
    n_flipped = (below["observed"] * below["n_choices"]).sum()
    assert f"below 10⁻⁴: {below['n_choices'].sum():,} choices, {n_flipped:.0f} flipped" in words(figure)


def test_a_method_without_a_prediction_gives_way_to_the_next(moe):
    frame = moe["explained_flips"].copy()
    frame.loc[frame["method"] != "margin_change", ["explained", "gap"]] = np.nan
    assert best_method(frame) == "margin_change"
    assert "margins alone" in words(drawn({**moe, "explained_flips": frame}))
    frame["explained"] = np.nan
    assert best_method(frame) is None
    assert (
        "no flip could be explained" in figures_left_out({"moe": {**moe, "explained_flips": frame}})["explained_flips"]
    )


def test_a_bin_without_a_flip_is_drawn_as_such(moe):
    curve = moe["flip_calibration"].copy()
    nth = curve.index[(curve["layer"] == -1) & (curve["bin_low"] == 1e-4) & (curve["method"] == "all_pairs")]
    curve.loc[nth, ["observed", "observed_ci_low"]] = 0.0
    ax = drawn({**moe, "flip_calibration": curve}).axes[1]
    np.testing.assert_allclose(line(ax, "bin without a flip").get_xdata(), curve.loc[nth, "predicted"])


@pytest.mark.parametrize("forecasts", [True, False])
def test_the_headline_is_the_pooled_row(moe, forecasts):
    frames = {name: frame for name, frame in moe.items() if forecasts or name != "forecast_flips"}
    found = flip_headlines(frames)
    pooled = moe["explained_flips"].iloc[0]
    assert found["explained"]["explained"] == pooled["explained"]
    assert found["explained"]["gap_ci"] == [pooled["gap_ci_low"], pooled["gap_ci_high"]]
    assert [row["noise_from"] for row in found["forecast"]] == (
        ["infer~infer-repeat", "train~train-perturbed"] if forecasts else []
    )
    assert all(row["pair"] == "infer~train" for row in found["forecast"])
    assert all(row["observed"] == pooled["observed"] for row in found["forecast"])
    assert not any("forecast_ci" in row for row in found["forecast"]), "an interval that misses what is found"
    assert "explained_ci" not in found["explained"]
    assert flip_headlines({}) is None
    assert flip_headlines(make_run(n_tokens=64, n_layers=0)) is None


def test_margins_alone_say_what_they_leave_out(moe):
    """Margins alone fall short of the flips, the more the more choices flip, and no cause stood beside the gap."""
    rows = moe["explained_flips"]
    margins = rows[rows["method"] == "margin_change"].assign(note=BORDER_ONLY)
    assert f"{BORDER_ONLY}." in words(drawn({**moe, "explained_flips": margins}))
    assert flip_headlines({"explained_flips": margins})["explained"]["note"] == BORDER_ONLY


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("train~train-perturbed", "noise of train-perturbed"),
        ("infer-repeat~infer", "noise of infer-repeat"),
    ],
)
def test_sources_are_said_as_readers_know_them(source, said):
    assert source_words(source) == said


def test_a_floor_off_the_axis_leaves_no_words_outside_the_panel(moe):
    """The label of a floor below the axis stood between two panels."""
    figure = plot_flip_excess({"moe": moe["flip_excess"]}, floor=Floor(1e-30, "repeats"))
    assert "floor" not in [text.get_text() for text in figure.axes[0].texts]
    assert "1.0e-30 nat" in words(figure)


def test_a_figure_of_the_catalogue_shows_itself_in_a_notebook(moe):
    figure = draw_figure("explained_flips", {"moe": moe}, {"moe": {"flip_rate": Floor(0.001, "repeats")}})
    assert figure is not None
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "Floor of the flip rate: 0.10 % (repeats)." in words(figure)
    assert draw_figure("explained_flips", {"dense": make_run(n_tokens=64, n_layers=0)}) is None
