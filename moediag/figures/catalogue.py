"""Every figure of a run: its file name, what it is called, how to read it, and why a run may lack it.

Invariants: the keys of :data:`FIGURES` are the file names and their order is the order of the files; a figure
that a run cannot fill is left out, and :func:`reason_left_out` says why in words that a report can print.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from moediag.analysis.tokens import logp_diff, scored_tokens
from moediag.numbers import count

MIN_CHOICES: Final = 20
"""A cell's rate stands on at least that many choices, or the cell is hatched."""

Frames = Mapping[str, pd.DataFrame]
"""Frame name, as declared, -> frame, of one run."""

NOT_THERE: Final = "its analysis holds no frame {}; run moediag analyze again"
DENSE: Final = "a dense model has no routing"
NO_DIFFERENCE: Final = "no scored token differs, bit for bit"
NOT_SCORED: Final = "no token was scored by both arms"
NO_FLIP: Final = "no expert set flipped"
TOO_FEW: Final = "no cell of the map holds 20 choices"
NO_EXPLANATION: Final = "no flip could be explained (neither margins nor router logits of both arms)"
NO_MARGINS: Final = "no margins were captured (expert ids only)"


@dataclass(frozen=True)
class FigureKind:
    """What does not depend on the numbers; the finding is the figure's own title.

    Args:
        title: what it shows, for headings and alternative text.
        caption: how to read it, one or two sentences.
        frames: frames it draws; without the first it cannot be drawn.
        floor_of: the statistic whose floor it shows, as named in summary.json.
        is_routing: whether it needs expert routing (absent for dense runs).
    """

    title: str
    caption: str
    frames: tuple[str, ...]
    floor_of: str
    is_routing: bool = False


FIGURES: Final[dict[str, FigureKind]] = {
    "figure1": FigureKind(
        "How far apart the log-probabilities are: body and tail",
        "Left: tokens by size of abs(logp_train − logp_infer), differences of 0 apart. Right: share of tokens beyond.",
        ("tokens", "tail_curve", "logp_metrics"),
        "abs_logp_diff.mean",
    ),
    "tail_curve": FigureKind(
        "Extreme tokens: F(tau), the share whose ratio leaves [1/tau, tau]",
        "The band is the 95 % interval, clustered by prompt; below 1/n the data end, not the tail.",
        ("tail_curve", "logp_metrics"),
        "extreme_share_2",
    ),
    "ratio_histogram": FigureKind(
        "Ratio pi_train / pi_infer and the IcePop band",
        "Tokens outside the closed band 0.5 to 5 would get no update.",
        ("tokens", "corrections"),
        "masked_share",
    ),
    "logp_diff_by_p_infer": FigureKind(
        "Size of the difference against the probability that infer gave the token",
        "Density of tokens; the line is the mean per stratum of p_infer. Rounding to bf16 shows as regular stripes.",
        ("tokens", "metrics_by_stratum"),
        "abs_logp_diff.mean",
    ),
    "position_drift": FigureKind(
        "Difference by position in the response",
        "Mean with its 95 % interval, median, p90 and p99 per bin of positions; below, the tokens behind every bin.",
        ("drift_by_position",),
        "abs_logp_diff.mean",
    ),
    "sequence_drift": FigureKind(
        "Log-ratio of whole responses against their length",
        "One point per response: log(pi_train / pi_infer) of the product over its tokens; bars are means per bin.",
        ("sequences", "drift_by_length"),
        "abs_log_ratio_mean",
    ),
    "agreement_by_depth": FigureKind(
        "Same experts by depth, per layer and cumulative",
        "Share of tokens whose expert set is the same in both arms: in each layer, and in all layers up to it.",
        ("agreement_by_layer",),
        "flip_rate",
        is_routing=True,
    ),
    "flips_per_token": FigureKind(
        "Flipped layers per token against independence",
        "Share of tokens with that many flipped layers; open: what independent layers of the same rates would give.",
        ("flips_per_token",),
        "any_layer_share",
        is_routing=True,
    ),
    "flip_map": FigureKind(
        "Flip rate by layer and position",
        "Share of expert sets that differ, per MoE layer and bin of positions in the response.",
        ("flips_by_layer_position",),
        "flip_rate",
        is_routing=True,
    ),
    "margins": FigureKind(
        "Margins of flipped and of kept choices, and how often a choice flips",
        "Left: margins of the choices that flipped and that did not. Right: P(flip | margin).",
        ("margin_curve",),
        "flip_rate",
        is_routing=True,
    ),
    "margins_by_layer": FigureKind(
        "Margins and flips layer by layer",
        "Left: where the margins of a layer lie. Right: P(flip | margin) of each layer; the mark is its noise sigma.",
        ("margin_curve", "margin_noise"),
        "flip_rate",
        is_routing=True,
    ),
    "explained_flips": FigureKind(
        "Flips observed, explained by noise at near ties, and forecast for the noise of other pairs",
        "Left: flip rate by layer; explained from one side's scores and the noise of other prompts of this pair, "
        "forecast for this pair if it had the noise of another. Right: predicted against observed shares; on the "
        "diagonal the explanation is right.",
        ("explained_flips", "flip_calibration", "forecast_flips"),
        "flip_rate",
        is_routing=True,
    ),
    "flip_excess": FigureKind(
        "How much more flipped tokens differ than unflipped ones like them",
        "Mean difference of tokens by number of flipped layers, with unflipped tokens of the same p_infer, entropy and "
        "position, and the excess by first flipped layer. Difficulty that these do not show is not controlled: an "
        "association, only forcing the routes shows a cause.",
        ("flip_excess",),
        "abs_logp_diff.mean",
        is_routing=True,
    ),
    "expert_swaps": FigureKind(
        "Which experts stand in for each other",
        "Flips that exchange exactly one expert. Near ties swap both ways about equally often; one direction only "
        "points at a shifted score in one of the engines.",
        ("expert_swaps",),
        "flip_rate",
        is_routing=True,
    ),
}
"""File name (without suffix) -> what the figure is; not every run has every figure."""


def reason_left_out(name: str, frames: Frames) -> str:
    """Why a run's frames do not fill the figure, as a clause; empty when they do.

    ``figure1`` is never left out while its frames are there: that no token differs is its finding.
    """
    kind = FIGURES[name]
    tokens = frames.get("tokens")
    is_dense = tokens is not None and not is_moe(tokens)
    if kind.is_routing and is_dense:
        return DENSE
    if frames.get(kind.frames[0]) is None:
        return NOT_THERE.format(kind.frames[0])
    return _REASONS[name](frames) if name in _REASONS else ""


def is_moe(tokens: pd.DataFrame) -> bool:
    """Whether a token frame is of a run with routing (a dense run has -1 in every row)."""
    return bool((tokens["n_flipped_layers"] >= 0).any())


def _no_difference(frames: Frames) -> str:
    tokens = scored_tokens(frames["tokens"])
    if tokens.empty:
        return NOT_SCORED
    return "" if bool(np.any(logp_diff(tokens))) else NO_DIFFERENCE


def _no_tail(frames: Frames) -> str:
    curve = frames["tail_curve"]
    if not (curve["n_tokens"] > 0).any():
        return NOT_SCORED
    return "" if (curve["n_above"] > 0).any() else NO_DIFFERENCE


def _no_drift(frames: Frames) -> str:
    mean = frames["drift_by_position"]["abs_logp_diff_mean"]
    if not mean.notna().any():
        return NOT_SCORED
    return "" if mean.max() > 0 else NO_DIFFERENCE


def _no_sequences(frames: Frames) -> str:
    rows = frames["sequences"]
    drawn = rows.loc[rows["n_tokens"] > 0, "log_ratio_sum"]
    if not drawn.notna().any():
        return NOT_SCORED
    return "" if (drawn != 0).any() else NO_DIFFERENCE


def _no_layers(frames: Frames) -> str:
    return "" if frames["agreement_by_layer"]["same_set_rate"].notna().any() else "no routing row was compared"


def _no_flipped_token(frames: Frames) -> str:
    rows = frames["flips_per_token"]
    flipped = rows.loc[rows["n_flipped_layers"] > 0, "n_tokens"].sum()
    return "" if flipped else f"{NO_FLIP} in {count(rows['n_tokens'].sum(), 'routed token')}"


def _no_flip_in_map(frames: Frames) -> str:
    rows = frames["flips_by_layer_position"]
    if not rows["n_flipped"].sum():
        return f"{NO_FLIP} in {count(rows['n_choices'].sum(), 'choice')}"
    return "" if (rows["n_choices"] >= MIN_CHOICES).any() else TOO_FEW


def _no_margins(frames: Frames) -> str:
    return "" if frames["margin_curve"]["n_choices"].sum() > 0 else NO_MARGINS


def _no_margins_by_layer(frames: Frames) -> str:
    rows = frames["margin_curve"]
    if _no_margins(frames):
        return NO_MARGINS
    if not ((rows["layer"] >= 0) & (rows["bin_high"] > 0) & (rows["n_choices"] >= MIN_CHOICES)).any():
        return TOO_FEW
    return "" if rows["n_flipped"].sum() else f"{NO_FLIP} in {count(_pooled_choices(rows), 'choice')}"


def _no_explanation(frames: Frames) -> str:
    rows = frames["explained_flips"]
    if not rows["explained"].notna().any():
        return NO_EXPLANATION
    return "" if rows["observed"].max() > 0 else f"{NO_FLIP} in {count(rows['n_choices'].max(), 'choice')}"


def _pooled_choices(rows: pd.DataFrame) -> int:
    first = next(iter(rows["space"]))
    return int(rows.loc[(rows["layer"] == -1) & (rows["space"] == first), "n_choices"].sum())


def _no_excess(frames: Frames) -> str:
    rows = frames["flip_excess"]
    if rows.empty:
        return f"{NO_FLIP} on a scored token"
    if not rows["excess"].notna().any():
        return "no unflipped token stands in the strata of the flipped ones"
    return "" if rows["flipped_mean"].max() > 0 or rows["unflipped_mean"].max() > 0 else NO_DIFFERENCE


def _no_swaps(frames: Frames) -> str:
    return "no flip exchanged exactly one expert" if frames["expert_swaps"].empty else ""


_REASONS: Final[dict[str, Callable[[Frames], str]]] = {
    "tail_curve": _no_tail,
    "ratio_histogram": _no_difference,
    "logp_diff_by_p_infer": _no_difference,
    "position_drift": _no_drift,
    "sequence_drift": _no_sequences,
    "agreement_by_depth": _no_layers,
    "flips_per_token": _no_flipped_token,
    "flip_map": _no_flip_in_map,
    "margins": _no_margins,
    "margins_by_layer": _no_margins_by_layer,
    "explained_flips": _no_explanation,
    "flip_excess": _no_excess,
    "expert_swaps": _no_swaps,
}
