"""The figures of one run and of a comparison, drawn, saved and listed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd
from matplotlib.figure import Figure

from moediag.figures.catalogue import FIGURES, Frames, is_moe, reason_left_out
from moediag.figures.density import plot_logp_diff_by_p_infer
from moediag.figures.excess import plot_flip_excess
from moediag.figures.explained import plot_explained_flips
from moediag.figures.flip_counts import plot_flips_per_token
from moediag.figures.flip_maps import plot_flip_map, plot_margins_by_layer
from moediag.figures.floors import AnyFloor
from moediag.figures.logp import plot_figure1, token_counts
from moediag.figures.margins import plot_margins
from moediag.figures.positions import plot_position_drift
from moediag.figures.ratios import plot_ratio_histogram
from moediag.figures.routing import plot_agreement_by_depth
from moediag.figures.sequences import plot_sequence_drift
from moediag.figures.style import FULL_WIDTH, KINDS, caption_text, figure_text, run_styles, save_figure
from moediag.figures.swaps import plot_expert_swaps
from moediag.figures.tails import plot_tail_curve

FIGURE_NAMES: Final = tuple(FIGURES)

_PLOTS: Final[dict[str, Callable[..., Figure]]] = {
    "figure1": plot_figure1,
    "tail_curve": plot_tail_curve,
    "ratio_histogram": plot_ratio_histogram,
    "logp_diff_by_p_infer": plot_logp_diff_by_p_infer,
    "position_drift": plot_position_drift,
    "sequence_drift": plot_sequence_drift,
    "agreement_by_depth": plot_agreement_by_depth,
    "flips_per_token": plot_flips_per_token,
    "flip_map": plot_flip_map,
    "margins": plot_margins,
    "margins_by_layer": plot_margins_by_layer,
    "explained_flips": plot_explained_flips,
    "flip_excess": plot_flip_excess,
    "expert_swaps": plot_expert_swaps,
}

Floors = Mapping[str, AnyFloor]
"""Statistic (:attr:`FigureKind.floor_of`) -> its floor, of one run."""


def draw_run_figures(
    frames: Frames,
    folder: Path,
    label: str,
    *,
    training_window: int | None = None,
    prompt_length: int | None = None,
    floors: Floors | None = None,
    width: float = FULL_WIDTH,
    kinds: Sequence[str] = KINDS,
) -> list[Path]:
    """Draw and save one run's figures; see :func:`draw_comparison_figures`.

    Args:
        frames: frame name -> frame.
        folder: where the files go; made if missing.
        label: how the run is called in legends.
        training_window: trained context length [token, prompt + response], marked in position_drift.
        prompt_length: longest prompt [token].
        floors: statistic -> floor.
        width: of the figures [inch].
        kinds: formats to write.
    """
    return draw_comparison_figures(
        {label: frames},
        folder,
        training_window=training_window,
        prompt_length=prompt_length,
        floors=None if floors is None else {label: floors},
        width=width,
        kinds=kinds,
    )


def draw_comparison_figures(
    runs: Mapping[str, Frames],
    folder: Path,
    *,
    training_window: int | None = None,
    prompt_length: int | None = None,
    floors: Mapping[str, Floors] | None = None,
    width: float = FULL_WIDTH,
    kinds: Sequence[str] = KINDS,
) -> list[Path]:
    """Draw and save the figures of several runs side by side, each run with one colour throughout.

    Runs that cannot fill a figure are left out of it; a figure that no run fills is not written, and
    :func:`figures_left_out` says why.

    Args:
        runs: label -> (frame name -> frame).
        folder: where the files go; made if missing.
        training_window: trained context length [token, prompt + response], marked in position_drift.
        prompt_length: longest prompt [token].
        floors: label -> (statistic -> floor).
        width: of the figures [inch].
        kinds: formats to write.

    Returns:
        The files written, PNG first, in the order of :data:`FIGURES`.
    """
    drift = {"training_window": training_window, "prompt_length": prompt_length}
    written = []
    for name in FIGURES:
        options = {**(drift if name == "position_drift" else {}), "width": width}
        figure = draw_figure(name, runs, floors, **options)
        written += [] if figure is None else save_figure(figure, folder, name, kinds)
    return written


def draw_figure(
    name: str, runs: Mapping[str, Frames], floors: Mapping[str, Floors] | None = None, **options: Any
) -> Figure | None:
    """One figure of the catalogue, of the runs that fill it; None when none does.

    Args:
        name: key of :data:`FIGURES`.
        runs: label -> (frame name -> frame).
        floors: label -> (statistic -> floor).
        options: what the figure's own function takes beside frames, styles, caption and floor.
    """
    kind = FIGURES[name]
    styles = run_styles({label: is_moe(frames["tokens"]) for label, frames in runs.items() if "tokens" in frames})
    shown = {label: runs[label] for label in styles if not reason_left_out(name, runs[label])}
    if not shown:
        return None
    return _PLOTS[name](
        *(_each(shown, frame) for frame in kind.frames),
        styles=styles,
        caption=caption_text(token_counts(_each(shown, "tokens"))),
        floor={label: (floors or {}).get(label, {}).get(kind.floor_of) for label in shown},
        **options,
    )


def figures_left_out(runs: Mapping[str, Frames]) -> dict[str, str]:
    """Figure name -> why it is not written, for the figures that none of the runs fills.

    Args:
        runs: label -> (frame name -> frame); one run for what :func:`draw_run_figures` leaves out.
    """
    reasons: dict[str, str] = {}
    for name in FIGURES:
        why = {label: reason_left_out(name, frames) for label, frames in runs.items()}
        if all(why.values()):
            said = dict.fromkeys(why.values())
            each = (f"{figure_text(label)}: {reason}" for label, reason in why.items())
            reasons[name] = next(iter(said), "no run") if len(said) <= 1 else "; ".join(each)
    return reasons


def _each(runs: Mapping[str, Frames], name: str) -> dict[str, pd.DataFrame]:
    """The frame of that name, of every run that has it."""
    return {label: frames[name] for label, frames in runs.items() if frames.get(name) is not None}
