"""What is declared once: metrics, columns and figures, and that nothing a user reads comes from a second list."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from matplotlib.text import Text
from synthetic import make_block, make_pair
from synthetic_runs import make_run

import moediag
import moediag.results.simulation
from moediag.analysis.flips.explained import METHOD_WORDS, flip_headlines
from moediag.analysis.metrics import METRICS
from moediag.figures import FIGURES, SIMULATION_FIGURES
from moediag.frames import Column, declared, declared_frames, measured, share, with_ci
from moediag.report import markdown_page, run_page
from moediag.report.run_page import SECTIONS
from moediag.results.pair_analysis import analyze_pair
from moediag.results.pair_summary import pair_summary

PACKAGE = Path(moediag.__file__).parent


def test_no_verdict_is_promised_that_is_never_given() -> None:
    """Bug: pages knew a verdict "bug signature", which no run ever got."""
    assert not [path for path in sorted(PACKAGE.rglob("*.py")) if "bug signature" in path.read_text()]


def test_a_method_has_the_same_words_in_the_figure_and_in_the_table() -> None:
    """Bug: one page said "every pair of experts" under the figure and "all pairs" in the table below."""
    frames = make_run(n_tokens=512)
    page = markdown_page(run_page({**frames.summary(), "predicted_flips": flip_headlines(frames)}, frames, []))
    kind = FIGURES["explained_flips"]
    figure = kind.plot(*({"moe": frames[name]} for name in kind.frames))
    drawn = " ".join(text.get_text() for text in figure.findobj(Text)).replace("\n", " ")
    assert f"Explained from {METHOD_WORDS['all_pairs']}" in drawn
    assert f"| all | {METHOD_WORDS['all_pairs']} |" in page


def test_the_share_that_a_floor_is_made_of_is_found_where_the_analysis_puts_it() -> None:
    """Bug: the floors looked for "icepop_0.5_5.0", which only by luck was what the analysis called the band."""
    analysis = analyze_pair(make_pair(make_block(diff_scale=0.5)))
    value = METRICS["masked_share"].value(pair_summary(analysis))
    assert value is not None
    assert value > 0
    assert value in set(analysis.corrections["masked_share"])


def test_no_figure_takes_what_it_does_not_use() -> None:
    """Bug: two figures took styles and deleted them in their first line, since all signatures had to be alike."""
    for path in sorted((PACKAGE / "figures").glob("*.py")):
        assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Delete)], path.name


def test_every_metric_is_where_its_declaration_says() -> None:
    """Of a routed pair with a difference, every declared metric but the exact ones has its place in the summary."""
    pair = pair_summary(analyze_pair(make_pair(make_block(diff_scale=0.5))))
    for metric in METRICS.values():
        if not metric.name.endswith("_exact"):
            assert metric.is_measured(pair), metric.name
            assert metric.value(pair) is not None or metric.name == "abs_logp_diff.p999", metric.name  # too few tokens
            assert metric.n(pair), metric.name


def test_sections_that_declarations_name_are_there() -> None:
    anchors = {place.anchor for place in SECTIONS}
    named = {metric.section for metric in METRICS.values()} | {spec.section for spec in declared_frames()}
    assert named | {kind.section for kind in FIGURES.values()} <= anchors | {""}
    assert {frame for kind in (FIGURES | SIMULATION_FIGURES).values() for frame in kind.frames} <= {
        spec.name for spec in declared_frames()
    }


def test_whoever_is_shown_has_a_label() -> None:
    shown = [metric for metric in METRICS.values() if metric.section or metric.is_headline or metric.on_terminal]
    labels = [metric.label for metric in shown]
    assert all(labels)
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("column", "value", "header", "text"),
    [
        (share("flip_rate", ""), 0.0312, "flip rate", "3.12 %"),
        (measured("p99", "nat", ""), 0.01481, "p99 [nat]", "0.0148"),
        (measured("ratio", "1", "", kind="times"), 2.24, "ratio", "2.2×"),
        (Column("n_tokens", "int64", "token", ""), 4096, "n tokens", "4,096"),
        (Column("layer", "int64", "1", ""), -1, "layer", "all"),
        (Column("first_flipped_layer", "int16", "1", ""), -1, "first flipped layer", "–"),
        (Column("is_known", "bool", "1", ""), True, "is known", "yes"),
        (measured("value", "nat", ""), float("nan"), "value [nat]", "–"),
    ],
)
def test_a_column_prints_itself(column: Column, value: object, header: str, text: str) -> None:
    assert (column.header, column.text(value)) == (header, text)


def test_bounds_are_declared_with_their_column() -> None:
    value, low, high = with_ci(share("flip_rate", "their share"))
    assert (low.name, high.name) == ("flip_rate_ci_low", "flip_rate_ci_high")
    assert low.kind == high.kind == value.kind
    assert declared("tail_curve")["share_above_ci_low"].unit == "1"
