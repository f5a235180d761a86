"""Figures: declared frames in, drawn figures out; nothing is computed here beyond what drawing takes.

Importing this package imports every module of it, and with them every figure declares itself.
"""

from importlib import import_module
from pkgutil import iter_modules

from moediag.figures.floors import Floor, summary_floors
from moediag.figures.registry import (
    FIGURES,
    KEY_FIGURE,
    SIMULATION_FIGURES,
    TREND_FIGURES,
    draw_comparison_figures,
    draw_figure,
    draw_run_figures,
    draw_simulation_figures,
    figures_left_out,
    reason_left_out,
)
from moediag.figures.style import COLUMN_WIDTH, FULL_WIDTH, save_figure

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "COLUMN_WIDTH",
    "FIGURES",
    "FULL_WIDTH",
    "KEY_FIGURE",
    "SIMULATION_FIGURES",
    "TREND_FIGURES",
    "Floor",
    "draw_comparison_figures",
    "draw_figure",
    "draw_run_figures",
    "draw_simulation_figures",
    "figures_left_out",
    "reason_left_out",
    "save_figure",
    "summary_floors",
]
