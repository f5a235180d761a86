"""Where a series over training steps comes from: runs, one per step, a folder of them, or one table with a ``step``.

A table holds either a row per token (``step``, ``seq_id``, ``position``, ``logp_train``, ``logp_infer``, optionally
``prompt_id`` and ``is_response``) or a row per step (``step`` and a column per metric, each optionally with
``<metric>_se`` or ``<metric>_ci_low`` and ``<metric>_ci_high``, and ``n_tokens``, ``n_prompts``).

Invariants:
    - how each step came by its number is said: from --steps, from the folders' names, or from their order;
    - metrics keep the table's names, but those that are moediag's by another name are renamed, and that is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pandas as pd
import pyarrow as pa

from moediag.analysis.metrics import METRICS
from moediag.analysis.series import (
    KL_METRICS,
    TREND_BY_STEP,
    Z95,
    metric_of,
    range_of,
    standard_error_of,
    step_metrics,
    trend_of,
)
from moediag.analysis.tokens import concatenate_tokens, token_columns
from moediag.analysis.vocabulary import exact_divergences
from moediag.errors import DumpError
from moediag.hygiene.findings import Finding
from moediag.hygiene.logged import check_logged
from moediag.hygiene.series import Schedule
from moediag.importers.columns import is_token_table
from moediag.importers.registry import foreign_format
from moediag.importers.rollouts import Options
from moediag.importers.tables import KINDS, OnProgress, TableFile, open_table
from moediag.importers.tokens import LoggedTokens, TokenTable
from moediag.importers.write import imported_for_now
from moediag.report.measures import text_origin
from moediag.run.reader import Run, open_run
from moediag.run.series import Series, is_series, open_series
from moediag.watch import STEPS as WATCHED

SYNONYMS: Final = {
    "mean_abs_logp_diff": "abs_logp_diff.mean",
    "p99_abs_logp_diff": "abs_logp_diff.p99",
    "k1": "kl_infer_train_k1",
    "k3": "kl_infer_train_k3",
    "chi2_seq": "chi2_sequence",
    # verl's kl is k1, but elsewhere the word is k3, or the KL to a reference model: it stays what the table calls it
    **{
        alias.name: metric.name
        for metric in METRICS.values()
        for alias in metric.elsewhere
        if alias.is_metric_name and alias.name != "kl"
    },
}
"""Other names of the metrics that moediag has."""

_COUNTS: Final = ("n_tokens", "n_prompts")
_PARTS: Final = ("_se", "_ci_low", "_ci_high")
_RATES: Final = ("lr", "learning_rate", "actor/lr")  # verl's name is the last
_RESTART: Final = "restart"
_FINDINGS: Final = "n_findings"  # how many a Watch had
_TRAILING: Final = re.compile(r"(\d+)$")
MOST_TOKEN_STEPS: Final = 500
"""Steps of a table of tokens that are measured: one takes about 0.06 s on one core, most of it for its intervals."""
_ROUNDING: Final = float(np.finfo(np.float32).eps)
"""exp(d) - 1 - d in float32 may fall this far below 0, and a share this far beyond 1."""


@dataclass(frozen=True)
class TrendSource:
    """A series and what a reader has to know of how it was read.

    Args:
        trend: frame ``trend_by_step``.
        step_origin: how the steps came by their numbers.
        is_kl: whether k1 and k3 may stand for a KL: not on text that infer did not sample freely.
        findings: what is wrong with the tokens, or likely so, by the rules of ``validate``; none of a table of steps.
        schedule: learning rates and restarts, where a table of steps has them.
    """

    trend: pd.DataFrame
    step_origin: str
    is_kl: bool
    notes: tuple[str, ...]
    findings: tuple[Finding, ...] = ()
    schedule: Schedule = field(default_factory=Schedule)


def read_trend(
    targets: Sequence[Path], steps: Sequence[int] | None, on_progress: OnProgress, options: Options | None = None
) -> TrendSource:
    """The series of runs, of a folder of them, of one table, or of the folder of a :class:`moediag.Watch`.

    Raises:
        DumpError: neither runs nor one table, or a table that is none.
        RunError: a run that cannot be read.
    """
    targets = [path / WATCHED if (path / WATCHED).is_file() else path for path in targets]
    series = [open_series(path) for path in targets if is_series(path)]
    if series:
        if len(targets) > 1 or steps is not None:
            raise DumpError(f"{series[0].path} is a series, which stands alone and knows its steps")
        return _read_series(series[0], on_progress)
    if (format_name := foreign_format(targets)) is not None:
        if steps is not None:
            raise DumpError(f"{targets[0]} is a dump of {format_name}, which knows its steps; --steps is for runs")
        with imported_for_now(targets, replace(options or Options(), on_progress=on_progress)) as runs:
            return _read_runs(runs, None, on_progress)
    tables = [path for path in targets if path.suffix in KINDS or path.is_file()]
    if not tables:
        return _read_runs([open_run(path) for path in targets], steps, on_progress)
    if len(targets) > 1 or steps is not None:
        expected = "--steps is for runs" if len(targets) == 1 else f"found {len(targets)} arguments"
        raise DumpError(f"{tables[0]} is a table, which stands alone and holds its steps; {expected}")
    if tables[0].suffix not in KINDS:
        raise DumpError(f"{tables[0]} is no table by its name; expected a run directory, or {', '.join(KINDS)}")
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


def _read_series(series: Series, on_progress: OnProgress) -> TrendSource:
    """Of the runs, whose tokens are there; else of what was logged at every step."""
    runs = list(series.runs())
    if runs:
        return _read_runs(runs, None, on_progress)
    table = series.step_table
    if table is None:
        raise DumpError(f"{series.path} holds neither a run nor a table of steps yet")
    return _read_table(open_table(table), on_progress)


def _read_runs(runs: Sequence[Run], steps: Sequence[int] | None, on_progress: OnProgress) -> TrendSource:
    labels, known = [run.path.resolve().name for run in runs], [run.record.step for run in runs]
    if steps is None and all(step is not None for step in known):
        numbers, origin = [int(step or 0) for step in known], "run.json"
    else:
        numbers, origin = steps_of(labels, steps)
    frames, notes, infinite = [], [], _Infinite()
    for done, (run, label, step) in enumerate(zip(runs, labels, numbers, strict=True), start=1):
        tokens = concatenate_tokens([token_columns(block, None) for block in run.pair(*run.main_arms).blocks()])
        infinite.add(step, tokens)
        exact = exact_divergences(run)
        rows = [] if exact is None else exact.measures.to_dict("records")
        frames.append(step_metrics(step, label, tokens, rows))
        sampling = run.record.sampling.content() if run.record.sampling else {}
        if reason := text_origin({"sampling": {**sampling, "given_completions": not run.is_sampled}}):
            notes.append(f"{label}: {reason}, so k1 and k3 are statistics and no KL")
        if reason := run.other_weights(*run.main_arms):
            notes.append(f"{label}: {reason}")
        on_progress(done, len(runs), "runs")
    checkpoints = (run.checkpoint_of(run.main_arms[0]) for run in runs)
    architectures = sorted({str(one.architecture) for one in checkpoints if one is not None})
    if len(architectures) > 1:
        notes.append(f"the runs are of different architectures ({', '.join(architectures)}): no steps of one training")
    sources = {run.record.prompts and (run.record.prompts.source_sha256, run.record.prompts.n) for run in runs}
    if len(sources) > 1:
        notes.append("the runs were made from different prompts: a change of prompts is in the series too")
    elif len(runs) > 1 and None not in sources:
        notes.append(
            "every step has the same prompts: their share of the errors is common to all steps, not independent"
        )
    notes = [*infinite.notes(), *notes]
    return TrendSource(trend_of(frames), origin, not any("no KL" in note for note in notes), tuple(notes))


def _read_table(table: TableFile, on_progress: OnProgress) -> TrendSource:
    if "step" not in table.types:
        raise DumpError(f"{table.path} has no column step; found {', '.join(table.types)}")
    if not is_token_table(table.types):
        return _read_steps(table, on_progress)
    unused = (
        "advantage",
        "reward",
        "token_id",
        "logp_train_new",
        "n_flipped_layers",
        "turn",
        "weight_version",
        "entropy_train",
    )
    known = TokenTable.of(table).without(unused)
    tokens = known.read(on_progress)
    thinned, infinite = _thinned(tokens), _Infinite()
    trend = trend_of(_steps_of_tokens(table, thinned.frame, infinite, on_progress))
    n_steps, n_kept = (len(np.unique(some.columns["step"][some.input_row_T])) for some in (tokens, thinned))
    notes = [*infinite.notes(), *tokens.notes(),
             "k1 and k3 are a KL only if infer sampled the tokens from the distribution whose log-probabilities were "
             "logged: at temperature 1 without truncation, or both sides' taken after them"]  # fmt: skip
    if n_kept < n_steps:
        notes.append(f"{n_kept:,} of {n_steps:,} steps are measured, evenly spaced, for the time it takes")
    return TrendSource(trend, "column step", True, tuple(notes), tuple(check_logged(thinned)))


def _thinned(tokens: LoggedTokens) -> LoggedTokens:
    """The tokens of at most :data:`MOST_TOKEN_STEPS` steps, first and last among them."""
    step_T = tokens.columns["step"][tokens.input_row_T]
    steps = np.unique(step_T)
    if len(steps) <= MOST_TOKEN_STEPS:
        return tokens
    kept = steps[np.linspace(0, len(steps) - 1, MOST_TOKEN_STEPS).round().astype(int)]
    return tokens.some(np.isin(step_T, kept))


def _steps_of_tokens(
    table: TableFile, frame: pd.DataFrame, infinite: _Infinite, on_progress: OnProgress
) -> Iterator[pd.DataFrame]:
    n_steps = frame["step"].nunique()
    for done, (step, tokens) in enumerate(frame.groupby("step", sort=True), start=1):
        infinite.add(int(cast(Any, step)), tokens)
        yield step_metrics(int(cast(Any, step)), table.path.name, tokens)
        on_progress(done, n_steps, "steps")


class _Infinite:
    """Counts the tokens that a side calls impossible: they are left out of every metric, and that is said."""

    def __init__(self) -> None:
        self._by_step: dict[int, int] = {}
        self._n_tokens = self._n_steps = 0

    def add(self, step: int, tokens: pd.DataFrame) -> None:
        """Count the response tokens of a step."""
        is_infinite_T = np.isinf(tokens["logp_train"].to_numpy()) | np.isinf(tokens["logp_infer"].to_numpy())
        self._n_tokens, self._n_steps = self._n_tokens + len(tokens), self._n_steps + 1
        if is_infinite_T.any():
            self._by_step[step] = int(is_infinite_T.sum())

    def notes(self) -> list[str]:
        """One note, or none."""
        if not self._by_step:
            return []
        return [
            f"D31-impossible-logp: {sum(self._by_step.values()):,} of {self._n_tokens:,} tokens have a log-probability "
            f"of -inf (at {len(self._by_step)} of {self._n_steps} steps, first {min(self._by_step)}); no metric holds "
            "them, k3 and F(2) least of all"
        ]


def _read_steps(table: TableFile, on_progress: OnProgress) -> TrendSource:
    """A table of one row per step."""
    numeric = [name for name, kind in table.types.items() if _is_number(kind) and name != "step"]
    others = (*_COUNTS, *_RATES, _RESTART, _FINDINGS)
    metrics = [name for name in numeric if name not in others and not name.endswith(_PARTS)]
    if not metrics:
        raise DumpError(f"{table.path} has no column of numbers beside step; found {', '.join(table.types)}")
    columns = table.read({"step": "whole", **dict.fromkeys(numeric, "number")}, on_progress)
    frame = pd.DataFrame(columns)
    twice = frame.loc[frame["step"].duplicated(), "step"]
    if len(twice):
        raise DumpError(
            f"{table.path}: step {twice.iloc[0]} has more than one row; a table of steps needs one, a table of tokens "
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
    for theirs, ours in names.items():
        notes += _refuse_values(table.path, frame, theirs, ours)
    parts = [_metric_of_steps(table.path, frame, theirs, ours) for theirs, ours in names.items()]
    return TrendSource(trend_of(parts), "column step", True, tuple(notes), schedule=_schedule(frame))


def _schedule(frame: pd.DataFrame) -> Schedule:
    """Learning rates (steps without one are not known to have any) and steps marked as restarts by a number but 0."""
    rates = next((frame[name] for name in _RATES if name in frame), pd.Series(dtype=np.float64))
    known = {} if rates.empty or rates.isna().any() else dict(zip(frame["step"], rates, strict=True))
    marked = frame[_RESTART].fillna(0) != 0 if _RESTART in frame else np.zeros(len(frame), np.bool_)
    return Schedule(known, frozenset(map(int, frame.loc[marked, "step"])))


def _refuse_values(path: Path, frame: pd.DataFrame, theirs: str, ours: str) -> list[str]:
    """Values that the metric cannot have; those that rounding put there are set to the bound, in place, and noted.

    Raises:
        DumpError: a value beyond rounding.
    """
    low, high = range_of(ours)
    is_outside = (frame[theirs] < low) | (frame[theirs] > high)
    if not is_outside.any():
        return []
    wrong = frame[is_outside & ~frame[theirs].between(low - _ROUNDING, high + _ROUNDING)]
    if len(wrong):
        row = wrong.iloc[0]
        known_as = "" if theirs == ours else f", read as {ours},"
        expected = "at least 0" if high > 1 else "between 0 and 1"
        advice = "is it k1, the mean of -logp_diff? then name it k1" if ours.endswith("k3") else "check the column"
        raise DumpError(
            f"{path}: {theirs}{known_as} is {expected} by definition, found {row[theirs]:.4g} at step "
            f"{int(row['step'])} ({len(wrong):,} of {len(frame):,} steps); {advice}"
        )
    frame[theirs] = frame[theirs].clip(low, high)
    n = int(is_outside.sum())
    return [f"{theirs}: {n} values beyond their range by rounding (at most {_ROUNDING:.1g}) are set to its end"]


def _metric_of_steps(path: Path, frame: pd.DataFrame, theirs: str, ours: str) -> pd.DataFrame:
    """One metric of a table of steps, its errors from the table or none."""
    low, high, se = (_column(frame, f"{theirs}{part}") for part in ("_ci_low", "_ci_high", "_se"))
    if (se < 0).any() or (low > high).any():
        expected = f"{theirs}_se of at least 0" if (se < 0).any() else f"{theirs}_ci_low below {theirs}_ci_high"
        raise DumpError(f"{path}: expected {expected}, found another; check the columns")
    implied = np.array([standard_error_of(*bounds) for bounds in zip(low, high, strict=True)])
    has_no_bounds = np.isnan(low) | np.isnan(high)
    se = np.where(np.isfinite(frame[theirs]), se, np.nan)  # of what is infinite there is no error
    known = metric_of(ours)
    unit, direction = (known.unit, known.direction) if known else ("as given", "not known")
    rows: dict[str, Any] = {
        "step": frame["step"],
        "source": path.name,
        "metric": ours,
        "value": frame[theirs],
        # an error without bounds is drawn as the bounds of a Gaussian
        "value_ci_low": np.where(has_no_bounds, frame[theirs] - Z95 * se, low),
        "value_ci_high": np.where(has_no_bounds, frame[theirs] + Z95 * se, high),
        "se": np.where(np.isnan(se), implied, se),
        **{name: _whole(frame, name) for name in _COUNTS},
        "unit": unit,
        "direction": direction,
    }
    rows["note"] = np.where(
        np.isnan(rows["se"]), f"the table has neither {theirs}_se nor {theirs}_ci_low, _ci_high", ""
    )
    return TREND_BY_STEP.validate(pd.DataFrame(rows))


def _column(frame: pd.DataFrame, name: str) -> Any:
    return frame[name].to_numpy(np.float64) if name in frame else np.full(len(frame), np.nan)


def _whole(frame: pd.DataFrame, name: str) -> Any:
    return pd.array(_column(frame, name), dtype="Float64").astype("Int64")


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))
