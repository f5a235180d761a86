"""The figures of a simulation: which there are, how to read them, drawing and saving them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pandas as pd
from matplotlib.figure import Figure

from moediag.corrections.correction import Step, parse_correction
from moediag.figures.catalogue import FigureKind
from moediag.figures.corrections_masks import plot_mask_overlap, plot_masked_shares
from moediag.figures.corrections_sweep import plot_band_frontier
from moediag.figures.corrections_tokens import plot_masked_entropy, plot_ratio_bands
from moediag.figures.gradients import plot_gradient_bias_variance, plot_gradient_cosines
from moediag.figures.style import FULL_WIDTH, KINDS, caption_text, save_figure

__all__ = [
    "SIMULATION_FIGURES",
    "draw_simulation_figures",
    "plot_band_frontier",
    "plot_mask_overlap",
    "plot_masked_entropy",
    "plot_masked_shares",
    "plot_ratio_bands",
    "ratio_bands",
]

Band = tuple[float, float]
Frames = Mapping[str, pd.DataFrame]

SIMULATION_FIGURES: Final[dict[str, FigureKind]] = {
    "masked_shares": FigureKind(
        "Share of tokens that every correction masks",
        "All corrections on the same logged tokens; masked = weight 0, no update. Figure-10-style.",
        ("correction_statistics",),
        "",
    ),
    "masked_entropy": FigureKind(
        "Entropy of masked tokens",
        "Left: one correction's masked tokens against all tokens, Figure-11-style. Right: means of every correction.",
        ("masked_entropy", "correction_statistics"),
        "",
    ),
    "ratio_bands": FigureKind(
        "Ratio pi_train / pi_infer and the bands on it",
        "Tokens by ratio, both axes logarithmic; tokens beyond the axis are counted at its edge.",
        ("ratio_counts",),
        "",
    ),
    "band_frontier": FigureKind(
        "Masked share against the k3 that is left, band by band",
        "Every point is a band of the ratio. Left and low is good; on the frontier one is paid for with the other.",
        ("sweep_by_band",),
        "",
    ),
    "mask_overlap": FigureKind(
        "Overlap of the masks",
        "Row by row: of the tokens that this correction masks, the share that another one masks, too.",
        ("overlap",),
        "",
    ),
    "gradient_cosines": FigureKind(
        "Direction of the update under every correction",
        "Cosine between a correction's gradient and the reference, a panel per group of parameters.",
        ("gradient_audit",),
        "",
    ),
    "gradient_bias_variance": FigureKind(
        "Bias and variance of the update under every correction",
        "Left: difference from the reference beside what chance gives. Right: variance over prompts.",
        ("gradient_audit",),
        "",
    ),
}
"""File name (without suffix) -> what the figure is; one whose first frame is missing is left out."""


def draw_simulation_figures(
    frames: Frames, folder: Path, label: str, *, width: float = FULL_WIDTH, kinds: Sequence[str] = KINDS
) -> list[Path]:
    """Draw and save the figures of a simulation.

    Args:
        frames: frame name -> frame.
        folder: where the files go; made if missing.
        label: what was simulated, for captions.
        width: of the figures [inch].
        kinds: formats to write.

    Returns:
        The files written, PNG first, in the order of :data:`SIMULATION_FIGURES`.
    """
    written = []
    for name in simulation_figures_of(frames):
        written += save_figure(draw_simulation_figure(name, frames, label, width=width), folder, name, kinds)
    return written


def simulation_figures_of(frames: Frames) -> list[str]:
    """Names of the figures that a simulation's frames fill, in the order of :data:`SIMULATION_FIGURES`."""
    return [name for name, kind in SIMULATION_FIGURES.items() if _can_be_drawn(name, kind, frames)]


def draw_simulation_figure(name: str, frames: Frames, label: str, *, width: float = FULL_WIDTH) -> Figure:
    """One figure of a simulation that its frames fill; see :func:`draw_simulation_figures`."""
    statistics = frames["correction_statistics"]
    counts = statistics.iloc[0][["n_tokens", "n_prompts"]].astype(int) if len(statistics) else None
    return _plot(name, frames, "" if counts is None else caption_text({label: (counts.iloc[0], counts.iloc[1])}), width)


def _can_be_drawn(name: str, kind: FigureKind, frames: Frames) -> bool:
    first = frames.get(kind.frames[0])
    if first is None or first.empty:
        return False
    return name != "mask_overlap" or first.loc[first["n_masked"] > 0, "correction"].nunique() > 1


def ratio_bands(frames: Frames) -> dict[str, Band]:
    """The bands on the token ratio among the corrections, and the recommended one first where there is one."""
    bands: dict[str, Band] = {}
    recommended = frames.get("recommended_band")
    if recommended is not None and len(recommended) and math.isfinite(recommended.iloc[0]["alpha"]):
        row = recommended.iloc[0]
        bands[f"recommended: {row['alpha']:.3g} to {row['beta']:.3g}"] = (float(row["alpha"]), float(row["beta"]))
    for words in frames["correction_statistics"]["words"]:
        steps = parse_correction(words).steps
        if len(steps) == 1 and (band := _band(steps[0])):
            bands[words] = band
    return bands


def _band(step: Step) -> Band | None:
    return step.bounds if step.declared.masks == "token" and step.declared.bounded.ratio else None


def _plot(name: str, frames: Frames, caption: str, width: float) -> Figure:
    if name == "masked_shares":
        return plot_masked_shares(frames["correction_statistics"], caption=caption, width=width)
    if name == "masked_entropy":
        return plot_masked_entropy(
            frames["masked_entropy"], frames["correction_statistics"], caption=caption, width=width
        )
    if name.startswith("gradient"):
        plot = plot_gradient_cosines if name == "gradient_cosines" else plot_gradient_bias_variance
        return plot(frames["gradient_audit"], width=width)
    bands = ratio_bands(frames)
    if name == "ratio_bands":
        return plot_ratio_bands(frames["ratio_counts"], bands, caption=caption, width=width)
    if name == "mask_overlap":
        return plot_mask_overlap(frames["overlap"], caption=caption, width=width)
    in_use = {words: band for words, band in bands.items() if words.startswith("icepop:")}
    return plot_band_frontier(
        frames["sweep_by_band"], frames.get("recommended_band"), in_use, caption=caption, width=width
    )
