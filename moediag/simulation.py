"""From logged tokens to a simulation: all corrections side by side, as frames, and on disk with figures and pages.

Invariants:
    - a simulation is derived: it can be deleted and made again from the run or the table;
    - its folder holds simulation.json, sealed, which names every other file with its digest; it is written before
      anything else (then without files), so the folder is marked as one that the same request may fill again;
    - a simulation is never replaced by another request's, unless by ``force``.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pandas as pd

from moediag.analysis.gradients import load_audit
from moediag.corrections.chosen import Chosen
from moediag.corrections.histograms import masked_entropy, ratio_counts
from moediag.corrections.recommend import recommend_band
from moediag.corrections.sources import Source
from moediag.corrections.statistics import EPS_CLIP, compare_corrections
from moediag.corrections.sweep import DEFAULT_ALPHAS, DEFAULT_BETAS, sweep_by_band
from moediag.corrections.table_files import OnProgress
from moediag.errors import CorruptRunError, IncompleteRunError, MoediagError, RunError
from moediag.figures import draw_simulation_figures
from moediag.hygiene.findings import headline
from moediag.notation import SCHEMA_VERSION
from moediag.report.html import html_page
from moediag.report.markdown import markdown_page
from moediag.report.simulation_page import simulation_page
from moediag.results import load_summary
from moediag.run.derived import SIMULATION_SEAL
from moediag.run.files import make_folder, read_sealed, sha256_bytes, write_atomic, write_error, write_sealed
from moediag.run.reader import Run
from moediag.run.records import MANIFEST

SIMULATION: Final = "moediag simulation"

_N_NAMED: Final = 4
"""Corrections named in a message."""
_LEAD: Final = "icepop:alpha=0.5,beta=5"


@dataclass(frozen=True)
class Grid:
    """Bands to sweep."""

    alphas: Sequence[float] = DEFAULT_ALPHAS
    betas: Sequence[float] = DEFAULT_BETAS


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
    chosen: dict[str, Chosen]
    left_out: dict[str, str]
    frames: dict[str, pd.DataFrame] = field(default_factory=dict)
    eps_clip: float = EPS_CLIP

    def summary(self) -> dict[str, Any]:
        """What was simulated, in plain types."""
        batch = self.source.batch
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": SIMULATION,
            "label": self.label,
            "n_rows": self.source.n_rows,
            "n_tokens": len(batch),
            "n_sequences": batch.n_sequences,
            "n_prompts": batch.n_prompts,
            "n_scored_tokens": int(batch.is_scored_T.sum()),
            "n_scored_sequences": int(batch.is_scored_S.sum()),
            "n_scored_prompts": batch.n_scored_prompts,
            "reward": self.source.reward,
            "notes": list(self.source.notes),
            "findings": [found.record() for found in self.source.findings],
            "finding_words": headline(self.source.findings),
            "eps_clip": self.eps_clip,
            "corrections": {
                label: {"words": str(one.correction), "presets": list(one.presets), "notes": list(one.notes)}
                for label, one in self.chosen.items()
            },
            "left_out": self.left_out,
        }


def simulate(
    source: Source,
    chosen: Mapping[str, Chosen],
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
        ``masked_entropy``; :func:`add_sweep` and :func:`add_gradient_audit` add theirs.
    """
    left_out = {}
    if not source.has_advantages:
        left_out = {name: source.reward for name, one in chosen.items() if one.correction.needs_advantage}
    some = {name: one for name, one in chosen.items() if name not in left_out}
    corrections = {name: one.correction for name, one in some.items()}
    frames = compare_corrections(source.batch, corrections, on_progress, eps_clip=eps_clip)
    frames["ratio_counts"] = ratio_counts(source.batch)
    lead = _lead(frames["correction_statistics"])
    frames["masked_entropy"] = masked_entropy(source.batch, {lead: corrections[lead]} if lead else {})
    return Simulation(label, source, some, left_out, frames, eps_clip)


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
    frames["sweep_by_band"] = sweep_by_band(simulation.source.batch, grid.alphas, grid.betas, on_progress)
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


def add_gradient_audit(simulation: Simulation, run: Run) -> None:
    """Add the frames of the run's gradient audit.

    Raises:
        IncompleteRunError: there is none of these arms.
    """
    simulation.frames.update(load_audit(run))


def write_simulation(
    simulation: Simulation,
    folder: Path,
    regenerate: Sequence[str],
    force: bool = False,
    request: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write frames, figures and both pages of a simulation.

    Args:
        regenerate: commands that make it again, for the page.
        force: write into a folder that holds something else.
        request: what was asked for, in plain types: what must be equal for a simulation to replace another.

    Returns:
        report.html and report.md.

    Raises:
        RunError: the folder holds something that is no simulation, or another request's.
    """
    _take_folder(folder, force, request)
    summary = {**simulation.summary(), "request": dict(request or {})}
    write_sealed(folder / SIMULATION_SEAL, summary)
    written = [_write_frame(folder, name, frame) for name, frame in simulation.frames.items()]
    figures = draw_simulation_figures(simulation.frames, folder / "figures", simulation.label)
    page = simulation_page(summary, simulation.frames, figures, regenerate)
    pages = [folder / "report.html", folder / "report.md"]
    for path, render in zip(pages, (html_page, markdown_page), strict=True):
        write_atomic(path, render(page).encode())
    digests = {
        path.relative_to(folder).as_posix(): sha256_bytes(path.read_bytes()) for path in [*written, *figures, *pages]
    }
    write_sealed(folder / SIMULATION_SEAL, {**summary, "files": digests})
    return pages


def as_json(simulation: Simulation) -> dict[str, Any]:
    """Everything that was found, as JSON takes it: NaN is null, infinity the word."""
    frames = {name: frame.to_dict("records") for name, frame in simulation.frames.items()}
    content: dict[str, Any] = _plain({**simulation.summary(), "frames": frames})
    return content


def _lead(statistics: pd.DataFrame) -> str:
    """The correction whose masked tokens are looked at closely: Ring-1T's band, else the one that masks least."""
    some = statistics[statistics["masked_share"] > 0]
    if some.empty or (some["correction"] == _LEAD).any():
        return _LEAD if len(some) else ""
    return str(some.sort_values("masked_share", kind="stable")["correction"].iloc[0])


def refuse_folder(folder: Path, force: bool = False, request: Mapping[str, Any] | None = None) -> None:
    """Refuse a folder that a simulation must not be written to.

    Raises:
        RunError: it is a run, or holds something that is no simulation, or another request's.
    """
    try:
        there = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()
    except OSError as error:
        raise write_error(error, folder) from error
    if MANIFEST in there:  # its own report has the same names
        raise RunError(f"{folder} is a run; give -o a folder of its own")
    if not there or force:
        return
    found = _simulation_in(folder)
    if found is None:
        raise RunError(f"{folder} holds something that is not a simulation; give -o another folder, or --force")
    if found.get("request", {}) != (request or {}):
        raise RunError(
            f"{folder} holds the simulation of another request, {_request_words(found)}; give -o another folder, or "
            "--force to replace it"
        )


def _take_folder(folder: Path, force: bool, request: Mapping[str, Any] | None) -> None:
    """Make the folder, and remove what an earlier simulation left in it."""
    make_folder(folder)
    refuse_folder(folder, force, request)
    try:
        for name in _named_files(folder):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise write_error(error, folder) from error


def _simulation_in(folder: Path) -> dict[str, Any] | None:
    """What an earlier simulation in the folder says of itself, damaged or not; None = there is none."""
    try:
        found = json.loads((folder / SIMULATION_SEAL).read_text())
        return found if found.get("kind") == SIMULATION else None
    except (OSError, ValueError, AttributeError):
        return None


def _request_words(found: Mapping[str, Any]) -> str:
    names = [name for name in found.get("corrections") or () if name != "none"]
    more = f" and {len(names) - _N_NAMED} more" if len(names) > _N_NAMED else ""
    return f"{found.get('label')} with {', '.join(names[:_N_NAMED]) or 'no correction'}{more}"


def _named_files(folder: Path) -> list[str]:
    """Files that an earlier simulation wrote here; names that lead elsewhere are not followed."""
    try:
        names = read_sealed(folder / SIMULATION_SEAL).get("files", {})
    except MoediagError:
        return []
    return [name for name in names if ".." not in Path(name).parts and not Path(name).is_absolute()]


def _write_frame(folder: Path, name: str, frame: pd.DataFrame) -> Path:
    sink = io.BytesIO()
    frame.to_parquet(sink, index=False)
    write_atomic(folder / f"{name}.parquet", sink.getvalue())
    return folder / f"{name}.parquet"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
