"""The figures of a run as a set: which are written, which are left out and why, and that odd runs end in words."""

from __future__ import annotations

import warnings

import pytest
from conftest import HUNT, SEED
from synthetic_runs import make_run

from moediag.corrections import choose
from moediag.figures import (
    COLUMN_WIDTH,
    FIGURES,
    FULL_WIDTH,
    draw_comparison_figures,
    draw_run_figures,
    figures_left_out,
)
from moediag.figures.registry import draw_simulation_figure
from moediag.results.simulation import read_tokens, simulate

pytestmark = pytest.mark.filterwarnings("error")

ROUTING = {name for name, kind in FIGURES.items() if kind.is_routing}
DIFFERENCES = {"tail_curve", "ratio_histogram", "logp_diff_by_p_infer", "position_drift", "sequence_drift", "ladder",
               "layers_apart"}  # fmt: skip


@pytest.fixture(scope="module")
def moe():
    return make_run(has_variants=True)


@pytest.fixture(scope="module")
def dense():
    return make_run(n_tokens=2048, n_layers=0, seed=1)


def test_comparison_writes_every_figure_in_every_format_and_modest_size(moe, dense, tmp_path):
    paths = draw_comparison_figures({"moe": moe, "dense": dense}, tmp_path, kinds=("png", "svg", "pdf"))
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg", "pdf")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    for path in paths:
        assert 5_000 < path.stat().st_size < 250_000, path.name


def test_the_same_frames_give_the_same_bytes(moe, tmp_path):
    first, second = (draw_run_figures(moe, tmp_path / nth, "moe", kinds=("svg",)) for nth in ("a", "b"))
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_a_dense_run_has_no_routing_figure_and_the_reason_is_there(dense, tmp_path):
    written = {
        path.stem for path in draw_run_figures({**dense, "margin_curve": None}, tmp_path, "dense", kinds=["png"])
    }
    left_out = figures_left_out({"dense": dense})
    assert written == {*FIGURES} - ROUTING == {*FIGURES} - {*left_out}
    assert set(left_out.values()) == {"there is no routing to compare: a dense model, or one arm has no routes"}


def test_ids_alone_leave_out_the_figures_of_margins_with_the_reason():
    """Bug: of a run of expert ids alone it was said that an older analysis had not written the frame."""
    assert figures_left_out({"moe": make_run(n_tokens=512, has_scores=False)}) == {
        **dict.fromkeys(("margins", "margins_by_layer"), "no margins were captured (expert ids only)"),
        "explained_flips": "no flip could be explained (neither margins nor router logits of both arms)",
    }


def test_a_self_pair_leaves_out_what_would_be_an_empty_axis():
    frames = make_run(n_tokens=512, scale=0)
    left_out = figures_left_out({"moe": frames})
    assert {name for name, why in left_out.items() if why == "no scored token differs, bit for bit"} == DIFFERENCES
    assert left_out["flip_map"] == "no expert set flipped in 3,072 choices"
    assert {"figure1", "agreement_by_depth", "margins"} == {*FIGURES} - {*left_out}


def test_a_frame_that_an_older_analysis_did_not_write_is_named(moe):
    older = {name: frame for name, frame in moe.items() if name != "expert_swaps"}
    assert figures_left_out({"moe": older}) == {
        "expert_swaps": "its analysis holds no frame expert_swaps; run moediag analyze again"
    }


def test_reasons_of_several_runs_are_told_apart(dense):
    assert (
        "a: there is no routing to compare: a dense model, or one arm has no routes; b: no expert set flipped"
        in (figures_left_out({"a": dense, "b": make_run(n_tokens=512, scale=0)})["flip_map"])
    )


ODD = ("one token", "few tokens", "blank", "self", "one layer", "ids only", "deep", "hostile label", "far ratios")
WIDTHS = (COLUMN_WIDTH, FULL_WIDTH)


@pytest.mark.parametrize(
    ("case", "width"),
    [(case, width) for i, case in enumerate(ODD) for width in (WIDTHS if HUNT > 1 else [WIDTHS[(i + SEED) % 2]])],
)
def test_odd_runs_are_drawn_or_left_out_without_a_warning(case, width, tmp_path):
    """Laid out, not saved: a warning or an error of any figure fails the test.

    Each case in one width, for both widths are drawn of an ordinary run below.
    """
    frames = {
        "one token": lambda: make_run(n_tokens=1, n_prompts=1),
        "few tokens": lambda: make_run(n_tokens=8, n_prompts=4),
        "blank": lambda: make_run(n_tokens=128, is_scored=False),
        "self": lambda: make_run(n_tokens=128, scale=0),
        "one layer": lambda: make_run(n_tokens=512, n_layers=1),
        "ids only": lambda: make_run(n_tokens=512, has_scores=False),
        "deep": lambda: make_run(n_tokens=256, n_layers=94, n_experts=256),
        "hostile label": lambda: make_run(n_tokens=512, n_layers=2),
        "far ratios": lambda: make_run(n_tokens=512, scale=60.0),
    }[case]()
    label = "_$\\frac{$ 模型\n<b>" if case == "hostile label" else "run"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw_run_figures(frames, tmp_path, label, kinds=(), width=width) == []
    assert set(figures_left_out({label: frames})) <= {*FIGURES} - {"figure1"}


def test_few_masks_of_long_names_leave_room_for_their_overlap() -> None:
    """Bug: of three masks the names took the whole height, were cut off, and the layout gave up with a warning."""
    tokens = make_run(n_tokens=512, n_prompts=8)["tokens"]
    simulation = simulate(read_tokens(tokens)[0], choose(["tis_token+geometric_band"], ["verl"]), "few masks")
    figure = draw_simulation_figure("mask_overlap", simulation.frames, "few masks")
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) > -0.02
    assert box.x1 < width + 0.02
    assert box.y1 < height + 0.02
