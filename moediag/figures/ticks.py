"""Ticks of log axes and of layers: few, labelled, and in plain text.

Powers are written with superscript characters, not as math: the label is the same text in SVG and PDF, and no
other font is requested.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

_SUPERSCRIPT: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MAX_LAYER_TICKS: Final = 12


def power(value: float) -> str:
    """A decade as text.

    Example:
        >>> power(1e-4), power(1.0), power(1e5)
        ('10⁻⁴', '1', '10⁵')
    """
    exponent = round(math.log10(value))
    return f"10{str(exponent).translate(_SUPERSCRIPT)}" if exponent else "1"


def log_axis(ax: Axes, which: Literal["x", "y"], low: float, high: float, *, most: int = 7) -> None:
    """Make an axis logarithmic from ``low`` to ``high`` with at most ``most`` labelled decades.

    An axis of less than two decades also gets 2 and 5 labelled: one label alone gives no scale.
    """
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    (ax.set_xlim if which == "x" else ax.set_ylim)(low, high)
    tick_decades(ax.xaxis if which == "x" else ax.yaxis, low, high, most=most)


def tick_decades(axis: Axis, low: float, high: float, *, most: int = 7) -> None:
    """Decades within ``low`` and ``high`` labelled, the steps between them as small ticks."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high / low)
    steps: tuple[float, ...] = (1,) if decades >= 2 else (1, 2, 5) if decades >= 0.6 else (1, 1.5, 2, 3, 5, 7)
    every = max(1, math.ceil((last - first) / most))
    major = [s * 10.0**k for k in range(first, last + 1) if (k - last) % every == 0 for s in steps]
    minor = [s * 10.0**k for k in range(first, last + 1) for s in (range(1, 10) if every == 1 else (1,))]
    labelled = _within(major, low, high)
    if len(labelled) < 2:  # a span between two of them
        labelled = _within(MaxNLocator(4).tick_values(low, high), low, high)
    axis.set_major_locator(FixedLocator(labelled))
    axis.set_minor_locator(FixedLocator(_within(set(minor) - set(labelled), low, high)))
    # One way of writing per axis: plain numbers, or powers as soon as one decade asks for them.
    plain = low >= 0.99e-3 and high < 2e4
    axis.set_major_formatter(FuncFormatter(lambda x, _: _label(x, plain)))
    axis.set_minor_formatter(NullFormatter())


def _label(value: float, plain: bool) -> str:
    exponent = math.log10(value) if value > 0 else 0.0
    is_decade = abs(exponent - round(exponent)) < 1e-9
    return power(value) if is_decade and not plain else f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def _within(values: Iterable[float], low: float, high: float) -> list[float]:
    return sorted(v for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9))


def layer_ticks(deepest: int, most: int = _MAX_LAYER_TICKS) -> list[int]:
    """At most a dozen layers to label, the deepest always among them.

    Example:
        >>> layer_ticks(5), layer_ticks(47)
        ([0, 1, 2, 3, 4, 5], [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 47])
    """
    step = next(s for s in (1, 2, 4, 5, 8, 10, 20, 50, 100, 10**6) if deepest / s <= most)
    # The deepest layer is the one readers look for: its tick stays, a neighbour too close goes.
    return [int(tick) for tick in np.arange(0, deepest, step) if deepest - tick > step / 2] + [deepest]
