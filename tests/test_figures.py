"""Figures: what is drawn is what the frames say, and every file is whole, deterministic and readable."""

from __future__ import annotations

import errno
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.text import Text
from synthetic_runs import empty_frame, make_run

from moediag.analysis import declarations as declared
from moediag.errors import DiskFullError, RunError
from moediag.figures import save_figure
from moediag.figures.logp import plot_figure1
from moediag.figures.margins import bin_edges, plot_margins
from moediag.figures.positions import plot_position_drift
from moediag.figures.routing import plot_agreement_by_depth
from moediag.figures.style import DENSE_COLOURS, MOE_COLOURS, figure_text, formats, run_styles
from moediag.numbers import percent
from moediag.report.blocks import number

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def moe():
    return make_run(has_variants=True)


@pytest.fixture(scope="module")
def dense():
    return make_run(n_tokens=4096, n_layers=0, seed=1)


def pick(runs, name):
    return {label: frames[name] for label, frames in runs.items() if name in frames}


def figure1(**runs):
    return plot_figure1(pick(runs, "tokens"), pick(runs, "tail_curve"), pick(runs, "logp_metrics"))


def line(ax, label):
    return next(item for item in ax.get_lines() if str(item.get_label()).startswith(label))


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text)).replace("\n", " ")


def test_tail_curve_is_the_frame(moe, dense):
    tail = figure1(moe=moe, dense=dense).axes[1]
    for label, frames in (("moe", moe), ("dense", dense)):
        frame = frames["tail_curve"]
        frame = frame[frame["n_above"] > 0]
        drawn = line(tail, label)
        np.testing.assert_array_equal(drawn.get_xdata(), frame["threshold"])
        np.testing.assert_array_equal(drawn.get_ydata(), frame["share_above"])
        assert any(np.allclose(item.get_ydata(), 1 / 4096) for item in tail.get_lines()), "no resolution limit"


def test_body_shows_every_token_and_the_marks_of_the_metrics_frame(moe):
    """Histogram and zero bar together hold all tokens: nothing falls off the axis unsaid."""
    body = figure1(moe=moe).axes[0]
    stairs = next(p for p in body.patches if hasattr(p, "get_data"))
    heights = stairs.get_data().values
    size = np.abs(moe["tokens"]["logp_train"].to_numpy(float) - moe["tokens"]["logp_infer"].to_numpy(float))
    zeros = float(np.mean(size < 1e-6))
    bar = next(p for p in body.patches if hasattr(p, "get_width"))
    assert bar.get_height() / heights.sum() == pytest.approx(zeros / (1 - zeros), rel=1e-6)
    metrics = moe["logp_metrics"].set_index("metric")["value"]
    verticals = [item.get_xdata()[0] for item in body.get_lines() if len(set(item.get_xdata())) == 1]
    assert metrics["abs_logp_diff.mean"] in verticals
    assert metrics["abs_logp_diff.p99"] in verticals
    ticks = next(item for item in body.get_lines() if item.get_marker() == "|")
    assert len(ticks.get_xdata()) == (size > metrics["abs_logp_diff.p99"]).sum()


def test_figure1_title_states_the_finding_and_the_caption_its_limits(moe, dense):
    figure = figure1(moe=moe, dense=dense)
    mean = [f["logp_metrics"].set_index("metric")["value"]["abs_logp_diff.mean"] for f in (moe, dense)]
    title = figure.get_suptitle()
    assert f"mean {mean[0]:.3g} nat, {mean[0] / mean[1]:.1f}× dense" in title
    text = words(figure)
    assert "Figure-1-style" in text
    assert "could not be verified" in text
    assert "no A/A floor was measured" in text
    assert "4,096 tokens of 64 prompts" in text
    assert "[nat]" in text


def test_agreement_lines_and_bands_are_the_frame(moe):
    frame = moe["agreement_by_layer"]
    axes = plot_agreement_by_depth({"moe": frame}).axes
    for ax, column in zip(axes, ("same_set_rate", "cumulative_same_set_rate"), strict=True):
        np.testing.assert_array_equal(line(ax, "moe").get_xdata(), frame["layer"])
        np.testing.assert_array_equal(line(ax, "moe").get_ydata(), frame[column])
        band = ax.collections[0].get_paths()[0].vertices[:, 1]
        assert {*frame[f"{column}_ci_low"], *frame[f"{column}_ci_high"]} <= set(band)


def test_an_axis_that_does_not_start_at_zero_says_so(moe):
    for ax in plot_agreement_by_depth({"moe": moe["agreement_by_layer"]}).axes:
        low = ax.get_ylim()[0]
        assert low > 0.5
        assert f"axis starts at {100 * low:.0f} %, not at 0" in ax.get_ylabel()
        assert low < moe["agreement_by_layer"]["cumulative_same_set_rate_ci_low"].min() or ax.get_ylim()[1] > 1


@pytest.mark.parametrize("n_layers", [1, 6, 48, 61])
def test_layer_ticks_stay_readable_and_name_the_decoder_layer(n_layers):
    frame = make_run(n_tokens=128, n_layers=n_layers, first_decoder_layer=3, has_scores=False)["agreement_by_layer"]
    ax = plot_agreement_by_depth({"moe": frame}).axes[0]
    labels = [tick.get_text() for tick in ax.get_xticklabels()]
    assert len(labels) <= 13
    assert labels[-1] == f"{n_layers - 1}\n({n_layers + 2})"


def test_dense_runs_are_left_out_of_the_depth_figure(moe, dense):
    figure = plot_agreement_by_depth(pick({"moe": moe, "dense": dense}, "agreement_by_layer"))
    assert "dense" not in " ".join(str(item.get_label()) for item in figure.axes[0].get_lines())
    only = plot_agreement_by_depth(pick({"dense": dense}, "agreement_by_layer"))
    assert "a dense model has none" in words(only)


@pytest.mark.parametrize("space", ["choice", "logit"])
def test_margin_groups_and_flip_curve_are_the_frame(moe, space):
    curve = moe["margin_curve"]
    pooled = curve[(curve["space"] == space) & (curve["layer"] == -1)]
    bins = pooled[(pooled["bin_high"] > 0) & (pooled["n_choices"] > 0)]
    left, right = plot_margins({"moe": curve}, space=space).axes
    for label, counts in (("kept", pooled["n_choices"] - pooled["n_flipped"]), ("flipped", pooled["n_flipped"])):
        stairs = next(p for p in left.patches if str(p.get_label()).startswith(label))
        drawn = stairs.get_data().values
        np.testing.assert_allclose(drawn[drawn > 0], (counts[bins.index] / counts.sum())[counts[bins.index] > 0])
    rates = np.concatenate([c[0].get_ydata() for c in right.containers])
    assert set(rates[~np.isnan(rates)]) == set(pooled.loc[pooled["n_choices"] > 0, "flip_rate"])
    assert ("raw router logits" if space == "logit" else "choice score") in left.get_xlabel()
    assert "exact ties: " in left.get_legend().get_title().get_text()


def test_margin_bins_with_gaps_and_open_ends_keep_their_place(moe):
    curve = moe["margin_curve"]
    gappy = curve[(curve["bin_high"] == 0) | (curve["n_choices"] % 3 > 0)]
    left = plot_margins({"moe": gappy}).axes[0]
    pooled = gappy[(gappy["space"] == "choice") & (gappy["layer"] == -1) & (gappy["n_choices"] > 0)]
    drawn = next(p for p in left.patches if str(p.get_label()).startswith("flipped")).get_data()
    for _, row in pooled[(pooled["bin_low"] > 0) & (pooled["n_flipped"] > 0)].iterrows():
        index = np.flatnonzero(np.isclose(drawn.edges[:-1], row["bin_low"]))
        assert drawn.values[index] == pytest.approx(row["n_flipped"] / pooled["n_flipped"].sum())
    edges = bin_edges(pooled[pooled["bin_high"] > 0])
    assert (np.diff(edges) > 0).all()
    assert np.isfinite(edges).all()


def test_drift_lines_are_the_frame_and_runs_share_the_axis(moe, dense):
    figure = plot_position_drift(pick({"moe": moe, "dense": dense}, "drift_by_position"))
    top = figure.axes[:2]
    for ax, frames in zip(top, (moe, dense), strict=True):
        frame = frames["drift_by_position"]
        for name in ("mean", "p50", "p90", "p99"):
            np.testing.assert_array_equal(line(ax, name).get_ydata(), frame[f"abs_logp_diff_{name}"])
        assert ax.get_yscale() == "log"
    assert top[0].get_ylim() == top[1].get_ylim()
    bars = figure.axes[2].patches
    assert [bar.get_height() for bar in bars] == list(moe["drift_by_position"]["n_tokens"])


def test_negative_margins_are_counted_in_words_and_few_choices_are_not_joined(moe):
    curve = moe["margin_curve"]
    pooled = curve[(curve["space"] == "choice") & (curve["layer"] == -1)]
    few = pooled.assign(n_choices=5, n_flipped=2, flip_rate=0.4).iloc[1:3]
    below = few.iloc[:1].assign(bin_low=-np.inf, bin_high=0.0)
    rest = pooled[pooled["bin_low"] >= few["bin_high"].max()]
    left, right = plot_margins({"moe": pd.concat([below, few, rest])}).axes
    assert "below 0, not drawn: 5 choices" in left.get_legend().get_title().get_text()
    joined = next(c for c in right.containers if c.get_label() == "all layers")
    alone = next(c for c in right.containers if c.get_label().startswith("fewer than"))
    assert len(joined[0].get_xdata()) == (rest["n_choices"] >= 20).sum()
    assert alone[0].get_linestyle() == "None"


def test_title_does_not_compare_with_a_bin_of_survivors(moe):
    frame = moe["drift_by_position"].copy()
    frame.loc[frame.index[-1], ["n_tokens", "abs_logp_diff_mean"]] = [3, 9.0]
    title = plot_position_drift({"moe": frame}).get_suptitle()
    assert "9.00" not in title
    assert "fewer than 100 tokens" in words(plot_position_drift({"moe": frame}))


def test_training_window_is_marked_less_the_prompt_and_explained(moe):
    frame = make_run(n_tokens=4096, n_prompts=16)["drift_by_position"]
    figure = plot_position_drift({"moe": frame}, training_window=200, prompt_length=40)
    assert any(list(item.get_xdata()) == [160, 160] for item in figure.axes[0].get_lines())
    assert "longest prompt 40" in words(figure)
    assert "lie inside it" in words(plot_position_drift({"moe": frame}, training_window=4096))


def test_colours_are_one_per_kind_and_never_shared():
    styles = run_styles({"a": True, "b": False, "c": True, "d": False})
    assert [styles[k].colour for k in "abcd"] == [
        MOE_COLOURS[0], DENSE_COLOURS[0], MOE_COLOURS[1], DENSE_COLOURS[1]
    ]  # fmt: skip
    assert len({str(style.line) for style in styles.values()}) == 4, "grey print needs another line for each"


def test_files_are_deterministic_whole_and_text_stays_text(moe, tmp_path):
    frame = moe["agreement_by_layer"]
    first = save_figure(plot_agreement_by_depth({"moe": frame}), tmp_path / "a", "x")
    second = save_figure(plot_agreement_by_depth({"moe": frame}), tmp_path / "b", "x")
    assert [p.suffix for p in first] == [".png", ".svg"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    svg = first[1].read_text()
    assert "Each layer on its own" in svg
    assert "<dc:date>" not in svg
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["x.png", "x.svg"]


def test_fonts_are_embedded_as_truetype_and_files_carry_their_words(moe, tmp_path):
    figure = plot_agreement_by_depth({"moe": moe["agreement_by_layer"]}, caption="4,096 tokens")
    png, svg, pdf = (path.read_bytes() for path in save_figure(figure, tmp_path, "x", formats(pdf=True)))
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf
    assert b"'DejaVu Sans', Verdana, sans-serif" in svg
    for data in (png, svg):
        assert b"Same experts, moe" in data
        assert b"4,096 tokens" in data


def test_a_full_disk_leaves_the_old_file_and_no_rest(moe, tmp_path, monkeypatch):
    """A disk that fills up while figures are written ended in a traceback."""
    figure = plot_agreement_by_depth({"moe": moe["agreement_by_layer"]})
    (tmp_path / "x.png").write_bytes(b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moediag.run.files.os.fsync", full)
    with pytest.raises(DiskFullError, match="no space to write"):
        save_figure(figure, tmp_path, "x")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.png", b"old")]


def test_a_file_where_the_folder_should_be_is_a_clear_refusal(moe, tmp_path):
    """figures being a file, or a part of its path, ended in a traceback."""
    (tmp_path / "figures").write_text("mine")
    figure = plot_agreement_by_depth({"moe": moe["agreement_by_layer"]})
    for folder in (tmp_path / "figures", tmp_path / "figures" / "deeper"):
        with pytest.raises(RunError, match="cannot write"):
            save_figure(figure, folder, "x")
    assert (tmp_path / "figures").read_text() == "mine"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("self", "no difference, bit for bit"),
        ("one token", "1 token of 1 prompt"),
        ("blank", "no token scored by both arms"),
        ("hostile label", "?"),
    ],
)
def test_odd_runs_are_drawn_with_a_statement_and_no_warning(case, said):
    label = "_$\\frac{$ 模型\n<b>" if case == "hostile label" else "run"
    frames = {
        "self": lambda: make_run(n_tokens=256, scale=0),
        "one token": lambda: make_run(n_tokens=1, n_prompts=1),
        "blank": lambda: make_run(n_tokens=128, is_scored=False),
        "hostile label": lambda: make_run(n_tokens=128, n_layers=2),
    }[case]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = [
            figure1(**{label: frames}),
            plot_agreement_by_depth({label: frames["agreement_by_layer"]}),
            plot_margins({label: frames["margin_curve"]}),
            plot_position_drift({label: frames["drift_by_position"]}),
        ]
        for figure in drawn:
            figure.draw_without_rendering()
    assert said in words(drawn[0])


def test_nothing_at_all_is_a_statement_too():
    specs = (declared.TOKENS, declared.TAIL_CURVE, declared.LOGP_METRICS)
    figure = plot_figure1(*({"x": empty_frame(spec)} for spec in specs))
    figure.draw_without_rendering()
    assert "No token was scored by both arms" in words(figure)
    for plot, spec in (
        (plot_agreement_by_depth, declared.AGREEMENT_BY_LAYER),
        (plot_margins, declared.MARGIN_CURVE),
        (plot_position_drift, declared.DRIFT_BY_POSITION),
    ):
        plot({"x": empty_frame(spec)}).draw_without_rendering()
        plot({}).draw_without_rendering()


def test_all_text_is_inside_the_figure_and_at_least_eight_points(moe, dense):
    long = "Qwen/Qwen3-30B-A3B-Instruct-2507-a-very-long-name"
    deep = make_run(n_tokens=512, n_layers=48)
    runs = {"moe": moe, long: deep, "dense": dense}
    figures = [
        figure1(**runs),
        plot_agreement_by_depth(pick(runs, "agreement_by_layer")),
        plot_margins(pick({"moe": moe, long: deep}, "margin_curve")),
        plot_position_drift(pick(runs, "drift_by_position")),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert box.x0 > -0.05
        assert box.y0 > -0.05
        assert box.x1 < width + 0.05, figure.get_suptitle()
        assert box.y1 < height + 0.05
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 8


def test_drawing_changes_no_frame(moe):
    before = {name: frame.copy() for name, frame in moe.items()}
    figure1(moe=moe)
    plot_margins({"moe": moe["margin_curve"]})
    plot_position_drift({"moe": moe["drift_by_position"]})
    plot_agreement_by_depth({"moe": moe["agreement_by_layer"]})
    for name, frame in moe.items():
        assert frame.equals(before[name])


def test_figures_need_no_pyplot_and_leave_no_settings_behind():
    program = (
        "import sys, matplotlib\n"
        "rc = lambda: {k: v for k, v in matplotlib.rcParams.copy().items() if k != 'backend'}\n"
        "before = rc()\n"
        "from moediag.figures.routing import plot_agreement_by_depth; plot_agreement_by_depth({})\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
        "assert rc() == before"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_percent_keeps_a_hundred_for_every_one():
    assert percent(0.999999) != "100 %"
    assert percent(1.0) == "100 %"
    assert percent(float("nan")) == "–"


@given(st.floats(0, 1) | st.floats(-20, 0).map(lambda x: 10.0**x) | st.floats(-16, 0).map(lambda x: 1 - 10.0**x))
@example(0.99999997)
@example(5e-7)
@example(0.999995)
@example(0.99999)
def test_percent_says_none_and_all_of_nothing_else_and_needs_few_digits(share):
    """Bug: shares were shown as "99.999997 %", "5.0e-05 %" and "~0 %"."""
    text = percent(share)
    number = float(text.strip("<> %"))
    assert ("<" not in text and number == 0) == (share == 0)
    assert (">" not in text and number == 100) == (share == 1)
    assert "e" not in text
    assert sum(character.isdigit() for character in text.lstrip("<>0.")) <= 5
    assert number == pytest.approx(100 * share, rel=0.06, abs=1e-4)


def test_a_ratio_that_is_not_one_is_not_shown_as_one():
    assert number(1 - 3e-8, "1") == "1 − 3.0e-08"
    assert number(1.0, "1") == "1.0000"
    assert number(0.99931, "1") == "0.99931"


def test_figure_text_is_one_drawable_line():
    assert figure_text("_a\n$b$ 模") == r" _a \$b\$ ?"
