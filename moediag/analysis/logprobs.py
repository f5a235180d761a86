"""Log-probability mismatch over all tokens: the metric table, the tail curve, the spread of ratios.

Invariants:
    - only tokens scored by both arms count, and ``n_tokens`` says how many; a metric over none is NaN;
    - reductions run in float64 over the prompts' own sums, so shards may come in any order;
    - a statistic whose interval was measured not to cover gets none, and ``note`` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import LOGP_METRICS, RATIO_QUANTILES, TAIL_CURVE
from moediag.analysis.measures import (
    BIT_EXACT,
    EXTREME_TAU,
    LOWER,
    ONE,
    QUANTILE_MEASURES,
    TOKEN_MEASURES,
    ZERO,
    Scored,
    TokenMeasure,
    abs_diff,
    prob_diff,
    scored_arrays,
)
from moediag.analysis.tokens import scored_tokens
from moediag.statistics.intervals import Interval, Kind, jackknife_interval, mean_interval, ratio_mean_interval
from moediag.statistics.quantiles import quantile_of_rows

Float64 = NDArray[np.float64]

TAIL_THRESHOLDS: Final = np.unique(np.r_[np.logspace(-4, 1, 51), math.log(EXTREME_TAU)])
"""Ten thresholds per decade of abs(logp_diff), 1e-4 to 10 nat, and ln 2 itself."""
RATIO_PROBABILITIES: Final = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)

_NO_MAX: Final = "no honest interval exists for a maximum"
_SPREAD_CLUSTERS: Final = 256
"""Prompts from which on the interval of a standard deviation or a correlation covers: both hang on single tokens."""
_UNCOVERED: Final = "no interval: none that was tried covers for this statistic"


@dataclass(frozen=True)
class _Data:
    """Scored tokens, and per sequence: n, sums of diff, of logp_train and of logp_infer, and the prompt."""

    tokens: Scored
    n_S: Float64
    diff_S: Float64
    train_S: Float64
    infer_S: Float64
    prompt_S: NDArray[Any]


_Measure = Callable[[_Data], Interval]


def logp_metrics(tokens: pd.DataFrame) -> pd.DataFrame:
    """Every headline metric of the mismatch, with n and an interval clustered by prompt beside it.

    Args:
        tokens: token frame of a pair.

    Returns:
        Frame ``logp_metrics``; unit and good end stand in each row, ``note`` says why a bound is absent.

    Source: IcePop Fig. 1 for ``abs_logp_diff``, R3 (arXiv 2510.11370) for ``extreme_share_2``, verl for prob diffs,
    ppl, ESS, chi2; who uses which under what name stands in :data:`~moediag.analysis.aliases.ALIASES`.
    """
    data = _data(tokens)
    with np.errstate(over="ignore", invalid="ignore"):  # exp of an absurd diff is inf, and inf is what the table shows
        records = [_record(name, unit, direction, measure(data)) for name, unit, direction, measure in _METRICS]
    frame = pd.DataFrame.from_records(records)
    frame["n_tokens"] = len(data.tokens)
    frame["n_prompts"] = data.tokens.n_prompts
    if not len(data.tokens):
        frame["note"] = "no token was scored by both arms"
    return LOGP_METRICS.validate(frame)


def tail_curve(tokens: pd.DataFrame, thresholds: Float64 = TAIL_THRESHOLDS) -> pd.DataFrame:
    """How many tokens differ by more than a threshold: the tail separates runs where the mean does not.

    Args:
        tokens: token frame of a pair.
        thresholds: abs(logp_diff) thresholds [nat]; rows are in ascending order.

    Returns:
        Frame ``tail_curve``: exact counts strictly above, with intervals of the shares; lower is better; NaN shares
        when nothing is scored.

    Source: R3 (arXiv 2510.11370), F(tau) with tau = exp(threshold).
    """
    scored = scored_arrays(tokens)
    thresholds = np.sort(thresholds)
    size = len(thresholds) + 1
    # a token lies above the first `rank` thresholds: counting ranks by prompt gives every threshold at once
    rank_T = np.searchsorted(thresholds, abs_diff(scored), side="left")
    count = np.bincount(scored.prompt_row_T * size + rank_T, minlength=scored.n_prompts * size)
    above_CM = count.reshape(scored.n_prompts, size)[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
    interval = ratio_mean_interval(above_CM, scored.n_by_prompt[:, None], "rate")
    frame = pd.DataFrame({"threshold": thresholds, "n_above": above_CM.sum(axis=0)})
    frame["share_above"] = frame["n_above"] / len(scored) if len(scored) else np.nan
    frame["share_above_ci_low"], frame["share_above_ci_high"] = interval.low_M, interval.high_M
    frame["n_tokens"] = len(scored)
    return TAIL_CURVE.validate(frame)


def ratio_quantiles(tokens: pd.DataFrame) -> pd.DataFrame:
    """How the ratios spread: of tokens, and of whole sequences as product and as geometric mean.

    What sequence-level corrections cut is decided by these: a product over a thousand tokens spreads about thirty
    times wider than a token's ratio, the geometric mean thirty times less.

    Args:
        tokens: token frame of a pair.

    Returns:
        Frame ``ratio_quantiles`` of log-ratios [nat], 0 is best; a quantile beyond 1 % or 99 % is NaN unless
        20 tokens or sequences of 10 prompts lie beyond.

    Source: GSPO, Geo-RS and Seq-MIS for the two sequence ratios.
    """
    data = _data(tokens)
    prompts, row_S = np.unique(data.prompt_S, return_inverse=True)
    with np.errstate(invalid="ignore"):
        levels = (
            ("token", data.tokens.diff_T, data.tokens.prompt_row_T, data.tokens.n_prompts),
            ("sequence_product", data.diff_S, row_S, len(prompts)),
            ("sequence_geometric", data.diff_S / data.n_S, row_S, len(prompts)),
        )
    records = []
    for level, values, row, n_rows in levels:
        for q in RATIO_PROBABILITIES:
            # the lower tail is the upper tail of the negative: one rule for both
            sign = -1.0 if q < 0.5 else 1.0
            interval = quantile_of_rows(sign * values, row, n_rows, max(q, 1 - q))
            bounds = sorted((sign * interval.low, sign * interval.high))
            records.append((level, q, sign * interval.value, *bounds, len(values)))
    names = [column.name for column in RATIO_QUANTILES.columns]
    return RATIO_QUANTILES.validate(pd.DataFrame.from_records(records, columns=names))


def _data(tokens: pd.DataFrame) -> _Data:
    scored = scored_arrays(tokens)
    rows = scored_tokens(tokens)
    _, first_S, seq_T = np.unique(rows["seq_id"].to_numpy(), return_index=True, return_inverse=True)
    n_S, diff_S, train_S, infer_S = (
        np.bincount(seq_T, weights=values_T, minlength=len(first_S)).astype(np.float64)
        for values_T in (None, scored.diff_T, scored.logp_train_T, scored.logp_infer_T)
    )
    return _Data(scored, n_S, diff_S, train_S, infer_S, rows["prompt_id"].to_numpy()[first_S])


def _record(name: str, unit: str, direction: str, interval: Interval) -> dict[str, Any]:
    return {
        "metric": name,
        "value": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "largest_prompt_share": interval.largest_share,
        "unit": unit,
        "direction": direction,
        "note": interval.note,
    }


def _token_mean(measure: TokenMeasure) -> _Measure:
    return lambda x: measure.intervals(x.tokens, x.tokens.by_prompt, x.tokens.n_by_prompt).one()


def _sequence_mean(kind: Kind, of: Callable[[_Data], Float64]) -> _Measure:
    return lambda x: mean_interval(of(x), x.prompt_S, kind)


def _quantile(q: float, of: Callable[[Scored], Float64]) -> _Measure:
    return lambda x: quantile_of_rows(of(x.tokens), x.tokens.prompt_row_T, x.tokens.n_prompts, q)


def _point(of: Callable[[_Data], float], note: str) -> _Measure:
    def measure(x: _Data) -> Interval:
        value = of(x) if len(x.tokens) else np.nan
        return Interval(float(value), np.nan, np.nan, x.tokens.n_prompts, note)

    return measure


def std_interval(x: Scored) -> Interval:
    """Standard deviation of abs(p_train - p_infer), ddof = 1 as in verl, with its interval."""
    size_T = prob_diff(x)
    columns = (np.ones(len(x)), size_T, np.square(size_T))
    return jackknife_interval(
        np.stack([x.by_prompt(column) for column in columns], axis=1), _std, "log", _SPREAD_CLUSTERS
    )


def pearson_interval(x: Scored) -> Interval:
    """Correlation of p_train and p_infer with its interval; 1 is best."""
    # centred at 1/2: products then keep their digits
    train_T, infer_T = np.exp(x.logp_train_T) - 0.5, np.exp(x.logp_infer_T) - 0.5
    columns = (np.ones(len(x)), train_T, infer_T, np.square(train_T), np.square(infer_T), train_T * infer_T)
    return jackknife_interval(
        np.stack([x.by_prompt(column) for column in columns], axis=1), _pearson, "fisher", _SPREAD_CLUSTERS
    )


def _std(sums: Float64) -> Float64:
    """ddof=1 as in torch.std, which verl's rollout_probs_diff_std calls."""
    n, first, second = np.moveaxis(sums, -1, 0)
    return np.asarray(np.sqrt(np.maximum(second - first**2 / n, 0.0) / np.where(n > 1, n - 1, np.nan)))


def _pearson(sums: Float64) -> Float64:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = np.maximum(xx - x**2 / n, 0.0) * np.maximum(yy - y**2 / n, 0.0)
    return np.asarray((xy - x * y / n) / np.sqrt(np.where(spread > 0, spread, np.nan)))


def _effective_share(log_weight: Float64) -> float:
    """(sum w)^2 / (n sum w^2), scaled by the largest weight first: it cancels, and exp cannot overflow."""
    weight = np.exp(log_weight - log_weight.max())
    return float(weight.sum() ** 2 / (len(weight) * np.square(weight).sum()))


_METRICS: Final[tuple[tuple[str, str, str, _Measure], ...]] = (
    *((m.name, m.unit, m.direction, _token_mean(m)) for m in TOKEN_MEASURES[:1]),
    *((name, "nat", LOWER, _quantile(q, of)) for name, q, of in QUANTILE_MEASURES),
    ("abs_logp_diff.p999", "nat", LOWER, _quantile(0.999, abs_diff)),
    ("abs_logp_diff.max", "nat", LOWER, _point(lambda x: float(abs_diff(x.tokens).max()), _NO_MAX)),
    *((m.name, m.unit, m.direction, _token_mean(m)) for m in TOKEN_MEASURES[1:2]),
    ("abs_prob_diff.p99", "1", LOWER, _quantile(0.99, prob_diff)),
    ("abs_prob_diff.max", "1", LOWER, _point(lambda x: float(prob_diff(x.tokens).max()), _NO_MAX)),
    ("abs_prob_diff.std", "1", LOWER, lambda x: std_interval(x.tokens)),
    *((m.name, m.unit, m.direction, _token_mean(m)) for m in (*TOKEN_MEASURES[2:], BIT_EXACT)),
    ("pearson_p", "1", ONE, lambda x: pearson_interval(x.tokens)),
    ("ess_token", "1", ONE, _point(lambda x: _effective_share(x.tokens.diff_T), _UNCOVERED)),
    ("ess_sequence", "1", ONE, _point(lambda x: _effective_share(x.diff_S), _UNCOVERED)),
    ("chi2_token", "1", ZERO, _point(lambda x: float(np.expm1(2 * x.tokens.diff_T).mean()), _UNCOVERED)),
    ("chi2_sequence", "1", ZERO, _point(lambda x: float(np.expm1(2 * x.diff_S).mean()), _UNCOVERED)),
    ("ppl_train", "1", LOWER, _sequence_mean("positive", lambda x: np.exp(-x.train_S / x.n_S))),
    ("ppl_infer", "1", LOWER, _sequence_mean("positive", lambda x: np.exp(-x.infer_S / x.n_S))),
    ("log_ppl_gap", "nat", ZERO, _sequence_mean("signed", lambda x: -x.diff_S / x.n_S)),
    ("log_ppl_abs_gap", "nat", LOWER, _sequence_mean("positive", lambda x: np.abs(x.diff_S / x.n_S))),
)
