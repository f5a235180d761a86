"""Every figure that is declared, of runs of every shape: nothing cut, nothing on anything else, no warning.

What is measured stands in ``drawn.py``. Runs are small: what is drawn does not depend on how many tokens there are,
but on layers, experts, sequences, names and on what did not happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from drawn import faults
from matplotlib.figure import Figure
from synthetic_runs import make_run
from test_gradients_figures import audit

from moediag.analysis.series import step_metrics, trend_of
from moediag.corrections import choose
from moediag.figures import COLUMN_WIDTH, FIGURES, FULL_WIDTH, SIMULATION_FIGURES, TREND_FIGURES, draw_figure
from moediag.figures.registry import Frames, draw_simulation_figure, simulation_figures_of
from moediag.results.simulation import Grid, add_sweep, read_tokens, simulate
from moediag.statistics.intervals import Interval
from moediag.statistics.recurrence import Recurrence

pytestmark = pytest.mark.filterwarnings("error")

LONG = "Qwen/Qwen3-235B-A22B-Instruct-2507-fine-tuned-on-our-own-mathematics-v2"
GRADIENTS = {name for name, kind in SIMULATION_FIGURES.items() if kind.frames == ("gradient_audit",)}
SHAPES: dict[str, Callable[[], dict[str, Frames]]] = {
    "48 layers": lambda: {"moe": make_run(n_tokens=384, n_layers=48, n_prompts=32)},
    "94 layers, 512 experts": lambda: {LONG: make_run(n_tokens=160, n_layers=94, n_experts=512, n_prompts=40)},
    "one layer": lambda: {LONG: make_run(n_tokens=512, n_layers=1)},
    "one sequence": lambda: {LONG: make_run(n_tokens=256, n_prompts=1)},
    "no flips": lambda: {LONG: make_run(n_tokens=512, has_flips=False)},
    "three runs": lambda: {
        LONG: make_run(n_tokens=384, n_prompts=32, has_variants=True),
        f"{LONG}-rl": make_run(n_tokens=256, n_layers=12, n_prompts=16),
        f"{LONG}-dense": make_run(n_tokens=256, n_layers=0, seed=1),
    },
}


def all_faults(drawn: Iterable[tuple[str, Figure]]) -> dict[str, list[str]]:
    """Name -> what is wrong, of the figures with which something is."""
    return {name: found for name, figure in drawn if (found := faults(figure))}


@pytest.mark.parametrize(
    ("shape", "width"),
    [
        *((shape, FULL_WIDTH) for shape in SHAPES),
        *((shape, COLUMN_WIDTH) for shape in ("94 layers, 512 experts", "three runs")),
    ],
)
def test_figures_of_runs_are_whole_in_every_shape(shape: str, width: float) -> None:
    """Bugs: names ran over the edge or into the next panel, legends stood on lines, points were cut in half."""
    runs = SHAPES[shape]()
    drawn = {name: found for name in FIGURES if (found := draw_figure(name, runs, width=width))}
    assert {"figure1", "position_drift", "tail_curve"} <= drawn.keys()
    assert ("flip_map" in drawn) == (shape not in ("no flips", "one sequence"))
    assert shape != "three runs" or drawn.keys() == FIGURES.keys()
    assert all_faults(drawn.items()) == {}


@pytest.mark.parametrize(
    ("shape", "width"), [("48 layers", FULL_WIDTH), ("48 layers", COLUMN_WIDTH), ("one sequence", FULL_WIDTH)]
)
def test_figures_of_simulations_are_whole(shape: str, width: float) -> None:
    """Bugs: of masks' overlap the names lay over the caption, of masked entropy the last points were cut in half."""
    frames = corrections(shape)
    assert {*simulation_figures_of(frames)} == SIMULATION_FIGURES.keys() - GRADIENTS
    drawn = {name: draw_simulation_figure(name, frames, LONG, width=width) for name in simulation_figures_of(frames)}
    assert all_faults(drawn.items()) == {}


@cache
def corrections(shape: str) -> Frames:
    """Every correction there is, on a run's tokens, whose differences are made large enough for most to mask."""
    (frames,) = SHAPES[shape]().values()
    tokens = frames["tokens"].assign(
        logp_train=lambda t: t["logp_infer"] - 20 * (t["logp_train"] - t["logp_infer"]).abs()
    )
    simulation = simulate(read_tokens(tokens)[0], choose(everything=True), LONG)
    add_sweep(simulation, Grid((0.2, 0.5, 0.8), (1.25, 2, 5)))
    return simulation.frames


@pytest.mark.parametrize(("n_groups", "width"), [(1, FULL_WIDTH), (3, COLUMN_WIDTH)])
def test_figures_of_gradients_are_whole(n_groups: int, width: float) -> None:
    long = {method: f"{method}+tis_sequence:cap=2" for method in ("icepop:alpha=0.5,beta=5",)}
    frame = audit(n_groups, exact=True).replace({"method": long})
    drawn = {name: SIMULATION_FIGURES[name].plot(frame, width=width) for name in GRADIENTS}
    assert all_faults(drawn.items()) == {}


@pytest.mark.parametrize("width", [FULL_WIDTH, COLUMN_WIDTH], ids=["page", "column"])
def test_figures_of_series_are_whole(width: float) -> None:
    """Bugs: known intervals were not drawn, and panels of a metric that never changes were flat lines."""
    assert all_faults(series(width)) == {}


def series(width: float) -> Iterator[tuple[str, Figure]]:
    """A series that grows, with delta_c; one of long names, of which one never changes; one of a single step."""
    fit = (Interval(0.04, 0.03, 0.05, 12), Interval(2e-5, 1e-5, 3e-5, 12), Interval(1e-3, 5e-4, 2e-3, 12))
    grows = Recurrence("grows", "told", 10, 0.0, 90.0, *fit, 1e-3, 0.0)
    trend = trend_of(step_metrics(step, "run", tokens_of(step)) for step in range(0, 100, 10))
    renamed = trend.replace({"metric": {"abs_logp_diff.p99": 3 * "a_long_name_of_a_column_", "kl_infer_train_k1": "k"}})
    renamed.loc[renamed["metric"] == "k", "value"] = 0.5
    plot = TREND_FIGURES["trend"].plot
    yield "grows", plot(trend, grows, "kl_infer_train_k3", width=width)
    yield "long names", plot(renamed, width=width)
    yield "one step", plot(trend[trend["step"] == 0], width=width)
    runs = {"none": trend, 4 * "a_long_name_of_a_run_": renamed, "one step": trend[trend["step"] == 0]}
    runs |= {f"seed {nth}": trend[trend["step"] < 50 + 10 * nth] for nth in range(5)}
    for metric in ("kl_infer_train_k3", "extreme_share_2", "k", "not there"):
        yield f"side by side, {metric}", TREND_FIGURES["trends"].plot(runs, metric, width=width)


def tokens_of(step: int) -> pd.DataFrame:
    rng = np.random.default_rng(step)
    infer = -rng.exponential(1.0, 600) - 1.0
    train = np.minimum(infer + 0.02 * np.exp(step / 60) * rng.standard_t(3, 600), 0.0)
    return pd.DataFrame({"prompt_id": np.arange(600) // 25, "logp_train": train, "logp_infer": infer})


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda ax: ax.text(0.98, 0.5, "words that go on and on", transform=ax.transAxes), "outside"),
        (lambda ax: [ax.text(0.5, 0.5, word) for word in ("one", "other")], "on each other"),
        (lambda ax: ax.legend(loc="upper right"), "legend over"),
        (lambda ax: ax.set_xlim(0, 2.5), "cut by the edge"),
        (lambda ax: ax.set_title("small", fontsize=6), "6 points"),
    ],
)
def test_the_faults_that_are_looked_for_are_found(spoil: Callable[[Any], object], found: str) -> None:
    figure = Figure(figsize=(4, 3))
    ax = figure.add_subplot()
    ax.plot([0, 1, 2], [0, 1, 2], "-o", label="data")
    ax.set_xlim(-0.5, 2.5)
    assert not faults(figure)
    spoil(ax)
    assert [fault for fault in faults(figure) if found in fault]
