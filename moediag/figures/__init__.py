"""Figures: declared frames in, drawn figures out; nothing is computed here beyond what drawing takes."""

from moediag.figures.logp import plot_figure1
from moediag.figures.margins import plot_margins
from moediag.figures.positions import plot_position_drift
from moediag.figures.routing import plot_agreement_by_depth
from moediag.figures.sets import FIGURE_NAMES, draw_comparison_figures, draw_run_figures
from moediag.figures.style import NO_FLOOR, first_of_each_kind, save_figure

__all__ = [
    "FIGURE_NAMES",
    "NO_FLOOR",
    "draw_comparison_figures",
    "draw_run_figures",
    "first_of_each_kind",
    "plot_agreement_by_depth",
    "plot_figure1",
    "plot_margins",
    "plot_position_drift",
    "save_figure",
]
