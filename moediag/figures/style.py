"""One house style: what every figure looks like, and how it reaches the disk.

Invariants: no pyplot, no global state left behind (rcParams hold inside :data:`house_style` only); the
same frame gives the same bytes; a file appears whole or not at all; user text is drawn, never parsed.

Colours are Okabe and Ito's (colour-blind safe). Warm = MoE, solid; cool = dense, dashed: a figure
still reads in grey print.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import AutoLocator, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from moediag.numbers import count
from moediag.run.files import write_atomic

INK: Final = "#222222"
GREY: Final = "#7A7A7A"
LIGHT: Final = "#DDDDDD"
MOE_COLOURS: Final = ("#D55E00", "#CC79A7", "#E69F00")
DENSE_COLOURS: Final = ("#0072B2", "#009E73", "#56B4E9")
MOE_LINES: Final = ("-", (0, (7, 1.5)), (0, (4, 1, 1, 1)))
DENSE_LINES: Final = ((0, (3, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS: Final = ("o", "s", "^", "D", "v", "P")

HALO: Final = (withStroke(linewidth=2.5, foreground="white"),)
"""Path effect of words that may stand on data."""

NO_FLOOR: Final = "no A/A floor was measured"
"""Said where no floor is given: such a number is about the pair, not about the engines."""

FULL_WIDTH: Final = 6.2
COLUMN_WIDTH: Final = 3.4
"""Width [inch] of a figure across the page, and in one column of a two-column page."""

HEAT: Final = "magma_r"
"""The map of every heat map: lightness falls evenly (grey print, colour blindness), empty cells stay white."""

KINDS: Final = ("png", "svg")
"""Formats that every figure is written in."""
_DPI: Final = 200
_SCREEN_DPI: Final = 120
_TITLE_SIZE: Final = 9.5
_PANEL_SIZE: Final = 8.5
_BESIDE: Final = 0.4  # what a centred label may take of the room beside its panel [inch]
_FINE: Final = 10

_RC: Final[dict[str, Any]] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.0,
    "axes.titlesize": _PANEL_SIZE,
    "axes.labelsize": 8.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": LIGHT,
    "figure.titlesize": _TITLE_SIZE,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "text.color": INK,
    "text.parse_math": True,  # tick labels are math (10^-3); user text goes through figure_text
    "text.usetex": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.5,
    "image.cmap": HEAT,
    "svg.fonttype": "none",  # text stays text: searchable, small
    "pdf.fonttype": 42,  # TrueType: publishers refuse Type 3
    "svg.hashsalt": "moediag",  # else element ids differ from run to run
    "path.simplify": False,
}

house_style = rc_context(cast(Any, _RC))
"""Decorator of every function that makes or saves a figure."""


@dataclass(frozen=True)
class RunStyle:
    """How one run is drawn, in every figure of a set."""

    colour: str
    line: Any
    marker: str
    is_moe: bool


def run_styles(is_moe: Mapping[str, bool]) -> dict[str, RunStyle]:
    """A style per run label: warm and solid for MoE, cool and dashed for dense, in the order given.

    Example:
        >>> styles = run_styles({"moe": True, "dense": False})
        >>> styles["moe"].colour, styles["dense"].colour
        ('#D55E00', '#0072B2')
    """
    styles: dict[str, RunStyle] = {}
    seen = {True: 0, False: 0}
    for index, (label, moe) in enumerate(is_moe.items()):
        colours, lines = (MOE_COLOURS, MOE_LINES) if moe else (DENSE_COLOURS, DENSE_LINES)
        nth = seen[moe]
        seen[moe] += 1
        styles[label] = RunStyle(
            colours[nth % len(colours)], lines[nth % len(lines)], MARKERS[index % len(MARKERS)], moe
        )
    return styles


def series_styles(labels: Sequence[str]) -> dict[str, RunStyle]:
    """A style per series of steps, whatever its model: all colours in turn, then the same with other lines.

    Example:
        >>> [style.colour for style in series_styles(["none", "TIS", "IcePop"]).values()]
        ['#D55E00', '#0072B2', '#009E73']
    """
    colours = (MOE_COLOURS[0], *DENSE_COLOURS[:2], *MOE_COLOURS[1:], DENSE_COLOURS[2])
    lines = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
    return {
        label: RunStyle(colours[nth % 6], lines[nth // 6 % 4 or nth % 3], MARKERS[nth % 6], True)
        for nth, label in enumerate(labels)
    }


def styles_of(frames: Mapping[str, pd.DataFrame]) -> dict[str, RunStyle]:
    """The styles of runs of which only one frame is known: MoE, unless the frame says that nothing was routed."""
    return run_styles({label: _is_routed(frame) for label, frame in frames.items()})


def _is_routed(frame: pd.DataFrame) -> bool:
    if "n_flipped_layers" in frame.columns:
        return bool((frame["n_flipped_layers"] >= 0).any())
    return "flip_rate" not in frame.columns or bool(frame["flip_rate"].notna().any())


def first_of_each_kind(is_moe: Mapping[str, bool]) -> tuple[str | None, str | None]:
    """The first MoE run and the first dense run, in the order given: the two that ratios are of.

    Example:
        >>> first_of_each_kind({"a": False, "b": True, "c": True}), first_of_each_kind({"b": True})
        (('b', 'a'), ('b', None))
    """
    moe, dense = (next((label for label, moe in is_moe.items() if moe is kind), None) for kind in (True, False))
    return moe, dense


@cache
def _drawable() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def figure_text(text: str, width: int = 32) -> str:
    r"""User text made safe to draw: one line, not math, only glyphs the font has, not too long.

    A ``$`` would start math (a parse error kills the figure) and a leading ``_`` hides a legend entry.

    Example:
        >>> figure_text("_run $x$\nb")
        ' _run \\$x\\$ b'
        >>> figure_text("a-very-long-model-name-that-goes-on-and-on", 16)
        'a-very-l…n-and-on'
    """
    line = " ".join(str(text).split())
    if len(line) > width:
        half = width // 2
        line = f"{line[:half]}…{line[-half:]}"
    line = "".join(char if ord(char) in _drawable() else "?" for char in line)
    return (" " + line if line.startswith("_") else line).replace("$", r"\$")


def caption_text(tokens: Mapping[str, tuple[int, int]]) -> str:
    """The line under a figure: n tokens and n prompts per run.

    Args:
        tokens: label -> (scored response tokens, prompts).

    Example:
        >>> caption_text({"moe": (16384, 64)})
        'moe: 16,384 tokens of 64 prompts.'
    """
    parts = [f"{figure_text(k)}: {count(n, 'token')} of {count(p, 'prompt')}" for k, (n, p) in tokens.items()]
    return f"{'; '.join(parts) or 'no tokens'}."


def is_column(width: float) -> bool:
    """Whether a figure of that width [inch] has room for one panel beside another."""
    return width < 5.0


def name_width(width: float) -> int:
    """Characters of a name at the left of a panel that leave room for the panel itself."""
    return 18 if is_column(width) else 34


def figure_width(ax: Axes) -> float:
    """Width [inch] of the figure that a panel stands in."""
    figure = ax.get_figure(root=True)
    return FULL_WIDTH if figure is None else figure.get_figwidth()


class ShownFigure(Figure):
    """A figure that a notebook shows by itself: no pyplot, no backend to choose."""

    @house_style
    def _repr_png_(self) -> bytes:
        sink = io.BytesIO()
        self.savefig(sink, format="png", dpi=_SCREEN_DPI)
        return sink.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure [inch] with constrained layout; no pyplot, so nothing to close."""
    return ShownFigure(figsize=(width, height), dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05))


def panel_grid(
    n_panels: int, width: float, height: float, columns: int = 2, **subplots: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with that many panels, row by row; one under the other where the figure is a column wide.

    Args:
        n_panels: panels needed, at least one is made.
        width: of the figure [inch].
        height: of one row [inch].
        columns: panels beside each other at full width.
        subplots: passed to ``Figure.subplots``.
    """
    n_panels = max(n_panels, 1)
    columns = 1 if is_column(width) else min(columns, n_panels)
    rows = math.ceil(n_panels / columns)
    figure = new_figure(width, rows * height)
    axes = list(figure.subplots(rows, columns, squeeze=False, **subplots).ravel())
    for ax in axes[n_panels:]:
        ax.remove()
    return figure, axes[:n_panels]


def label_outer(panels: Sequence[Axes], label: str) -> None:
    """Name the y axis that panels share, once a row."""
    for ax in panels:
        spec = ax.get_subplotspec()
        ax.set_ylabel(label if spec is None or spec.is_first_col() else "")


def wrapped(text: str, width: float, size: float, weight: str = "normal") -> str:
    """``text`` in lines of at most ``width`` [inch], measured in the font that draws it."""
    lines, free = [""], width
    for word in re.split(" (?!%)", text):
        needed = _length(f" {word}" if lines[-1] else word, size, weight)
        if lines[-1] and needed > free:
            lines.append(word)
            free = width - _length(word, size, weight)
        else:
            lines[-1] += f" {word}" if lines[-1] else word
            free -= needed
    return "\n".join(lines)


@cache
def _length(word: str, size: float, weight: str) -> float:
    """Length of a word [inch]; kept, for measuring takes longer than drawing."""
    font = get_font(findfont(FontProperties(family="DejaVu Sans", weight=weight)))
    font.set_size(size, 72 * _FINE)  # at the drawn size every letter is rounded up to a pixel
    font.set_text(f"{word}.")  # trailing and leading room counts, but no letter
    with_dot = font.get_width_height()[0]
    font.set_text(".")
    return float(with_dot - font.get_width_height()[0]) / 64 / 72 / _FINE


def _broken(text: str, width: float) -> str:
    """The lines of a text, each in lines of at most ``width`` [inch]."""
    return "\n".join(wrapped(line, width, _PANEL_SIZE) for line in text.split("\n"))


def _room(ax: Axes) -> float:
    """About the width of a panel [inch], before it is laid out."""
    spec, figure = ax.get_subplotspec(), ax.get_figure(root=True)
    return figure_width(ax) * (spec.get_position(figure).width if spec and figure else 1.0)


def _break_label(ax: Axes) -> int:
    """Break the x axis's label where it would run into the next panel's; returns its lines."""
    ax.set_xlabel(_broken(ax.get_xlabel(), _room(ax) + _BESIDE))
    return 1 + ax.get_xlabel().count("\n")


def add_words(figure: Figure, title: str, *notes: str) -> None:
    """Set the finding above and the notes (small, empty ones left out) below; the figure grows by their lines.

    Titles of panels and labels of x axes are broken where their panel ends, beside which the next one begins.
    """
    for ax in figure.axes:
        ax.set_title(_broken(ax.get_title(loc="left"), _room(ax)))
        _break_label(ax)
        for axis in (ax.xaxis, ax.yaxis):
            if isinstance(axis.get_major_locator(), AutoLocator):  # more ticks, longer labels once there is room for
                axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))  # more: outside what was laid out
    caption = " ".join(filter(None, notes))
    width, height = figure.get_size_inches()
    words = "\n".join(wrapped(line, width - 0.2, _TITLE_SIZE, "bold") for line in title.split("\n"))
    figure.suptitle(words, x=0.01, ha="left", fontweight="bold")
    note = wrapped(caption, width - 0.2, 8)
    if caption:
        figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color="#444444")
    lines = (1 + words.count("\n")) * _TITLE_SIZE * 1.25 + (1 + note.count("\n")) * 8 * 1.25 * bool(caption)
    figure.set_size_inches(width, height + lines / 72)


def legend_below(
    ax: Axes, handles: Sequence[Any], names: Sequence[str], *, columns: int = 2, down: float = 0.4, **options: Any
) -> None:
    """A legend under the axis label, ``down`` [inch] below the axis, where it cannot cover data."""
    if handles:
        columns = 1 if is_column(figure_width(ax)) else columns
        down += 0.14 * (_break_label(ax) - 1)
        below = ax.transAxes + ScaledTranslation(0, -down, ax.figure.dpi_scale_trans)
        ax.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=columns,
                  columnspacing=1.0, handlelength=1.6, borderaxespad=0, **options)  # fmt: skip


def state(ax: Axes, words: str) -> None:
    """Write why a panel is empty, in the panel: a reader must not take nothing for zero."""
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.text(0.5, 0.5, textwrap.fill(words, 44), transform=ax.transAxes, ha="center", va="center", color=GREY)


def formats(pdf: bool) -> tuple[str, ...]:
    """Formats to write: PDF only on request, for it takes longest (its fonts are cut to the letters used)."""
    return (*KINDS, "pdf") if pdf else KINDS


@house_style
def save_figure(figure: Figure, folder: Path, name: str, kinds: Sequence[str] = KINDS) -> list[Path]:
    """Write ``name.png`` (200 dpi), ``name.svg`` and the like, deterministic and each whole or not at all.

    The finding and the caption stand in the files' metadata, too: a picture that travels keeps its words.

    Returns:
        The paths, PNG first.

    Raises:
        DiskFullError: no space.
        RunError: the folder cannot be written.
    """
    # Laid out once: the files are one figure, and the layout is what takes the time. With any engine left, even
    # "none", savefig would draw every file twice.
    if engine := figure.get_layout_engine():
        engine.execute(figure)
    figure.set_layout_engine(None)
    metadata = _metadata(figure)
    paths = []
    for kind in kinds:
        sink = io.BytesIO()
        figure.savefig(sink, format=kind, dpi=_DPI, metadata=metadata[kind])
        data = sink.getvalue()
        if kind == "svg":  # where the reader has no DejaVu, a sans with its widths, not the browser's serif
            data = data.replace(b"'DejaVu Sans'", b"'DejaVu Sans', Verdana, sans-serif")
        write_atomic(folder / f"{name}.{kind}", data)
        paths.append(folder / f"{name}.{kind}")
    return paths


def _metadata(figure: Figure) -> dict[str, dict[str, Any]]:
    """Title and caption for each format; no time and no version, which would change the bytes."""
    title, caption = (" ".join(words.replace(r"\$", "$").split()) for words in (
        figure.get_suptitle(), figure.get_supxlabel()))  # fmt: skip
    return {
        "png": {"Software": None, "Title": _latin(title), "Description": _latin(caption)},
        "svg": {"Date": None, "Creator": "moediag", "Title": title, "Description": caption},
        "pdf": {"Creator": "moediag", "Producer": None, "CreationDate": None, "Title": title, "Subject": caption},
    }


def _latin(text: str) -> str:
    """PNG's plain text chunks hold Latin-1 only."""
    plain = text.translate({0x2212: "-", 0x2013: "-", 0x2026: "...", 0x2265: ">=", 0x2264: "<="})
    return plain.encode("latin-1", "replace").decode("latin-1")
