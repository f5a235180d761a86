"""Floors: what the same engine shows against itself, drawn beside the numbers that have to rise above it.

Invariant: a floor that was not measured is said, never drawn as 0; a floor of 0 is said, not drawn: a line at 0 would
look like a measured size. It is "bit-exact" only where both engines repeated themselves bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from matplotlib.axes import Axes

from moediag.figures.style import GREY, HALO, NO_FLOOR, figure_text
from moediag.notation import INFER, TRAIN
from moediag.numbers import percent, sig


@dataclass(frozen=True)
class Floor:
    """A measured floor of one statistic.

    Args:
        value: in the unit of the statistic; 0 where no token of the engine's own repetition shows any.
        name: which comparisons it comes from, e.g. ``infer~infer-repeat + train~train-repeat``.
    """

    value: float
    name: str


AnyFloor = Floor | Literal["bit-exact"] | None
"""A number with its name, bit-exact, or None = no floor measured."""

_LOWEST_LABEL: Final = 0.08
"""Share of a panel's height that a label under a line takes."""

FloorArgument = AnyFloor | Mapping[str, AnyFloor]
"""One floor for every run of a figure, or run label -> floor."""


def summary_floors(floors: Mapping[str, Any] | None) -> dict[str, AnyFloor]:
    """The entry ``floors`` of summary.json as figures take it; nothing where nothing was measured.

    Example:
        >>> metrics = {"flip_rate": {"floor": 0.004}, "mean_ratio": {"floor": None}}
        >>> summary_floors({"train": {"pair": "train~train-repeat"}, "infer": None, "metrics": metrics})
        {'flip_rate': Floor(value=0.004, name='train~train-repeat only')}
    """
    if floors is None:
        return {}
    sides = [str(floors[side]["pair"]) for side in (TRAIN, INFER) if floors.get(side)]
    name = " + ".join(sides) if len(sides) == 2 else f"{' '.join(sides)} only"
    exact = [share for side in (TRAIN, INFER) if (share := (floors.get(side) or {}).get("bit_exact_share")) is not None]
    name += f"; bit-exact on {percent(min(exact))} of tokens" if exact else ""
    known = {metric: found for metric, found in floors["metrics"].items() if found["floor"] is not None}
    return {
        metric: "bit-exact" if found.get("is_bit_exact") else Floor(float(found["floor"]), name)
        for metric, found in known.items()
    }


def floor_of(floor: FloorArgument, label: str) -> AnyFloor:
    """The floor of one run."""
    return floor.get(label) if isinstance(floor, Mapping) else floor


def nat(value: float) -> str:
    """A size in nat, for captions."""
    return f"{sig(value, 2)} nat"


def floor_words(
    floor: FloorArgument, of: str, labels: Mapping[str, object], words: Callable[[float], str] = nat
) -> str:
    """The caption's sentence about the floor; runs with the same floor share it, without a run there is none.

    Args:
        floor: as given to a figure.
        of: the statistic in words.
        labels: the runs drawn.
        words: how a value is printed.

    Example:
        >>> floor_words(None, "mean", {"moe": 1})
        'Floor: no A/A floor was measured.'
        >>> floor_words(Floor(0.0031, "repeats"), "the mean", {"moe": 1})
        'Floor of the mean: 0.0031 nat (repeats).'
    """
    runs_of: dict[str, list[str]] = {}
    for label in labels:
        runs_of.setdefault(_statement(floor_of(floor, label), of, words), []).append(figure_text(label))
    if len(runs_of) == 1:
        return next(iter(runs_of))
    return " ".join(f"{', '.join(runs)}: {statement}" for statement, runs in runs_of.items())


def _statement(floor: AnyFloor, of: str, words: Callable[[float], str]) -> str:
    if floor is None:
        return f"Floor: {NO_FLOOR}."
    if not isinstance(floor, Floor):
        return f"Floor of {of}: bit-exact."
    return f"Floor of {of}: {words(floor.value)} ({figure_text(floor.name, 100)})."


def share(value: float) -> str:
    """A share as per cent, for captions."""
    return percent(value)


def floor_value(floor: FloorArgument, label: str) -> float | None:
    """The value to draw: None where there is no floor, or one of exactly 0."""
    found = floor_of(floor, label)
    return found.value if isinstance(found, Floor) and found.value > 0 else None


def draw_floor(ax: Axes, value: float | None, *, beyond: float = 0.0) -> None:
    """A labelled line at the floor and a light band from it towards agreement; nothing where it is off the axis.

    Args:
        ax: its y axis is the statistic.
        value: where; None draws nothing.
        beyond: the value of perfect agreement, where the band ends.
    """
    if value is None:
        return
    low, high = sorted((value, beyond))
    limits = ax.get_ylim()
    if not limits[0] <= value <= limits[1]:
        return
    ax.axhspan(max(low, limits[0]), min(high, limits[1]), color=GREY, alpha=0.13, linewidth=0)
    ax.axhline(value, color=GREY, linewidth=1.0, linestyle=(0, (6, 2)))
    above_axis = ax.transAxes.inverted().transform(ax.transData.transform((1.0, value)))[1]
    # The label stands on the far side of agreement's band, unless it would fall out of the panel there.
    side = "bottom" if value < beyond or above_axis < _LOWEST_LABEL else "top"
    ax.annotate("floor", (1.0, value), (-2, 1 if side == "bottom" else -1), xycoords=ax.get_yaxis_transform(),
                textcoords="offset points", ha="right", va=side, fontsize=8, color=GREY, path_effects=HALO)  # fmt: skip
    ax.set_ylim(limits)
