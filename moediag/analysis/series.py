"""The mismatch over the steps of a training run: one row per step and metric, with n, interval and standard error.

Invariants:
    - the numbers of a step are those of its own tokens, by the same formulas and intervals as any pair's;
    - a standard error is that of the interval given (half its width over 1.96): wide where prompts are few or single
      tokens decide, and absent, never 0, where there is no interval;
    - published numbers are *marks* with their source, other stacks' and often one run's: never a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from scipy import special

from moediag.analysis.intervals import Interval, mean_interval
from moediag.analysis.measures import LOWER, TOKEN_MEASURES, ZERO, Scored, abs_diff, scored_arrays
from moediag.analysis.quantiles import quantile_of_rows
from moediag.analysis.recurrence import Recurrence, fit_recurrence
from moediag.analysis.resampling import TAIL
from moediag.errors import DumpError
from moediag.frames import Column, ci_columns, declare

TREND_BY_STEP = declare(
    "trend_by_step",
    "step and metric",
    Column("step", "int64", "training step", "step whose rollouts were compared"),
    Column("source", "str", "1", "run or table that the row is from"),
    Column("metric", "str", "1", "dotted name as in logp_metrics, or the table's own"),
    Column("value", "float64", "see unit", "the metric over the scored response tokens of the step", nullable=True),
    *ci_columns("value", "see unit", "value, clustered by prompt unless the table brought its own"),
    Column("se", "float64", "see unit", "standard error: half the interval's width over 1.96", nullable=True),
    Column("n_tokens", "Int64", "token", "tokens behind the value; empty where the table does not say", nullable=True),
    Column("n_prompts", "Int64", "prompt", "clusters behind the interval", nullable=True),
    Column("unit", "str", "1", "unit of value"),
    Column("direction", "str", "1", "which end is good"),
    Column("note", "str", "1", "why there is no interval; empty otherwise"),
)

MASKED: Final = "icepop_masked_share"
ICEPOP_BAND: Final = (0.5, 5.0)
"""Ring-1T's band (arXiv 2510.18855): tokens whose ratio leaves it get no update."""

KL_METRICS: Final = ("kl_infer_train_exact", "kl_infer_train_k3", "kl", "kl_infer_train_k1")
"""What can stand for the theorem's delta, best first: the KL itself; k3, the least noisy; an unnamed KL; k1."""

_MEANS: Final = ("abs_logp_diff.mean", "extreme_share_2", "kl_infer_train_k1", "kl_infer_train_k3")
_Z: Final = float(special.ndtri(1 - TAIL))


@dataclass(frozen=True)
class Mark:
    """A published number of a metric: what it was, and where it is from."""

    metric: str
    value: float
    name: str
    source: str


MARKS: Final = (
    Mark("abs_logp_diff.mean", 0.05, "IcePop post", "IcePop post, one run: past it training failed; its metric is not "
         "named (most plausibly this mean)"),
    Mark("abs_logp_diff.mean", 0.019, "vime, 30B-A3B", "vime: Qwen3-30B-A3B without routing replay"),
    Mark("extreme_share_2", 0.1, "R3, collapse", "R3 (arXiv 2510.11370): exceeded where runs collapsed"),
    Mark("extreme_share_2", 2.54e-4, "R3, 30B-A3B", "R3: Qwen3-30B-A3B without replay"),
    Mark("kl_infer_train_k3", 0.039, "Miles, collapse", "Miles: k3 at the collapse of one run"),
    Mark("kl_infer_train_k3", 1.535e-3, "R3, 30B-A3B", "R3: Qwen3-30B-A3B, SGLang against Megatron"),
    Mark("kl_infer_train_k1", 0.1, "verl's alarm", "verl: its alarm on abs(kl)"),
    Mark(MASKED, 0.0015, "IcePop post, start", "IcePop post: 1 to 2 per mille at first, rising sharply later"),
)  # fmt: skip
"""Numbers that others published, drawn as named lines; stacks differ, so none says what is too much here."""


def standard_error_of(low: float, high: float) -> float:
    """Standard error that a 95 % interval implies; NaN without one.

    Example:
        >>> round(standard_error_of(0.0, 3.919927969080108), 9)
        1.0
    """
    width = high - low
    return width / (2 * _Z) if math.isfinite(width) and width > 0 else math.nan


def step_metrics(step: int, source: str, tokens: pd.DataFrame, exact: Iterable[Mapping[Any, Any]] = ()) -> pd.DataFrame:
    """The metrics of one step, from its response tokens.

    Args:
        step: training step.
        source: where the tokens are from.
        tokens: a frame with logp_train, logp_infer [nat] and prompt_id; NaN = not scored.
        exact: rows of frame ``exact_divergences``, where whole distributions were kept.

    Returns:
        Rows of frame ``trend_by_step``.
    """
    scored = scored_arrays(tokens)
    found = [(name, unit, good, interval, len(scored), scored.n_prompts) for name, unit, good, interval in _all(scored)]
    for row in exact:
        if row["measure"] == KL_METRICS[0]:
            interval = Interval(row["value"], row["ci_low"], row["ci_high"], row["n_prompts"], row["note"])
            found.append((KL_METRICS[0], "nat", LOWER, interval, int(row["n_tokens"]), int(row["n_prompts"])))
    return TREND_BY_STEP.validate(
        pd.DataFrame.from_records(
            [
                {
                    "step": step, "source": source, "metric": name, "value": interval.value,
                    "value_ci_low": interval.low, "value_ci_high": interval.high,
                    "se": standard_error_of(interval.low, interval.high), "n_tokens": n_tokens,
                    "n_prompts": n_prompts, "unit": unit, "direction": good, "note": interval.note,
                }
                for name, unit, good, interval, n_tokens, n_prompts in found
            ]
        )
    )  # fmt: skip


def _all(scored: Scored) -> Iterable[tuple[str, str, str, Interval]]:
    """(name, unit, good end, interval) of every metric of a step."""
    for measure in TOKEN_MEASURES:
        if measure.name in _MEANS:
            interval = measure.intervals(scored, scored.by_prompt, scored.n_by_prompt).one()
            yield measure.name, measure.unit, measure.direction, interval
    p99 = quantile_of_rows(abs_diff(scored), scored.prompt_row_T, scored.n_prompts, 0.99)
    yield "abs_logp_diff.p99", "nat", LOWER, p99
    low, high = np.log(ICEPOP_BAND)
    is_masked_T = (scored.diff_T < low) | (scored.diff_T > high)
    yield MASKED, "1", LOWER, mean_interval(is_masked_T, scored.prompt_row_T, "rate")


def trend_of(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """The steps of several sources as one frame, ascending.

    Raises:
        DumpError: two sources have the same step.
    """
    frame = TREND_BY_STEP.validate(pd.concat(list(frames), ignore_index=True))
    twice = frame[frame.duplicated(["step", "metric"], keep=False)]
    if len(twice):
        step = int(twice["step"].iloc[0])
        sources = sorted(set(twice.loc[twice["step"] == step, "source"]))
        raise DumpError(f"step {step} is there more than once ({', '.join(sources)}); give every step once, or --steps")
    return TREND_BY_STEP.validate(frame.sort_values("step", kind="stable"))


def metric_rows(trend: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of one metric, by step."""
    rows: pd.DataFrame = trend[trend["metric"] == metric]
    return rows


def delta_metric(trend: pd.DataFrame, wanted: str | None = None) -> str | None:
    """The metric that stands for the theorem's delta: the one asked for, else the best KL that every step has.

    Raises:
        DumpError: the one asked for is not there.
    """
    there = list(dict.fromkeys(trend.loc[trend["value"].notna(), "metric"]))
    if wanted is not None:
        if wanted not in there:
            raise DumpError(f"no metric {wanted} in the series; it has {', '.join(there) or 'none'}")
        return wanted
    n_steps = trend["step"].nunique()
    full = [name for name in KL_METRICS if metric_rows(trend, name)["value"].notna().sum() == n_steps]
    return next(iter(full), next((name for name in KL_METRICS if name in there), None))


def trend_recurrence(
    trend: pd.DataFrame, metric: str | None, on_progress: Callable[[int, int], None] | None = None
) -> Recurrence:
    """The recurrence of one metric of the series, or why it cannot tell.

    Args:
        trend: frame ``trend_by_step``.
        metric: as :func:`delta_metric` gives it; None = no KL in the series.
    """
    if metric is None:
        steps = np.unique(trend["step"].to_numpy())
        reason = (
            f"the series holds no KL ({', '.join(KL_METRICS)}), which is what the theorem is about; "
            "--fit takes another metric"
        )
        first, last = (float(steps[0]), float(steps[-1])) if len(steps) else (math.nan, math.nan)
        return Recurrence("cannot tell", reason, len(steps), first, last)
    rows = metric_rows(trend, metric)
    step_N, delta_N, se_N = (rows[name].to_numpy(np.float64) for name in ("step", "value", "se"))
    return fit_recurrence(step_N, delta_N, se_N, on_progress)


UNITS: Final = {
    "abs_logp_diff.mean": ("nat", LOWER),
    "abs_logp_diff.p99": ("nat", LOWER),
    "kl_infer_train_exact": ("nat", LOWER),
    "kl_infer_train_k1": ("nat", ZERO),
    "kl_infer_train_k3": ("nat", LOWER),
    "kl": ("nat", LOWER),
    "extreme_share_2": ("1", LOWER),
    "masked_share": ("1", LOWER),
    MASKED: ("1", LOWER),
}
"""Unit and good end of the metrics known by name; of a table's other columns neither is known."""
