"""Every figure, as its own module declares it: what it is called, how to read it, what it draws, and when it is absent.

A function under :func:`figure` is in the catalogue, is drawn with the others of its page, stands in its section there,
and takes the same options as they do. Importing :mod:`moediag.figures` imports every module beside this one.

Invariants: the keys of :data:`FIGURES` are the file names; a figure that a run cannot fill is left out, and
:func:`reason_left_out` says why in words that a report can print.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Final

import pandas as pd
from matplotlib.figure import Figure

from moediag.analysis.tokens import Tokens
from moediag.figures.floors import AnyFloor, Floor, FloorArgument, floor_of, floor_words, nat
from moediag.figures.style import (
    FULL_WIDTH,
    KINDS,
    RunStyle,
    caption_text,
    figure_text,
    house_style,
    run_styles,
    save_figure,
    styles_of,
)

KEY_FIGURE: Final = "figure1"
"""The figure of the first screen; never left out while its frames are there: that no token differs is its finding."""

Frames = Mapping[str, pd.DataFrame]
"""Frame name, as declared, -> frame, of one run."""
Floors = Mapping[str, AnyFloor]
"""Metric (:attr:`FigureKind.floor_of`) -> its floor, of one run."""

NOT_THERE: Final = "its analysis holds no frame {}; run moediag analyze again"
NO_ROUTING: Final = "there is no routing to compare: a dense model, or one arm has no routes"
NO_DIFFERENCE: Final = "no scored token differs, bit for bit"
NOT_SCORED: Final = "no token was scored by both arms"
NO_FLIP: Final = "no expert set flipped"


@dataclass(frozen=True)
class Panel:
    """What a figure is drawn with, whatever it shows.

    Args:
        styles: run label -> how the run is drawn.
        caption: counts, said under the axes first.
        floor: of the figure's metric; one for every run, or by label.
        width: of the figure [inch].
    """

    styles: Mapping[str, RunStyle] = field(default_factory=dict)
    caption: str = ""
    floor: FloorArgument = None
    width: float = FULL_WIDTH

    def floor_value(self, label: str) -> float | None:
        """The floor to draw for a run: None where there is none, or one of exactly 0."""
        found = floor_of(self.floor, label)
        return found.value if isinstance(found, Floor) and found.value > 0 else None

    def floor_words(self, of: str, labels: Mapping[str, object], words: Callable[[float], str] = nat) -> str:
        """The caption's sentence about the floor."""
        return floor_words(self.floor, of, labels, words)


@dataclass(frozen=True)
class FigureKind:
    """What does not depend on the numbers; the finding is the figure's own title.

    Args:
        name: of the files, without suffix.
        frames: frames it draws; without the first it cannot be drawn.
        title: what it shows, for headings and alternative text.
        caption: how to read it, one or two sentences.
        section: anchor of the page's section that shows it.
        floor_of: the metric whose floor it shows.
        is_routing: whether it needs expert routing (absent for dense runs).
        not_captured: why its first frame is missing when arms lack what it is made of; empty where no arm can.
        absent: why frames that are there do not fill it; empty when they do.
        inputs: what it draws of a simulation, where that is not its frames alone.
        plot: the function.
    """

    name: str
    frames: tuple[str, ...]
    title: str
    caption: str
    section: str
    floor_of: str
    is_routing: bool
    not_captured: str
    absent: Callable[[Frames], str]
    inputs: Callable[[Frames], Sequence[Any]] | None
    plot: Callable[..., Figure]


FIGURES: Final[dict[str, FigureKind]] = {}
"""Name -> figure of a run; not every run has every figure."""
SIMULATION_FIGURES: Final[dict[str, FigureKind]] = {}
"""Name -> figure of a simulation."""
TREND_FIGURES: Final[dict[str, FigureKind]] = {}
"""Name -> figure of a series."""


def figure(
    name: str,
    *frames: str,
    title: str,
    caption: str,
    section: str = "",
    floor_of: str = "",
    is_routing: bool = False,
    not_captured: str = "",
    absent: Callable[[Frames], str] = lambda _: "",
    inputs: Callable[[Frames], Sequence[Any]] | None = None,
    into: dict[str, FigureKind] = FIGURES,
) -> Callable[[Callable[..., Figure]], Callable[..., Figure]]:
    """Declare the figure that a function draws; arguments as in :class:`FigureKind`.

    Returns:
        A function of the frames (run label -> frame, in the order declared) that takes ``styles``, ``caption``,
        ``floor`` and ``width`` of :class:`Panel`, and the options of its own.
    """

    def declare(draw: Callable[..., Figure]) -> Callable[..., Figure]:
        @house_style
        @wraps(draw)
        def plot(
            *drawn: Any,
            styles: Mapping[str, RunStyle] | None = None,
            caption: str = "",
            floor: FloorArgument = None,
            width: float = FULL_WIDTH,
            **options: Any,
        ) -> Figure:
            if styles is None:
                styles = styles_of(drawn[0]) if isinstance(drawn[0], Mapping) else {}
            return draw(*drawn, panel=Panel(styles, caption, floor, width), **options)

        into[name] = FigureKind(
            name, frames, title, caption, section, floor_of, is_routing, not_captured, absent, inputs, plot
        )
        return plot

    return declare


def reason_left_out(name: str, frames: Frames) -> str:
    """Why a run's frames do not fill the figure, as a clause; empty when they do."""
    kind = FIGURES[name]
    tokens = frames.get("tokens")
    if kind.is_routing and tokens is not None and not is_moe(tokens):
        return NO_ROUTING
    if frames.get(kind.frames[0]) is None:
        return kind.not_captured or NOT_THERE.format(kind.frames[0])
    return kind.absent(frames)


def is_moe(tokens: pd.DataFrame) -> bool:
    """Whether a token frame is of a run with routing (a dense run has -1 in every row)."""
    return bool((tokens["n_flipped_layers"] >= 0).any())


def no_difference(frames: Frames) -> str:
    """Why a figure of the tokens' differences is absent: none was scored, or none differs; empty when some do."""
    tokens = Tokens(frames["tokens"])
    if not len(tokens):
        return NOT_SCORED
    return "" if tokens.diff_T.any() else NO_DIFFERENCE


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
        floors: metric -> floor.
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
        floors: label -> (metric -> floor).
        width: of the figures [inch].
        kinds: formats to write.

    Returns:
        The files written, PNG first, in the order of :data:`FIGURES`.
    """
    drift = {"training_window": training_window, "prompt_length": prompt_length}
    written = []
    for name in FIGURES:
        drawn = draw_figure(name, runs, floors, width=width, **(drift if name == "position_drift" else {}))
        written += [] if drawn is None else save_figure(drawn, folder, name, kinds)
    return written


def draw_figure(
    name: str, runs: Mapping[str, Frames], floors: Mapping[str, Floors] | None = None, **options: Any
) -> Figure | None:
    """One figure of the catalogue, of the runs that fill it; None when none does.

    Args:
        name: key of :data:`FIGURES`.
        runs: label -> (frame name -> frame).
        floors: label -> (metric -> floor).
        options: ``width``, and what the figure's own function takes.
    """
    kind = FIGURES[name]
    styles = run_styles({label: is_moe(frames["tokens"]) for label, frames in runs.items() if "tokens" in frames})
    shown = {label: runs[label] for label in styles if not reason_left_out(name, runs[label])}
    if not shown:
        return None
    return kind.plot(
        *(_each(shown, frame) for frame in kind.frames),
        styles=styles,
        caption=caption_text(token_counts(_each(shown, "tokens"))),
        floor={label: (floors or {}).get(label, {}).get(kind.floor_of) for label in shown},
        **options,
    )


def token_counts(tokens: Mapping[str, pd.DataFrame]) -> dict[str, tuple[int, int]]:
    """label -> (tokens scored by both arms, prompts), for captions."""
    return {label: (len(Tokens(frame)), int(frame["prompt_id"].nunique())) for label, frame in tokens.items()}


def figures_left_out(runs: Mapping[str, Frames]) -> dict[str, str]:
    """Figure name -> why it is not written, for the figures that none of the runs fills.

    Args:
        runs: label -> (frame name -> frame); one run for what :func:`draw_run_figures` leaves out.
    """
    reasons: dict[str, str] = {}
    for name in FIGURES:
        why = {label: reason_left_out(name, frames) for label, frames in runs.items()}
        if all(why.values()):
            reasons_once = dict.fromkeys(why.values())
            each = (f"{figure_text(label)}: {reason}" for label, reason in why.items())
            reasons[name] = next(iter(reasons_once), "no run") if len(reasons_once) <= 1 else "; ".join(each)
    return reasons


def _each(runs: Mapping[str, Frames], name: str) -> dict[str, pd.DataFrame]:
    """The frame of that name, of every run that has it."""
    return {label: frames[name] for label, frames in runs.items() if frames.get(name) is not None}


def draw_simulation_figures(
    frames: Frames, folder: Path, label: str, *, width: float = FULL_WIDTH, kinds: Sequence[str] = KINDS
) -> list[Path]:
    """Draw and save the figures of a simulation; one whose first frame is missing or empty is left out.

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
    return [
        name
        for name, kind in SIMULATION_FIGURES.items()
        if (first := frames.get(kind.frames[0])) is not None and len(first) and not kind.absent(frames)
    ]


def draw_simulation_figure(name: str, frames: Frames, label: str, *, width: float = FULL_WIDTH) -> Figure:
    """One figure of a simulation that its frames fill; see :func:`draw_simulation_figures`."""
    kind, statistics = SIMULATION_FIGURES[name], frames["correction_statistics"]
    inputs = kind.inputs(frames) if kind.inputs else [frames[frame] for frame in kind.frames]
    n = [(int(row["n_tokens"]), int(row["n_prompts"])) for _, row in statistics.head(1).iterrows()]
    return kind.plot(*inputs, caption=caption_text({label: n[0]}) if n else "", width=width)
