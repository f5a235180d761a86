"""Figures: declared frames in, drawn figures out; nothing is computed here beyond what drawing takes."""

from moediag.figures.catalogue import FIGURES, FigureKind, reason_left_out
from moediag.figures.density import plot_logp_diff_by_p_infer
from moediag.figures.excess import plot_flip_excess
from moediag.figures.explained import plot_explained_flips
from moediag.figures.flip_counts import plot_flips_per_token
from moediag.figures.flip_maps import plot_flip_map, plot_margins_by_layer
from moediag.figures.floors import Floor, summary_floors
from moediag.figures.logp import plot_figure1
from moediag.figures.margins import plot_margins
from moediag.figures.positions import plot_position_drift
from moediag.figures.ratios import plot_ratio_histogram
from moediag.figures.routing import plot_agreement_by_depth
from moediag.figures.sequences import plot_sequence_drift
from moediag.figures.sets import (
    FIGURE_NAMES,
    draw_comparison_figures,
    draw_figure,
    draw_run_figures,
    figures_left_out,
)
from moediag.figures.style import COLUMN_WIDTH, FULL_WIDTH, NO_FLOOR, first_of_each_kind, save_figure
from moediag.figures.swaps import plot_expert_swaps
from moediag.figures.tails import plot_tail_curve

__all__ = [
    "COLUMN_WIDTH",
    "FIGURES",
    "FIGURE_NAMES",
    "FULL_WIDTH",
    "NO_FLOOR",
    "FigureKind",
    "Floor",
    "draw_comparison_figures",
    "draw_figure",
    "draw_run_figures",
    "figures_left_out",
    "first_of_each_kind",
    "plot_agreement_by_depth",
    "plot_expert_swaps",
    "plot_explained_flips",
    "plot_figure1",
    "plot_flip_excess",
    "plot_flip_map",
    "plot_flips_per_token",
    "plot_logp_diff_by_p_infer",
    "plot_margins",
    "plot_margins_by_layer",
    "plot_position_drift",
    "plot_ratio_histogram",
    "plot_sequence_drift",
    "plot_tail_curve",
    "reason_left_out",
    "save_figure",
    "summary_floors",
]
