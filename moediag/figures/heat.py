"""Heat maps: tables drawn as cells, with a bar that says what the colour means.

Invariants: an empty cell stays white and is never drawn as 0; cells that stand on few choices are hatched; many
cells become one picture in SVG and PDF.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from moediag.figures.floors import share
from moediag.figures.style import GREY, HEAT
from moediag.figures.ticks import layer_ticks, power

MANY_CELLS: Final = 400
"""From that many cells on, they are one picture: a viewer draws thousands of small polygons slowly."""

FloatArray = npt.NDArray[np.float64]


def draw_cells(ax: Axes, x_edges: FloatArray, y_edges: FloatArray, values: FloatArray, norm: Normalize) -> Any:
    """Cells of ``values`` (rows = y); NaN is left white. Returns what a colour bar takes."""
    mesh = ax.pcolormesh(x_edges, y_edges, values, cmap=HEAT, norm=norm, linewidth=0)
    mesh.set_rasterized(values.size > MANY_CELLS)
    ax.grid(False)
    return mesh


def hatch_thin(ax: Axes, x_edges: FloatArray, y_edges: FloatArray, thin: npt.NDArray[np.bool_]) -> bool:
    """Hatch the cells that stand on few choices; returns whether there are any."""
    squares = [Path(np.array([[x_edges[c], y_edges[r]], [x_edges[c + 1], y_edges[r]], [x_edges[c + 1], y_edges[r + 1]],
                              [x_edges[c], y_edges[r + 1]], [x_edges[c], y_edges[r]]]), closed=True)
               for r, c in np.argwhere(thin)]  # fmt: skip
    if squares:
        cells = Path.make_compound_path(*squares)
        ax.add_patch(PathPatch(cells, facecolor="none", edgecolor=GREY, hatch="//////", linewidth=0))
    return bool(squares)


def rate_norm(values: FloatArray, at_least: float = 0.01) -> Normalize:
    """From 0 to the largest rate: a map of rates starts at none."""
    return Normalize(0.0, max(float(np.nanmax(values, initial=0.0)), at_least))


def count_norm(most: float, least: float = 1.0) -> Normalize:
    """Counts on a log scale."""
    return LogNorm(least, max(most, 2.0 * least))


def rate_bar(mesh: Any, axes: Axes | Sequence[Axes], words: str, floor: float | None = None) -> Colorbar:
    """The colour bar of a map of rates, in per cent, with the floor marked."""
    bar = _bar(mesh, axes, words)
    bar.locator = MaxNLocator(5)
    bar.formatter = FuncFormatter(lambda x, _: f"{100 * x:.4g} %")
    bar.update_ticks()
    if floor is not None and floor <= mesh.norm.vmax:
        bar.ax.axhline(floor, color="white", linewidth=3)
        bar.ax.axhline(floor, color="black", linewidth=1.2)
        bar.set_label(f"{words} (line: floor, {share(floor)})")
    return bar


def count_bar(mesh: Any, axes: Axes | Sequence[Axes], words: str) -> Colorbar:
    """The colour bar of a map of counts."""
    bar = _bar(mesh, axes, words)
    few = mesh.norm.vmax < 100
    bar.locator = LogLocator(10, (1, 2, 5) if few else (1,))
    bar.formatter = FuncFormatter(lambda x, _: f"{x:g}" if x < 1e4 else power(x))
    bar.minorlocator = NullLocator()
    bar.update_ticks()
    return bar


def _bar(mesh: Any, axes: Axes | Sequence[Axes], words: str) -> Colorbar:
    first = axes if isinstance(axes, Axes) else axes[0]
    figure = first.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.06, aspect=25)
    bar.set_label(words)
    bar.outline.set_linewidth(0.5)
    return bar


def layer_axis(ax: Axes, layers: Sequence[int]) -> FloatArray:
    """Layers upwards on the y axis, the first MoE layer at the bottom; returns the cells' edges."""
    deepest = max(layers)
    ticks = layer_ticks(deepest, 8)
    ax.set_yticks(ticks, [str(tick) for tick in ticks])
    ax.set_ylabel("MoE layer")
    return np.asarray(np.arange(deepest + 2) - 0.5, np.float64)
