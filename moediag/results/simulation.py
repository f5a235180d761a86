"""From logged tokens to a simulation: all corrections side by side, as frames, and on disk with figures and pages.

Invariant: a simulation is derived: it can be deleted and made again from the run or the table.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import pandas as pd

from moediag.corrections import (
    Correction,
    choose,
    compare_corrections,
    recommend_band,
    sweep_by_band,
)
from moediag.corrections.bands import DEFAULT_ALPHAS, DEFAULT_BETAS
from moediag.corrections.presets import presets_of
from moediag.corrections.sources import Source, run_source, table_source
from moediag.corrections.statistics import masked_entropy, ratio_counts
from moediag.corrections.sums import EPS_CLIP
from moediag.errors import CorruptRunError, IncompleteRunError
from moediag.figures import draw_simulation_figures
from moediag.figures.style import formats
from moediag.folder import SUMMARY, records, result_folder, write_frames
from moediag.hygiene.findings import headline
from moediag.importers.tables import OnProgress
from moediag.notation import INFER, SCHEMA_VERSION, TRAIN
from moediag.numbers import count
from moediag.report.simulation_page import simulation_page
from moediag.results.load import load_summary
from moediag.results.report import write_pages
from moediag.run.derived import SIMULATIONS
from moediag.run.files import digest_of, write_sealed
from moediag.run.reader import Run

SIMULATION: Final = "moediag simulation"
LARGEST_LOG_RATIO: Final = float(np.log(np.finfo(np.float32).max))
"""exp of more is infinite in float32 and bfloat16."""
_LEAD: Final = "icepop:alpha=0.5,beta=5"
_N_NAMED: Final = 4
"""Corrections named in a message."""


@dataclass(frozen=True)
class Grid:
    """Bands to sweep."""

    alphas: Sequence[float] = DEFAULT_ALPHAS
    betas: Sequence[float] = DEFAULT_BETAS


@dataclass(frozen=True)
class Request:
    """Which corrections to simulate on which tokens.

    Args:
        target: a run directory or a table.
        chosen: label -> correction.
        grid: bands of the sweep; None = no sweep.
        pair: the pair of a run, by its name; of a table it names the two sides.
        reward, mask: as for :func:`~moediag.corrections.sources.table_source`.
        eps_clip: PPO's clip.
        gradient_audit, checkpoint: whether gradients are audited, and of which checkpoint (None = the run's own).
    """

    target: Path
    chosen: dict[str, Correction]
    grid: Grid | None = Grid()
    pair: str = f"{INFER}~{TRAIN}"
    reward: str | None = None
    eps_clip: float = EPS_CLIP
    mask: str | None = None
    gradient_audit: bool = False
    checkpoint: str | None = None

    @property
    def arms(self) -> tuple[str, str]:
        """The pair's arms, train's side first."""
        infer, _, train = self.pair.partition("~")
        return train, infer

    def content(self, folder: Path) -> dict[str, Any]:
        """The request of a simulation in a folder, in plain types, see :func:`~moediag.folder.refuse_other`."""
        names = [name for name in self.chosen if name != "none"]
        more = f" and {len(names) - _N_NAMED} more" if len(names) > _N_NAMED else ""
        target = self.target.resolve()
        return {
            "of": f"{target.name} with {', '.join(names[:_N_NAMED]) or 'no correction'}{more}",
            "target": os.path.relpath(target, folder.resolve()),
            **self._options,
        }

    def folder(self, run: Run) -> Path:
        """Its folder in the run: RUN/simulate/PAIR, with a digest where options are not the default."""
        is_default = self._options == Request(self.target, choose(), pair=self.pair)._options
        name = self.pair if is_default else f"{self.pair}-{digest_of(self._options)[:8]}"
        return run.path / SIMULATIONS / name

    def simulate(self, run: Run | None, on_progress: OnProgress | None = None) -> Simulation:
        """Read the tokens, of the run or of the table, and simulate.

        Raises:
            DumpError: the table cannot be used.
            IncompleteRunError: an arm of the pair is missing.
        """
        source, label, floor_k3 = read_tokens(
            self.target if run is None else run, self.arms, self.reward, self.mask, on_progress
        )
        simulation = simulate(source, self.chosen, label, eps_clip=self.eps_clip, on_progress=on_progress)
        if self.grid is not None:
            add_sweep(simulation, self.grid, floor_k3, on_progress)
        return simulation

    @property
    def _options(self) -> dict[str, Any]:
        bands = None if self.grid is None else [[str(bound) for bound in side] for side in vars(self.grid).values()]
        named = {name: getattr(self, name) for name in ("reward", "eps_clip", "mask", "gradient_audit", "checkpoint")}
        corrections = {label: str(one) for label, one in self.chosen.items()}
        return {"pair": self.pair, "corrections": corrections, "bands": bands, **named}


@dataclass(frozen=True)
class Simulation:
    """Corrections simulated on the same tokens.

    Args:
        label: what was simulated.
        chosen: label -> correction, of those that were simulated.
        left_out: label -> why it was not.
        frames: frame name -> frame.
        eps_clip: PPO's clip.
    """

    label: str
    source: Source
    chosen: dict[str, Correction]
    left_out: dict[str, str]
    frames: dict[str, pd.DataFrame] = field(default_factory=dict)
    eps_clip: float = EPS_CLIP

    def _overflow_notes(self) -> list[str]:
        """Presets whose source turns tokens of these rows into no number; moediag gives such a token weight 0."""
        frame = self.source.tokens.frame
        n = int((frame["logp_train"] - frame["logp_infer"] > LARGEST_LOG_RATIO).sum())
        named = {preset.name: preset.of_overflow for one in self.chosen.values() for preset in presets_of(one)}
        words = "; ".join(f"{name}: {what}" for name, what in named.items() if what)
        if not n or not words:
            return []
        beyond = f"{count(n, 'token')} with a ratio beyond float32 (log-ratio above {LARGEST_LOG_RATIO:.1f})"
        return [f"{beyond}, which the source of some presets does not survive: {words}"]

    def summary(self) -> dict[str, Any]:
        """What was simulated, in plain types."""
        tokens = self.source.tokens
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": SIMULATION,
            "label": self.label,
            "n_rows": self.source.n_rows,
            "n_tokens": len(tokens.frame),
            "n_sequences": tokens.frame["seq_id"].nunique(),
            "n_prompts": tokens.frame["prompt_id"].nunique(),
            "n_scored_tokens": len(tokens),
            "n_scored_sequences": tokens.n_sequences,
            "n_scored_prompts": tokens.n_prompts,
            "reward": self.source.reward,
            "notes": [*self.source.notes, *self._overflow_notes()],
            "findings": [found.record() for found in self.source.findings],
            "finding_words": headline(self.source.findings),
            "eps_clip": self.eps_clip,
            "corrections": {
                label: {
                    "words": str(one),
                    "presets": [preset.name for preset in presets_of(one)],
                    "notes": [f"{preset.name}: {preset.note}" for preset in presets_of(one) if preset.note],
                }
                for label, one in self.chosen.items()
            },
            "left_out": self.left_out,
        }


def simulate(
    source: Source,
    chosen: Mapping[str, Correction],
    label: str,
    *,
    eps_clip: float = EPS_CLIP,
    on_progress: OnProgress | None = None,
) -> Simulation:
    """Simulate corrections on logged tokens.

    Args:
        source: the tokens.
        chosen: label -> correction; those that look at advantages are left out where none are known.
        label: what the tokens are called on every output.
        eps_clip: PPO's clip.
        on_progress: called with what is done.

    Returns:
        The simulation with frames ``correction_statistics``, ``masked_by_stratum``, ``overlap``, ``ratio_counts`` and
        ``masked_entropy``; :func:`add_sweep` and the gradient audit add theirs.
    """
    left_out = {}
    if "advantage" not in source.tokens.frame:
        left_out = {name: source.reward for name, one in chosen.items() if one.needs_advantage}
    some = {name: one for name, one in chosen.items() if name not in left_out}
    frames = compare_corrections(source.tokens, some, on_progress, eps_clip=eps_clip)
    frames["ratio_counts"] = ratio_counts(source.tokens)
    lead = _lead(frames["correction_statistics"])
    frames["masked_entropy"] = masked_entropy(source.tokens, {lead: some[lead]} if lead else {})
    return Simulation(label, source, some, left_out, frames, eps_clip)


def read_tokens(
    tokens: Run | Path | pd.DataFrame,
    arms: tuple[str, str] | None = None,
    reward: str | None = None,
    mask: str | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Source, str, float | None]:
    """The tokens of a run, a table or a frame, what to call them, and the A/A floor of k3 [nat] (None = not known).

    Args:
        arms: two arms of a run, train's first; None = its main pair.
        reward, mask: as for :func:`~moediag.corrections.sources.table_source`.

    Raises:
        DumpError: the table cannot be used.
        IncompleteRunError: an arm of the pair is missing.
    """
    if isinstance(tokens, Run):
        arms = arms or tokens.main_arms
        pair, usual = tokens.pair_name(*arms), f"{tokens.reference(INFER)}~{tokens.reference(TRAIN)}"
        label = tokens.path.resolve().name + (f" {pair}" if pair != usual else "")
        return run_source(tokens, arms, reward), label, run_floor_k3(tokens, pair)
    label = "frame" if isinstance(tokens, pd.DataFrame) else tokens.name
    return table_source(tokens, reward, on_progress, mask), label, None


def add_sweep(
    simulation: Simulation,
    grid: Grid | None = None,
    floor_k3: float | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Add the sweep of IcePop's band, frames ``sweep_by_band`` and ``recommended_band``.

    Args:
        grid: bands; None = the default grid.
        floor_k3: A/A floor of k3 [nat]; None = not known.
    """
    frames, grid = simulation.frames, grid or Grid()
    frames["sweep_by_band"] = sweep_by_band(simulation.source.tokens, grid.alphas, grid.betas, on_progress)
    whole = frames["correction_statistics"].set_index("correction")["kept_k3"].get("none", math.nan)
    all_k3 = float(whole) if math.isfinite(whole) else None
    frames["recommended_band"] = recommend_band(frames["sweep_by_band"], floor_k3, all_k3)


def run_floor_k3(run: Run, pair: str) -> float | None:
    """k3 of the run's engines against themselves [nat]; None where no analysis has measured it, or for another pair."""
    try:
        summary = load_summary(run)
    except (CorruptRunError, IncompleteRunError):
        return None
    if pair != summary["main_pair"]:
        return None
    floor = (summary["floors"] or {}).get("metrics", {}).get("kl_infer_train_k3", {}).get("floor")
    return None if floor is None else float(floor)


def write_simulation(
    simulation: Simulation,
    folder: Path,
    regenerate: Sequence[str],
    request: Mapping[str, Any] = MappingProxyType({}),
    force: bool = False,
    pdf: bool = False,
) -> list[Path]:
    """Write frames, figures and both pages of a simulation.

    Args:
        regenerate: commands that make it again, for the page.
        request, force: as for :func:`~moediag.folder.refuse_other`.
        pdf: figures as PDF, too.

    Returns:
        report.html and report.md.

    Raises:
        RunError: the folder holds something that is no simulation, or another request's.
    """
    summary = simulation.summary()
    with result_folder(folder, SIMULATION, request, force) as made:
        figures = draw_simulation_figures(simulation.frames, made / "figures", simulation.label, kinds=formats(pdf))
        write_pages(made, simulation_page(summary, simulation.frames, figures, regenerate))
        frames = write_frames(made, simulation.frames)
        write_sealed(made / SUMMARY, {**summary, "request": dict(request), "frames": frames})
    return [folder / "report.html", folder / "report.md"]


def as_json(simulation: Simulation) -> dict[str, Any]:
    """Everything that was found, as JSON takes it: NaN is null, infinity the word."""
    return {**simulation.summary(), "frames": {name: records(frame) for name, frame in simulation.frames.items()}}


def _lead(statistics: pd.DataFrame) -> str:
    """The correction whose masked tokens are looked at closely: Ring-1T's band, else the one that masks least."""
    some = statistics[statistics["masked_share"] > 0]
    if some.empty or (some["correction"] == _LEAD).any():
        return _LEAD if len(some) else ""
    return str(some.sort_values("masked_share", kind="stable")["correction"].iloc[0])
