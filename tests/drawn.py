"""What a reader sees of a figure, measured: the words and where they stand, the legends and what they cover.

Only what is really drawn counts: matplotlib keeps texts of ticks that are off the axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path as File
from unittest.mock import patch

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from moediag.figures import FULL_WIDTH, save_figure

HIGHEST = 14.0
"""Height [inch] that no figure across a page needs: it would be three screens; in a column it may be longer."""
NARROWEST = 0.35
"""Width and height [inch] below which a panel shows nothing."""
_TOUCH = 1.0
"""Boxes may share that much [pixel at 200 dpi]: they are rounded up, and hold room below the baseline."""


def faults(figure: Figure) -> list[str]:
    """What is wrong with a figure as it reaches the disk, in words; empty when nothing is."""
    save_figure(figure, File(), "nothing", kinds=())  # lays it out as for a file, and writes none
    with _recorded() as texts:
        figure.draw_without_rendering()
    boxes = [(text, box) for text, box in texts if text.get_text().strip()]
    return [
        *_size(figure), *_outside(figure, boxes), *_overlaps(boxes), *_covered(figure), *_cut(figure), *_small(boxes)
    ]  # fmt: skip


@contextmanager
def _recorded() -> Iterator[list[tuple[Text, Bbox]]]:
    """Every text that is drawn, with its box [pixel]."""
    seen: dict[int, tuple[Text, Bbox]] = {}
    draw = Text.draw

    def recording(text: Text, renderer: object, *more: object) -> None:
        if text.get_visible():
            seen[id(text)] = text, Text.get_window_extent(text, renderer)
        draw(text, renderer, *more)

    drawn: list[tuple[Text, Bbox]] = []
    with patch.object(Text, "draw", recording):
        yield drawn
    drawn += seen.values()


def _size(figure: Figure) -> list[str]:
    width, height = figure.get_size_inches()
    found = [] if 0.5 < height < HIGHEST * FULL_WIDTH / width else [f"{width:.1f} by {height:.1f} inches"]
    for ax in figure.axes:
        box = ax.get_window_extent()
        if min(box.width, box.height) < NARROWEST * figure.dpi and ax.get_label() != "<colorbar>":
            found.append(f"a panel of {box.width / figure.dpi:.2f} by {box.height / figure.dpi:.2f} inches")
    return found


def _outside(figure: Figure, boxes: list[tuple[Text, Bbox]]) -> list[str]:
    edge = figure.bbox.padded(_TOUCH)
    found = [f"outside: {_named(text)}" for text, box in boxes if not _holds(edge, box)]
    legends = [legend.get_frame().get_window_extent() for ax in figure.axes if (legend := ax.get_legend())]
    return found + [f"outside: a legend ({box.bounds})" for box in legends if not _holds(edge, box)]


def _holds(outer: Bbox, inner: Bbox) -> bool:
    return bool(inner.x0 >= outer.x0 and inner.y0 >= outer.y0 and inner.x1 <= outer.x1 and inner.y1 <= outer.y1)


def _overlaps(boxes: list[tuple[Text, Bbox]]) -> list[str]:
    return [
        f"on each other: {_named(one)} and {_named(other)}"
        for (one, a), (other, b) in combinations(boxes, 2)
        if a.padded(-_TOUCH).overlaps(b.padded(-_TOUCH))
    ]


def _covered(figure: Figure) -> list[str]:
    """Legends that stand on data, or on words that are not their own."""
    found = []
    for ax in figure.axes:
        if (legend := ax.get_legend()) is None:
            continue
        box = legend.get_frame().get_window_extent()
        found += [f"legend over {_named(text)}" for text in ax.texts if text.get_window_extent().overlaps(box)]
        if inside := Bbox.intersection(box, ax.get_window_extent()):
            found += [f"legend over {what}" for what, path in _data(ax) if path.intersects_bbox(inside, filled=False)]
    return found


def _data(ax: Axes) -> Iterator[tuple[str, Path]]:
    """Name and path [pixel] of what a panel draws at its data; lines across the whole panel are none."""
    for line in ax.get_lines():
        if line.get_transform() == ax.transData and len(line.get_xdata()):
            points = ax.transData.transform(np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float))
            points = points[np.isfinite(points).all(axis=1)]
            joined = line.get_linestyle() not in ("None", " ", "")
            for path in [Path(points)] if joined else [Path([point, point + 0.5]) for point in points]:
                yield f"line {line.get_label()}", path
    for patch_ in ax.patches:
        yield f"bar {patch_.get_label()}", patch_.get_transform().transform_path(patch_.get_path())
    for collection in ax.collections:
        if collection.get_transform() == ax.transData:
            cells = np.ma.getmaskarray(collection.get_array()) if isinstance(collection, QuadMesh) else np.zeros(1)
            drawn = ~np.broadcast_to(cells.ravel().astype(bool), len(collection.get_paths()))
            paths = [path for path, is_drawn in zip(collection.get_paths(), drawn, strict=True) if is_drawn]
            for path in paths:
                corners = path.vertices[np.isfinite(path.vertices).all(axis=1)]
                if len(corners) > 1:
                    yield f"band {collection.get_label()}", Path(ax.transData.transform(corners))


def _cut(figure: Figure) -> list[str]:
    """Markers of which the edge of their panel cuts a part off."""
    found = []
    for ax in figure.axes:
        inside = ax.get_window_extent().padded(_TOUCH)
        for line in ax.get_lines():
            if line.get_marker() in ("None", "|", "_", "", None) or line.get_transform() != ax.transData:
                continue
            points = ax.transData.transform(np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float))
            radius = line.get_markersize() / 2 * figure.dpi / 72
            for x, y in points[np.isfinite(points).all(axis=1)]:
                box = Bbox([[x - radius, y - radius], [x + radius, y + radius]])
                if line.get_clip_on() and inside.contains(x, y) and not _holds(inside, box):
                    found.append(f"a marker of {line.get_label()} cut by the edge")
    return found


def _small(boxes: list[tuple[Text, Bbox]]) -> list[str]:
    return [f"{text.get_fontsize():g} points: {_named(text)}" for text, _ in boxes if text.get_fontsize() < 8]


def _named(text: Text) -> str:
    words = " ".join(text.get_text().split())
    return repr(words if len(words) <= 50 else f"{words[:47]}...")
