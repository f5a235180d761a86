"""The figures of one run and of a comparison, drawn, saved and listed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from moediag.figures.logp import is_moe, plot_figure1, token_counts
from moediag.figures.margins import plot_margins
from moediag.figures.positions import plot_position_drift
from moediag.figures.routing import plot_agreement_by_depth
from moediag.figures.style import caption_text, run_styles, save_figure

Frames = Mapping[str, pd.DataFrame]
"""Frame name, as declared, -> frame, of one run."""

FIGURE_NAMES = ("figure1", "agreement_by_depth", "margins", "position_drift")


def draw_run_figures(
    frames: Frames,
    folder: Path,
    label: str,
    *,
    training_window: int | None = None,
    prompt_length: int | None = None,
) -> list[Path]:
    """Draw and save one run's figures; see :func:`draw_comparison_figures`.

    Args:
        frames: frame name -> frame.
        folder: where PNG and SVG go; made if missing.
        label: how the run is called in legends.
        training_window: trained context length [token, prompt + response], marked in position_drift.
        prompt_length: longest prompt [token].
    """
    return draw_comparison_figures(
        {label: frames}, folder, training_window=training_window, prompt_length=prompt_length
    )


def draw_comparison_figures(
    runs: Mapping[str, Frames],
    folder: Path,
    *,
    training_window: int | None = None,
    prompt_length: int | None = None,
) -> list[Path]:
    """Draw and save the figures of several runs side by side, each run with one colour throughout.

    Dense runs are left out of the routing figures; with dense runs only, those figures are not written.

    Args:
        runs: label -> (frame name -> frame).
        folder: where PNG and SVG go; made if missing.
        training_window: trained context length [token, prompt + response], marked in position_drift.
        prompt_length: longest prompt [token].

    Returns:
        The files written, PNG before SVG, in the order of :data:`FIGURE_NAMES`.
    """
    tokens = _each(runs, "tokens")
    styles = run_styles({label: is_moe(frame) for label, frame in tokens.items()})
    caption = caption_text(token_counts(tokens))
    figures = {
        "figure1": plot_figure1(
            tokens, _each(runs, "tail_curve"), _each(runs, "logp_metrics"), styles=styles, caption=caption
        ),
        "position_drift": plot_position_drift(
            _each(runs, "drift_by_position"),
            training_window=training_window,
            prompt_length=prompt_length,
            styles=styles,
            caption=caption,
        ),
    }
    moe_runs = {label: frames for label, frames in runs.items() if label in styles and styles[label].is_moe}
    if moe_runs:
        layers, curves = _each(moe_runs, "agreement_by_layer"), _each(moe_runs, "margin_curve")
        routed = caption_text(token_counts(_each(moe_runs, "tokens")))
        figures["agreement_by_depth"] = plot_agreement_by_depth(layers, styles=styles, caption=routed)
        figures["margins"] = plot_margins(curves, styles=styles, caption=routed)
    return [path for name in FIGURE_NAMES if name in figures for path in save_figure(figures[name], folder, name)]


def _each(runs: Mapping[str, Frames], name: str) -> dict[str, pd.DataFrame]:
    """The frame of that name, of every run that has it."""
    return {label: frames[name] for label, frames in runs.items() if frames.get(name) is not None}
