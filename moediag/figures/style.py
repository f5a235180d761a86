"""One house style: what every figure looks like, and how it reaches the disk.

Invariants: no pyplot, no global state left behind (rcParams hold inside :data:`house_style` only); the
same frame gives the same bytes; a file appears whole or not at all; user text is drawn, never parsed.

Colours are Okabe and Ito's (colour-blind safe). Warm = MoE, solid; cool = dense, dashed: a figure
still reads in grey print.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine

from moediag.figures.numbers import count
from moediag.run.files import write_atomic

INK: Final = "#222222"
GREY: Final = "#7A7A7A"
LIGHT: Final = "#DDDDDD"
MOE_COLOURS: Final = ("#D55E00", "#CC79A7", "#E69F00")
DENSE_COLOURS: Final = ("#0072B2", "#009E73", "#56B4E9")
MOE_LINES: Final = ("-", (0, (7, 1.5)), (0, (4, 1, 1, 1)))
DENSE_LINES: Final = ((0, (3, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS: Final = ("o", "s", "^", "D", "v", "P")

NO_FLOOR: Final = "no A/A floor was measured"
"""The floor statement of this version; a number without a floor is about the pair, not about the engines."""

_RC: Final[dict[str, Any]] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": LIGHT,
    "figure.titlesize": 11.0,
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
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # text stays text: searchable, small
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
    """The line under a figure: n tokens and n prompts per run, then the statement about the floor.

    Args:
        tokens: label -> (scored response tokens, prompts).

    Example:
        >>> caption_text({"moe": (16384, 64)})
        'moe: 16,384 tokens of 64 prompts. Floor: no A/A floor was measured.'
    """
    parts = [f"{figure_text(k)}: {count(n, 'token')} of {count(p, 'prompt')}" for k, (n, p) in tokens.items()]
    return f"{'; '.join(parts) or 'no tokens'}. Floor: {NO_FLOOR}."


def new_figure(width: float, height: float) -> Figure:
    """An empty figure [inch] with constrained layout; no pyplot, so nothing to close."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))


def add_words(figure: Figure, title: str, caption: str) -> None:
    """Set the finding above and the caption (small) below the axes, wrapped to the figure's width."""
    width = figure.get_figwidth()
    # Characters per inch of DejaVu Sans, a little on the safe side: 11 pt and 8 pt.
    words = "\n".join(textwrap.fill(line, int(width * 10.5)) for line in title.split("\n"))
    figure.suptitle(words, x=0.01, ha="left", fontweight="bold")
    if caption:
        figure.supxlabel(textwrap.fill(caption, int(width * 14.5)), x=0.01, ha="left", fontsize=8, color="#444444")


def state(ax: Axes, words: str) -> None:
    """Write why a panel is empty, in the panel: a reader must not take nothing for zero."""
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.text(0.5, 0.5, textwrap.fill(words, 44), transform=ax.transAxes, ha="center", va="center", color=GREY)


@house_style
def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.png`` (160 dpi) and ``name.svg``, deterministic and each whole or not at all.

    Returns:
        The two paths, PNG first.

    Raises:
        DiskFullError: no space.
        RunError: the folder cannot be written.
    """
    metadata: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": "moediag"}}
    paths = []
    for kind in ("png", "svg"):
        sink = io.BytesIO()
        figure.savefig(sink, format=kind, dpi=160, metadata=metadata[kind])
        write_atomic(folder / f"{name}.{kind}", sink.getvalue())
        paths.append(folder / f"{name}.{kind}")
    return paths
