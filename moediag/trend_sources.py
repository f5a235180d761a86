"""Where a series over training steps comes from: runs, one per step, or one table with a column ``step``.

A table holds either a row per token (``step``, ``seq_id``, ``position``, ``logp_train``, ``logp_infer``, optionally
``prompt_id`` and ``is_response``) or a row per step (``step`` and a column per metric, each optionally with
``<metric>_se`` or ``<metric>_ci_low`` and ``<metric>_ci_high``, and ``n_tokens``, ``n_prompts``).

Invariants:
    - how each step came by its number is said: from --steps, from the folders' names, or from their order;
    - metrics keep the table's names, but those that are moediag's by another name are renamed, and that is said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pandas as pd
import pyarrow as pa

from moediag.analysis.aliases import ALIASES
from moediag.analysis.series import KL_METRICS, TREND_BY_STEP, UNITS, standard_error_of, step_metrics, trend_of
from moediag.analysis.tokens import concatenate_tokens, token_columns
from moediag.analysis.vocabulary import exact_divergences
from moediag.corrections.table_files import KINDS, Kind, TableFile, open_table
from moediag.errors import DumpError
from moediag.hygiene.findings import Finding
from moediag.hygiene.logged import check_steps
from moediag.notation import INFER, TRAIN
from moediag.report.measures import text_origin
from moediag.run.directory import Run, open_run

OnProgress = Callable[[int, int, str], None]

TOKEN_COLUMNS: Final[dict[str, Kind]] = {
    "step": "whole", "seq_id": "id", "position": "whole", "logp_train": "number", "logp_infer": "number",
}  # fmt: skip
OPTIONAL_COLUMNS: Final[dict[str, Kind]] = {"prompt_id": "id", "is_response": "flag"}
SYNONYMS: Final = {
    "mean_abs_logp_diff": "abs_logp_diff.mean",
    "p99_abs_logp_diff": "abs_logp_diff.p99",
    "k1": "kl_infer_train_k1",
    "k3": "kl_infer_train_k3",
    # verl's kl is k1, but elsewhere the word is k3, or the KL to a reference model: it stays what the table calls it
    **{alias.name: alias.metric for alias in ALIASES if alias.is_metric_name and alias.metric and alias.name != "kl"},
}
"""Other names of the metrics that moediag has."""

_COUNTS: Final = ("n_tokens", "n_prompts")
_PARTS: Final = ("_se", "_ci_low", "_ci_high")
_TRAILING: Final = re.compile(r"(\d+)$")
_LARGEST_LOGP: Final = 1e-3
"""A log-probability above this is no rounding: the column holds something else."""


@dataclass(frozen=True)
class TrendSource:
    """A series and what a reader has to know of how it was read.

    Args:
        trend: frame ``trend_by_step``.
        step_origin: how the steps came by their numbers.
        is_kl: whether k1 and k3 may stand for a KL: not on text that infer did not sample freely.
        findings: what is wrong with the tokens, or likely so, by the rules of ``validate``; none of a table of steps.
    """

    trend: pd.DataFrame
    step_origin: str
    is_kl: bool
    notes: tuple[str, ...]
    findings: tuple[Finding, ...] = ()


def read_trend(targets: Sequence[Path], steps: Sequence[int] | None, on_progress: OnProgress) -> TrendSource:
    """The series of runs, or of one table.

    Raises:
        DumpError: neither runs nor one table, or a table that is none.
        RunError: a run that cannot be read.
    """
    tables = [path for path in targets if path.suffix in KINDS or path.is_file()]
    if not tables:
        return _read_runs([open_run(path) for path in targets], steps, on_progress)
    if len(targets) > 1 or steps is not None:
        wanted = "--steps is for runs" if len(targets) == 1 else f"found {len(targets)} arguments"
        raise DumpError(f"{tables[0]} is a table, which stands alone and holds its steps; {wanted}")
    if tables[0].suffix not in KINDS:
        raise DumpError(f"{tables[0]} is no table by its name; wanted a run directory, or {', '.join(KINDS)}")
    return _read_table(open_table(tables[0]), on_progress)


def steps_of(labels: Sequence[str], steps: Sequence[int] | None) -> tuple[list[int], str]:
    """The step of every run, and where it is from.

    Raises:
        DumpError: --steps has another length.

    Example:
        >>> steps_of(["step-0", "step-50"], None)
        ([0, 50], 'the trailing number of the folder names')
        >>> steps_of(["a", "b"], None)
        ([0, 1], 'their order (no number at the end of every folder name; --steps gives them)')
    """
    if steps is not None:
        if len(steps) != len(labels):
            raise DumpError(f"--steps names {len(steps)} steps, found {len(labels)} runs; name one per run, in order")
        return list(steps), "--steps"
    found = [_TRAILING.search(label) for label in labels]
    numbers = [int(match[1]) for match in found if match]
    if len(numbers) == len(labels) == len(set(numbers)):
        return numbers, "the trailing number of the folder names"
    return list(range(len(labels))), "their order (no number at the end of every folder name; --steps gives them)"


def _read_runs(runs: Sequence[Run], steps: Sequence[int] | None, on_progress: OnProgress) -> TrendSource:
    labels = [run.path.resolve().name for run in runs]
    numbers, origin = steps_of(labels, steps)
    frames, notes = [], []
    for done, (run, label, step) in enumerate(zip(runs, labels, numbers, strict=True), start=1):
        tokens = concatenate_tokens([token_columns(block, None) for block in run.pair(TRAIN, INFER).blocks()])
        exact = exact_divergences(run)
        rows = [] if exact is None else exact.measures.to_dict("records")
        frames.append(step_metrics(step, label, tokens, rows))
        sampling = {**run.manifest["sampling"], "given_completions": run.manifest["completions"]}
        if said := text_origin({"sampling": sampling}):
            notes.append(f"{label}: {said}, so k1 and k3 are statistics and no KL")
        on_progress(done, len(runs), "runs")
    architectures = sorted({str(run.model["architecture"]) for run in runs})
    if len(architectures) > 1:
        notes.append(f"the runs are of different architectures ({', '.join(architectures)}): no steps of one training")
    sources = {(run.manifest["prompts"]["source_sha256"], run.manifest["prompts"]["n"]) for run in runs}
    if len(sources) > 1:
        notes.append("the runs were made from different prompts: a change of prompts is in the series too")
    elif len(runs) > 1:
        notes.append(
            "every step has the same prompts: their share of the errors is common to all steps, not independent"
        )
    return TrendSource(trend_of(frames), origin, not any("no KL" in note for note in notes), tuple(notes))


def _read_table(table: TableFile, on_progress: OnProgress) -> TrendSource:
    if "step" not in table.types:
        raise DumpError(f"{table.path} has no column step; found {', '.join(table.types)}")
    sides = [name for name in ("logp_train", "logp_infer") if name in table.types]
    if not sides:
        return _read_steps(table, on_progress)
    missing = [name for name in TOKEN_COLUMNS if name not in table.types]
    if missing:
        raise DumpError(f"{table.path} has {sides[0]}, so it is a table of tokens, but lacks {', '.join(missing)}")
    return _read_tokens(table, on_progress)


def _read_tokens(table: TableFile, on_progress: OnProgress) -> TrendSource:
    kinds = {**TOKEN_COLUMNS, **{name: kind for name, kind in OPTIONAL_COLUMNS.items() if name in table.types}}
    columns = table.read(kinds, on_progress)
    cluster = "prompt_id" if "prompt_id" in columns else "seq_id"
    frame = pd.DataFrame({name: columns[name] for name in ("step", "position", "logp_train", "logp_infer")})
    frame["seq_id"], frame["prompt_id"] = columns["seq_id"].row_T, columns[cluster].row_T
    if "is_response" in columns:
        frame = frame[columns["is_response"]]
    _refuse_tokens(table.path, frame)
    notes = ["how the tokens were sampled the table does not say: k1 and k3 are a KL only if infer sampled them at "
             "temperature 1 without truncation"]  # fmt: skip
    if cluster == "seq_id":
        notes.append("no column prompt_id: every sequence counts as a prompt of its own, so intervals may be too short")
    names = ("step", "logp_train", "logp_infer", "seq_id", "position")
    findings = check_steps(*(frame[name].to_numpy() for name in names), prompt_T=frame["prompt_id"].to_numpy())
    trend = trend_of(_steps_of_tokens(table, frame, on_progress))
    return TrendSource(trend, "column step", True, tuple(notes), tuple(findings))


def _steps_of_tokens(table: TableFile, frame: pd.DataFrame, on_progress: OnProgress) -> Iterator[pd.DataFrame]:
    n_steps = frame["step"].nunique()
    for done, (step, tokens) in enumerate(frame.groupby("step", sort=True), start=1):
        yield step_metrics(int(cast(Any, step)), table.path.name, tokens)
        on_progress(done, n_steps, "steps")


def _refuse_tokens(path: Path, frame: pd.DataFrame) -> None:
    """Rows that no log of tokens has."""
    if frame.empty:
        raise DumpError(f"{path} holds no response token; check the column is_response")
    twice = frame[frame.duplicated(["step", "seq_id", "position"])]
    if len(twice):
        raise DumpError(
            f"{path}: {len(twice):,} rows stand at a (step, seq_id, position) of another, first step "
            f"{twice['step'].iloc[0]} position {twice['position'].iloc[0]}; every token wants one row"
        )
    for name in ("logp_train", "logp_infer"):
        if (frame[name] > _LARGEST_LOGP).any():
            raise DumpError(
                f"{path}: {name} is a log-probability and at most 0, found {frame[name].max():.4g}; "
                "is it a probability, or a difference?"
            )


def _read_steps(table: TableFile, on_progress: OnProgress) -> TrendSource:
    """A table of one row per step."""
    numeric = [name for name, kind in table.types.items() if _is_number(kind) and name != "step"]
    metrics = [name for name in numeric if name not in _COUNTS and not name.endswith(_PARTS)]
    if not metrics:
        raise DumpError(f"{table.path} has no column of numbers beside step; found {', '.join(table.types)}")
    columns = table.read({"step": "whole", **dict.fromkeys(numeric, "number")}, on_progress)
    frame = pd.DataFrame(columns)
    twice = frame.loc[frame["step"].duplicated(), "step"]
    if len(twice):
        raise DumpError(
            f"{table.path}: step {twice.iloc[0]} has more than one row; a table of steps wants one, a table of tokens "
            "the columns logp_train and logp_infer"
        )
    names = {name: SYNONYMS.get(name, name) for name in metrics}
    both = sorted({ours for ours in names.values() if list(names.values()).count(ours) > 1})
    if both:
        same = ", ".join(name for name, ours in names.items() if ours == both[0])
        raise DumpError(f"{table.path}: {same} are one metric ({both[0]}); keep one of them")
    notes = [f"column {theirs} is read as {ours}" for theirs, ours in names.items() if theirs != ours]
    if set(names.values()) & set(KL_METRICS[1:]):
        notes.append("how the tokens were sampled the table does not say: k1 and k3 of forced text are no KL")
    parts = [_metric_of_steps(table.path, frame, theirs, ours) for theirs, ours in names.items()]
    return TrendSource(trend_of(parts), "column step", True, tuple(notes))


def _metric_of_steps(path: Path, frame: pd.DataFrame, theirs: str, ours: str) -> pd.DataFrame:
    """One metric of a table of steps, its errors from the table or none."""
    low, high, se = (_column(frame, f"{theirs}{part}") for part in ("_ci_low", "_ci_high", "_se"))
    if (se < 0).any() or (low > high).any():
        wanted = f"{theirs}_se of at least 0" if (se < 0).any() else f"{theirs}_ci_low below {theirs}_ci_high"
        raise DumpError(f"{path}: wanted {wanted}, found another; check the columns")
    implied = np.array([standard_error_of(*bounds) for bounds in zip(low, high, strict=True)])
    has_no_bounds = np.isnan(low) | np.isnan(high)
    unit, direction = UNITS.get(ours, ("as given", "not known"))
    rows: dict[str, Any] = {
        "step": frame["step"],
        "source": path.name,
        "metric": ours,
        "value": frame[theirs],
        # an error without bounds is drawn as the bounds of a Gaussian
        "value_ci_low": np.where(has_no_bounds, frame[theirs] - _Z95 * se, low),
        "value_ci_high": np.where(has_no_bounds, frame[theirs] + _Z95 * se, high),
        "se": np.where(np.isnan(se), implied, se),
        **{name: _whole(frame, name) for name in _COUNTS},
        "unit": unit,
        "direction": direction,
    }
    rows["note"] = np.where(
        np.isnan(rows["se"]), f"the table has neither {theirs}_se nor {theirs}_ci_low, _ci_high", ""
    )
    return TREND_BY_STEP.validate(pd.DataFrame(rows))


_Z95: Final = 1 / standard_error_of(-0.5, 0.5) / 2
"""Half widths of a 95 % interval per standard error."""


def _column(frame: pd.DataFrame, name: str) -> Any:
    return frame[name].to_numpy(np.float64) if name in frame else np.full(len(frame), np.nan)


def _whole(frame: pd.DataFrame, name: str) -> Any:
    return pd.array(_column(frame, name), dtype="Float64").astype("Int64")


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))
