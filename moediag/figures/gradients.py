"""The gradient audit drawn: direction of every correction's update against a reference, its bias and its noise."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moediag.analysis.gradients import FARTHER, NEARER
from moediag.figures.registry import SIMULATION_FIGURES, Panel, figure
from moediag.figures.style import (
    GREY,
    INK,
    LIGHT,
    add_words,
    figure_text,
    figure_width,
    is_column,
    new_figure,
    state,
)
from moediag.numbers import count, sig

_REFERENCES: Final = {
    "sequence_is": ("sequence IS", "#0072B2", "o"),
    "exact": ("one-token, exact", "#D55E00", "D"),
}
"""Reference -> how it is called and drawn; the self-normalised one has the same direction."""

_SAME: Final = 1e-9
"""Relative difference from the reference below which a correction is the reference."""

_ROW: Final = 0.185
"""Height [inch] of one method."""


@figure(
    "gradient_cosines", "gradient_audit",
    title="Direction of the update under every correction",
    caption="Cosine between a correction's gradient and the reference, a panel per group of parameters.",
    section="gradients",
    into=SIMULATION_FIGURES,
)  # fmt: skip
def plot_gradient_cosines(audit: pd.DataFrame, *, panel: Panel) -> Figure:
    """Draw the cosine between every correction's gradient and the references, a panel per parameter group.

    Args:
        audit: frame ``gradient_audit``.
    """
    parts, methods = _by_reference(audit), _methods(audit)
    columns = 1 if is_column(panel.width) else min(2, max(len(parts), 1))
    figure, panels = _grid(max(len(parts), 1), columns, len(methods), panel.width)
    for ax, ((group, reference), rows) in zip(panels, parts, strict=False):
        _draw_batch(ax, rows, methods, reference)
        _draw(ax, rows, methods, "cosine", reference)
        ax.set_title(f"{figure_text(group)}, {_REFERENCES[reference][0]}")
        ax.set_xlabel("cosine to the reference, 1 = same")
    if not parts:
        state(panels[0], "No gradient was audited.")
    note = (
        "Filled: noise removed (bars: 95 % over prompts, where they can be had); absent where an expected gradient is "
        "not above its noise. Open: this batch, whose noise both gradients share; grey stroke: what noise alone gives. "
        "One-token, exact: expected one-token gradient over infer's prefixes, summed; corrections of whole sequences "
        "have none."
    )
    add_words(figure, cosine_finding(audit), panel.caption, _counts(audit), note, _own_note(audit))
    return figure


@figure(
    "gradient_bias_variance", "gradient_audit",
    title="Bias and variance of the update under every correction",
    caption="Left: difference from the reference beside what chance gives. Right: variance over prompts.",
    section="gradients",
    into=SIMULATION_FIGURES,
)  # fmt: skip
def plot_gradient_bias_variance(audit: pd.DataFrame, *, panel: Panel) -> Figure:
    """Draw bias beside its floor, and variance beside the reference's, of every correction; a row per group.

    Args:
        audit: frame ``gradient_audit``.
    """
    parts, methods = _by_reference(audit), _methods(audit)
    columns = 1 if is_column(panel.width) else 2
    figure, panels = _grid(max(2 * len(parts), 1), columns, len(methods), panel.width)
    for nth, ((group, reference), rows) in enumerate(parts):
        left, right = panels[2 * nth : 2 * nth + 2]
        _draw_floors(left, rows, methods)
        _draw(left, rows, methods, "batch_relative_bias", reference)
        _draw(right, rows, methods, "variance_ratio", reference)
        left.set_title(f"{figure_text(group)}, {_REFERENCES[reference][0]}: difference")
        right.set_title("Variance")
        reach = float(np.nanmax(rows[["batch_relative_bias", "bias_floor"]].to_numpy(float), initial=0.0)) or 1.0
        left.set_xlim(-0.04 * reach, 1.08 * reach)
        left.set_xlabel("difference / reference, norms")
        right.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (1, 1.5)))
        right.set_xlabel("variance / reference's")
    if not parts:
        state(panels[0], "No gradient was audited.")
    note = (
        "Inside the grey bar a difference is no larger than chance (95 %) makes it for a "
        "method without bias. Variance: between prompts, the reference's = 1 (dotted), bars: 95 % over prompts."
    )
    add_words(figure, bias_finding(audit), panel.caption, _counts(audit), note, _own_note(audit))
    return figure


def short_method(method: str) -> str:
    """A correction in words, short enough for an axis.

    Example:
        >>> short_method("icepop:alpha=0.5,beta=5"), short_method("none"), short_method("tis_token:cap=2+veto")
        ('icepop 0.5/5', 'none', 'tis_token 2 + veto')
    """
    parts = []
    for step in method.split("+"):
        name, _, parameters = step.partition(":")
        values = [pair.partition("=")[2] for pair in parameters.split(",") if pair]
        parts.append(" ".join([name, "/".join(values)]).strip())
    return " + ".join(parts)


def cosine_finding(audit: pd.DataFrame) -> str:
    """The title: which corrections point nearer to the reference than none, and of how many nothing can be told."""
    groups_of: dict[tuple[str, str], list[str]] = {}
    for (group, reference), rows in _by_reference(audit):
        others = rows[(rows["method"] != "none") & ~_is_reference(rows)]
        words: list[str] = []
        for verdict, n in others["verdict"].value_counts(sort=False).items():
            if verdict in (NEARER, FARTHER):
                these = _list(others.loc[others["verdict"] == verdict, "method"])
                words.insert(0, f"{these} {verdict!s} than no correction")
            else:
                words.append(f"{verdict!s}: {n} of {len(others)}")
        groups_of.setdefault((reference, "; ".join(words) or "no other correction"), []).append(group)
    return _lines("Direction", groups_of)


def bias_finding(audit: pd.DataFrame) -> str:
    """The title: what no correction and the nearest one leave of a difference, and whose is more than chance.

    A correction may well be nearer than none and still leave more than chance: this title says both.
    """
    groups_of: dict[tuple[str, str], list[str]] = {}
    for (group, reference), rows in _by_reference(audit):
        rows = rows[~_is_reference(rows) & rows["batch_relative_bias"].notna()].set_index("method")
        left = rows["batch_relative_bias"]
        words = [f"{sig(left['none'], 2)} of its length without correction"] if "none" in left.index else []
        others = left.drop("none", errors="ignore")
        words += [f"least {sig(others.min(), 2)} ({short_method(str(others.idxmin()))})"] if len(others) else []
        # where one prompt decides everything its difference is the floor, but for rounding
        above = rows.index[left > (1 + 1e-9) * rows["bias_floor"]]
        words.append(f"more than chance: {_list(above)}" if len(above) else "none more than chance")
        groups_of.setdefault((reference, "; ".join(words)), []).append(group)
    return _lines("Difference", groups_of)


def _is_reference(rows: pd.DataFrame) -> pd.Series:
    """Corrections whose update is the reference itself: a sequence weight that no sequence is heavy enough for."""
    return (rows["method"] != "none") & (rows["batch_relative_bias"] < _SAME)


def _own_note(audit: pd.DataFrame) -> str:
    """Says which corrections are compared with themselves: their cosine of 1 and bias of 0 are no finding."""
    drawn = audit[audit["reference"].isin(_REFERENCES)]
    own = list(dict.fromkeys(drawn.loc[_is_reference(drawn), "method"]))
    return f"Cuts no sequence weight here, so is the reference itself and no finding: {_list(own)}." if own else ""


def _lines(of: str, groups_of: dict[tuple[str, str], list[str]]) -> str:
    """One line per finding, the groups that share it together."""
    lines = [
        f"{of}, {', '.join(map(figure_text, groups))} against {_REFERENCES[reference][0]}: {words}"
        for (reference, words), groups in groups_of.items()
    ]
    return "\n".join(lines) or "No gradient was audited"


def _by_reference(audit: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    drawn = audit[audit["reference"].isin(_REFERENCES)]
    return [((str(group), str(ref)), rows) for (group, ref), rows in drawn.groupby(["group", "reference"], sort=False)]


def _list(methods: Iterable[str]) -> str:
    """Up to four names; more are counted."""
    names = [short_method(method) for method in methods]
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _methods(audit: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(audit["method"]))


def _grid(n_panels: int, columns: int, n_methods: int, width: float) -> tuple[Figure, list[Axes]]:
    rows = math.ceil(n_panels / columns)
    figure = new_figure(width, rows * (0.75 + _ROW * max(n_methods, 3)))
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).ravel())
    for ax in axes[n_panels:]:
        ax.remove()
    return figure, axes[:n_panels]


def _draw(ax: Axes, rows: pd.DataFrame, methods: list[str], name: str, reference: str) -> None:
    """One marker with its interval per method, none at the top."""
    _, colour, marker = _REFERENCES[reference]
    own = rows[rows[name].notna()]
    place = [methods.index(method) for method in own["method"]]
    values, bars = own[name].to_numpy(), None
    if f"{name}_ci_low" in own.columns:
        low, high = own[name] - own[f"{name}_ci_low"], own[f"{name}_ci_high"] - own[name]
        bars = np.vstack([low.clip(lower=0), high.clip(lower=0)])
    ax.errorbar(values, place, xerr=bars, fmt=marker, color=colour, markersize=3.6, capsize=1.5, elinewidth=0.9)
    ax.set_yticks(
        range(len(methods)),
        [figure_text(short_method(method), 14 if is_column(figure_width(ax)) else 24) for method in methods],
    )
    ax.set_ylim(len(methods) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.7g}")  # no offset: 0.99999 and not 1e-5 + 1


def _draw_batch(ax: Axes, rows: pd.DataFrame, methods: list[str], reference: str) -> None:
    """The batch's own cosine, open, and a stroke at the one that noise alone gives."""
    _, colour, marker = _REFERENCES[reference]
    place = [methods.index(method) for method in rows["method"]]
    ax.plot(rows["noise_cosine"], place, "|", color=GREY, markersize=11, markeredgewidth=1.6)
    ax.plot(rows["batch_cosine"], place, marker, color=colour, markersize=4.6, markerfacecolor="none")


def _draw_floors(ax: Axes, rows: pd.DataFrame, methods: list[str]) -> None:
    for method, floor in zip(rows["method"], rows["bias_floor"], strict=True):
        if not math.isnan(floor):
            ax.barh(methods.index(method), floor, height=0.8, color=LIGHT, linewidth=0)


def _counts(audit: pd.DataFrame) -> str:
    parts = []
    for reference, (words, _, _) in _REFERENCES.items():
        rows = audit[audit["reference"] == reference]
        if len(rows):
            row = rows.iloc[0]
            unit = "prefix" if reference == "exact" else "token"
            tokens = count(row["n_tokens"], unit, "prefixes" if reference == "exact" else "tokens")
            sizes = f"{count(row['n_prompts'], 'prompt')}, {count(row['n_sequences'], 'sequence')}, {tokens}"
            parts.append(f"{words}: {sizes}.")
    return " ".join(parts)
