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

from moediag.analysis.measures import ICEPOP_BAND, QUANTILE_MEASURES, TOKEN_MEASURES, prompt_sums
from moediag.analysis.metrics import LOWER, METRICS, Metric
from moediag.analysis.tokens import AnyTokens, Tokens
from moediag.analysis.vocabulary import EXACT_METRICS
from moediag.errors import DumpError
from moediag.frames import Column, declare, measured, with_ci
from moediag.statistics.intervals import Interval, mean_interval
from moediag.statistics.quantiles import quantile_of_rows
from moediag.statistics.recurrence import Recurrence, fit_recurrence
from moediag.statistics.resampling import TAIL

TREND_BY_STEP = declare(
    "trend_by_step",
    "step and metric",
    Column("step", "int64", "training step", "step whose rollouts were compared"),
    Column("source", "str", "1", "run or table that the row is from"),
    Column("metric", "str", "1", "dotted name as in logp_metrics, or the table's own"),
    *with_ci(
        measured("value", "see unit", "the metric over the scored response tokens of the step"),
        ", clustered by prompt unless the table brought its own",
    ),
    measured("se", "see unit", "standard error: half the interval's width over 1.96"),
    Column("n_tokens", "Int64", "token", "tokens behind the value; empty where the table does not say", nullable=True),
    Column("n_prompts", "Int64", "prompt", "clusters behind the interval", nullable=True),
    Column("unit", "str", "1", "unit of value"),
    Column("direction", "str", "1", "which end is good"),
    Column("note", "str", "1", "why there is no interval; empty otherwise"),
)

MASKED: Final = "icepop_masked_share"

KL_METRICS: Final = ("kl_infer_train_exact", "kl_infer_train_k3", "kl", "kl_infer_train_k1")
"""What can stand for the theorem's delta, best first: the KL itself; k3, the least noisy; an unnamed KL; k1."""

_MEANS: Final = ("abs_logp_diff.mean", "extreme_share_2", "kl_infer_train_k1", "kl_infer_train_k3")
Z95: Final = float(special.ndtri(1 - TAIL))
"""Half the width of a 95 % interval, in standard errors of a Gaussian."""


@dataclass(frozen=True)
class Mark:
    """A published number of a metric: what it was, and where it is from.

    Args:
        high: upper end, where a range was published.
        is_start: at most this is where healthy training starts, by that source.
    """

    metric: str
    value: float
    name: str
    source: str
    high: float | None = None
    is_start: bool = False

    @property
    def highest(self) -> float:
        """The number, or the upper end of the range."""
        return self.value if self.high is None else self.high

    @property
    def text(self) -> str:
        """The number or range in digits.

        Example:
            >>> Mark("m", 0.001, "name", "source", high=0.002).text
            '0.001 to 0.002'
        """
        return f"{self.value:g}" if self.high is None else f"{self.value:g} to {self.high:g}"


_TINKER: Final = "Tinker's documentation (RL hyperparameters): training is stable with a KL below it"

MARKS: Final = (
    Mark("abs_logp_diff.mean", 0.05, "IcePop post", "IcePop post, one run: past it training failed; its metric is not "
         "named (most plausibly this mean)"),
    Mark("abs_logp_diff.mean", 0.011, "healthy stacks", "healthy stacks: dense Qwen3-4B to GLM-4.5-Air, Qwen3-30B-A3B "
         "0.019 without routing replay (vime)", high=0.028, is_start=True),
    Mark("extreme_share_2", 0.1, "R3, collapse", "R3 (arXiv 2510.11370): exceeded where runs collapsed"),
    Mark("extreme_share_2", 2.54e-4, "R3, 30B-A3B", "R3: Qwen3-30B-A3B without replay", is_start=True),
    Mark("kl_infer_train_k3", 0.039, "Miles, collapse", "Miles: k3 at the collapse of one run"),
    Mark("kl_infer_train_k3", 1.535e-3, "R3, 30B-A3B", "R3: Qwen3-30B-A3B, SGLang against Megatron", is_start=True),
    Mark("kl_infer_train_k1", 0.1, "verl's alarm", "verl: its alarm on abs(kl)"),
    *(Mark(metric, 0.01, "Tinker's limit", _TINKER, is_start=True) for metric in KL_METRICS),
    Mark(MASKED, 0.001, "IcePop post, start", "IcePop post: 1 to 2 per mille at first, rising sharply later",
         high=0.002, is_start=True),
)  # fmt: skip
"""Numbers that others published, drawn as named lines or bands; stacks differ, so none says what is too much here."""


def standard_error_of(low: float, high: float) -> float:
    """Standard error that a 95 % interval implies; NaN without one.

    Example:
        >>> round(standard_error_of(0.0, 3.919927969080108), 9)
        1.0
    """
    width = high - low
    return width / (2 * Z95) if math.isfinite(width) and width > 0 else math.nan


def step_metrics(step: int, source: str, tokens: AnyTokens, exact: Iterable[Mapping[Any, Any]] = ()) -> pd.DataFrame:
    """The metrics of one step, from its response tokens.

    Args:
        step: training step.
        source: where the tokens are from.
        tokens: a frame with logp_train, logp_infer [nat] and prompt_id; NaN = not scored.
        exact: rows of frame ``exact_divergences``, where whole distributions were kept.

    Returns:
        Rows of frame ``trend_by_step``.
    """
    scored = Tokens.of(tokens)
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


def _all(scored: Tokens) -> Iterable[tuple[str, str, str, Interval]]:
    """(name, unit, good end, interval) of every metric of a step."""
    means = [measure for measure in TOKEN_MEASURES if measure.name in _MEANS]
    sums = prompt_sums(scored, means)
    for measure in means:
        yield measure.name, measure.unit, measure.direction, measure.intervals(sums, scored.n_by_prompt).one()
    p99 = quantile_of_rows(scored.abs_diff_T, scored.prompt_row_T, scored.n_prompts, 0.99)
    yield "abs_logp_diff.p99", "nat", LOWER, p99
    yield MASKED, "1", LOWER, icepop_masked(scored)


def icepop_masked(scored: Tokens) -> Interval:
    """Share of tokens outside IcePop's band, with its interval."""
    low, high = np.log(ICEPOP_BAND)
    return mean_interval((scored.diff_T < low) | (scored.diff_T > high), scored.prompt_row_T, "rate")


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


def delta_metric(trend: pd.DataFrame, name: str | None = None) -> str | None:
    """The metric that stands for the theorem's delta: the one requested, else the best KL that every step has.

    Raises:
        DumpError: the one requested is not there.
    """
    there = list(dict.fromkeys(trend.loc[trend["value"].notna(), "metric"]))
    if name is not None:
        if name not in there:
            raise DumpError(f"no metric {name} in the series; it has {', '.join(there) or 'none'}")
        return name
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


_OURS: Final = (
    *(measure for measure in TOKEN_MEASURES if measure.name in _MEANS),
    *(metric for metric, _, _ in QUANTILE_MEASURES if metric.name == "abs_logp_diff.p99"),
    *(metric for metric in EXACT_METRICS if metric.name == KL_METRICS[0]),
    Metric(MASKED, "1", LOWER, "masked by IcePop {:g} to {:g}".format(*ICEPOP_BAND), is_share=True),
    Metric("masked_share", "1", LOWER, "masked share, as the table has it", is_share=True),
    Metric("kl", "nat", LOWER, "KL, as the table has it"),
)
KNOWN: Final[dict[str, Metric]] = {metric.name: metric for metric in _OURS}
"""The metrics known by name, with unit and good end; of a table's other columns neither is known."""


def metric_of(name: str) -> Metric | None:
    """A column of a table of steps that is a metric of ours, what a correction masks among them; None = another's.

    Example:
        >>> metric_of("masked_share.ring-1t").label, metric_of("reward")
        ('masked by ring-1t', None)
    """
    kind, _, correction = name.partition(".")
    if correction and kind == "masked_share":
        return Metric(name, "1", LOWER, f"masked by {correction}", is_share=True)
    if correction and kind == "masked_entropy":
        return Metric(name, "nat", "neither end", f"entropy of tokens masked by {correction}")
    return KNOWN.get(name) or METRICS.get(name)


def range_of(metric: str) -> tuple[float, float]:
    """What a metric known by name can be: k1 and an unnamed KL of either sign, a share at most 1.

    Example:
        >>> range_of("kl_infer_train_k3"), range_of("extreme_share_2"), range_of("kl_infer_train_k1")
        ((0.0, inf), (0.0, 1.0), (-inf, inf))
    """
    known = KNOWN.get(metric)
    is_signed = known is None or metric in ("kl", "kl_infer_train_k1")
    return -math.inf if is_signed else 0.0, 1.0 if known and known.is_share else math.inf


def published_start(metric: str) -> Mark | None:
    """The highest level at which healthy training starts, as published."""
    there = [mark for mark in MARKS if mark.metric == metric and mark.is_start]
    return max(there, key=lambda mark: mark.highest, default=None)
