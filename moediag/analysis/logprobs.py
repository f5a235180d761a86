"""Log-probability mismatch: the metric table and the tail curve.

Invariants:
    - only tokens scored by both arms count, and ``n_tokens`` says how many; a metric over none is NaN;
    - reductions run in float64, and k3 uses expm1: at diffs of 1e-6 the plain form is all rounding error;
    - estimator and direction stand in the name; on text not sampled from infer none of k1, k2, k3 is a KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import LOGP_METRICS, TAIL_CURVE
from moediag.analysis.intervals import Interval, Kind, cluster_sums, mean_interval, quantile_interval
from moediag.analysis.tokens import logp_diff, scored_tokens

Float64 = NDArray[np.float64]

EXTREME_TAU: Final = 2.0
"""Headline threshold of the extreme share: max(ratio, 1/ratio) > 2 (R3; AReaL's "abs d > ln 2")."""
TAIL_THRESHOLDS: Final = np.unique(np.r_[np.logspace(-4, 1, 51), math.log(EXTREME_TAU)])
"""Ten thresholds per decade of abs(logp_diff), 1e-4 to 10 nat, and ln 2 itself."""

_LOWER: Final = "lower is better"
_ZERO: Final = "0 is best"
_ONE: Final = "1 is best"
_NO_MAX: Final = "no honest interval exists for a maximum"
_NOT_A_MEAN: Final = "not a mean: no interval is given"


@dataclass(frozen=True)
class _Scored:
    """Scored tokens as float64 arrays, and the same per sequence."""

    diff_T: Float64
    p_train_T: Float64
    p_infer_T: Float64
    prompt_T: NDArray[Any]
    diff_mean_S: Float64
    diff_sum_S: Float64
    nll_train_S: Float64
    nll_infer_S: Float64
    prompt_S: NDArray[Any]


_Measure = Callable[[_Scored], Interval]


def logp_metrics(tokens: pd.DataFrame) -> pd.DataFrame:
    """Every headline metric of the mismatch, with n and an interval clustered by prompt beside it.

    Args:
        tokens: token frame of a pair.

    Returns:
        Frame ``logp_metrics``; unit and good end stand in each row, ``note`` says why a bound is absent.

    Source: formulas and users of each in the project's DOMAIN page, section 2; IcePop Fig. 1 for
    ``abs_logp_diff``, R3 (arXiv 2510.11370) for ``extreme_share_2``, verl for prob diffs, ppl, ESS, chi2.
    """
    rows = scored_tokens(tokens)
    scored = _arrays(rows)
    with np.errstate(over="ignore"):  # exp of an absurd diff is inf, and inf is what the table shows
        records = [_record(name, unit, direction, measure(scored)) for name, unit, direction, measure in _METRICS]
    frame = pd.DataFrame.from_records(records)
    frame["n_tokens"] = len(rows)
    frame["n_prompts"] = rows["prompt_id"].nunique()
    if not len(rows):
        frame["note"] = "no token was scored by both arms"
    return LOGP_METRICS.validate(frame)


def tail_curve(tokens: pd.DataFrame, thresholds: Float64 = TAIL_THRESHOLDS) -> pd.DataFrame:
    """How many tokens differ by more than a threshold: the tail separates runs where the mean does not.

    Args:
        tokens: token frame of a pair.
        thresholds: abs(logp_diff) thresholds [nat].

    Returns:
        Frame ``tail_curve``: exact counts strictly above; lower is better; NaN shares when nothing is scored.

    Source: R3 (arXiv 2510.11370), F(tau) with tau = exp(threshold).
    """
    sorted_T = np.sort(np.abs(logp_diff(scored_tokens(tokens))))
    n_above = len(sorted_T) - np.searchsorted(sorted_T, thresholds, side="right")
    frame = pd.DataFrame({"threshold": thresholds, "n_above": n_above})
    frame["share_above"] = n_above / len(sorted_T) if len(sorted_T) else np.nan
    frame["n_tokens"] = len(sorted_T)
    return TAIL_CURVE.validate(frame)


def _arrays(rows: pd.DataFrame) -> _Scored:
    diff_T = logp_diff(rows)
    train_T = rows["logp_train"].to_numpy().astype(np.float64)
    infer_T = rows["logp_infer"].to_numpy().astype(np.float64)
    seq_T, prompt_T = rows["seq_id"].to_numpy(), rows["prompt_id"].to_numpy()
    sums = cluster_sums(np.stack([np.ones_like(diff_T), diff_T, train_T, infer_T], axis=1), seq_T)
    first_S = np.unique(seq_T, return_index=True)[1]
    means = sums / sums[:, :1]
    return _Scored(
        diff_T=diff_T,
        p_train_T=np.exp(train_T),
        p_infer_T=np.exp(infer_T),
        prompt_T=prompt_T,
        diff_mean_S=means[:, 1],
        diff_sum_S=sums[:, 1],
        nll_train_S=-means[:, 2],
        nll_infer_S=-means[:, 3],
        prompt_S=prompt_T[first_S],
    )


def _record(name: str, unit: str, direction: str, interval: Interval) -> dict[str, Any]:
    return {
        "metric": name,
        "value": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "unit": unit,
        "direction": direction,
        "note": interval.note,
    }


def _mean(kind: Kind, of: Callable[[_Scored], Float64]) -> _Measure:
    return lambda x: mean_interval(of(x), x.prompt_T, kind)


def _sequence_mean(kind: Kind, of: Callable[[_Scored], Float64]) -> _Measure:
    return lambda x: mean_interval(of(x), x.prompt_S, kind)


def _quantile(q: float, of: Callable[[_Scored], Float64]) -> _Measure:
    return lambda x: quantile_interval(of(x), x.prompt_T, q)


def _point(of: Callable[[_Scored], float], note: str) -> _Measure:
    def measure(x: _Scored) -> Interval:
        value = of(x) if len(x.diff_T) else np.nan
        return Interval(float(value), np.nan, np.nan, len(np.unique(x.prompt_T)), note)

    return measure


def _abs_diff(x: _Scored) -> Float64:
    return np.abs(x.diff_T)


def _prob_diff(x: _Scored) -> Float64:
    return np.abs(x.p_train_T - x.p_infer_T)


def _prob_diff_std(x: _Scored) -> float:
    # ddof=1 as in torch.std, which verl's rollout_probs_diff_std calls
    return float(_prob_diff(x).std(ddof=1)) if len(x.diff_T) > 1 else float("nan")


def _is_extreme(x: _Scored) -> Float64:
    return (_abs_diff(x) > math.log(EXTREME_TAU)).astype(np.float64)


def _k3(x: _Scored) -> Float64:
    return np.asarray(np.expm1(x.diff_T) - x.diff_T)


def _effective_share(log_weight: Float64) -> float:
    """(sum w)^2 / (n sum w^2), scaled by the largest weight first: it cancels, and exp cannot overflow."""
    weight = np.exp(log_weight - log_weight.max())
    return float(weight.sum() ** 2 / (len(weight) * np.square(weight).sum()))


def _pearson(x: _Scored) -> float:
    train_T, infer_T = x.p_train_T - x.p_train_T.mean(), x.p_infer_T - x.p_infer_T.mean()
    scale = math.sqrt(float(np.square(train_T).sum() * np.square(infer_T).sum()))
    return float(train_T @ infer_T) / scale if scale > 0 else float("nan")


_METRICS: Final[tuple[tuple[str, str, str, _Measure], ...]] = (
    ("abs_logp_diff.mean", "nat", _LOWER, _mean("positive", _abs_diff)),
    ("abs_logp_diff.p50", "nat", _LOWER, _quantile(0.5, _abs_diff)),
    ("abs_logp_diff.p90", "nat", _LOWER, _quantile(0.9, _abs_diff)),
    ("abs_logp_diff.p99", "nat", _LOWER, _quantile(0.99, _abs_diff)),
    ("abs_logp_diff.p999", "nat", _LOWER, _quantile(0.999, _abs_diff)),
    ("abs_logp_diff.max", "nat", _LOWER, _point(lambda x: float(_abs_diff(x).max()), _NO_MAX)),
    ("abs_prob_diff.mean", "1", _LOWER, _mean("positive", _prob_diff)),
    ("abs_prob_diff.p99", "1", _LOWER, _quantile(0.99, _prob_diff)),
    ("abs_prob_diff.max", "1", _LOWER, _point(lambda x: float(_prob_diff(x).max()), _NO_MAX)),
    ("abs_prob_diff.std", "1", _LOWER, _point(_prob_diff_std, _NOT_A_MEAN)),
    ("kl_infer_train_k1", "nat", _ZERO, _mean("signed", lambda x: -x.diff_T)),
    ("kl_infer_train_k2", "nat", _LOWER, _mean("positive", lambda x: np.square(x.diff_T) / 2)),
    ("kl_infer_train_k3", "nat", _LOWER, _mean("positive", _k3)),
    ("mean_ratio", "1", _ONE, _mean("signed", lambda x: np.exp(x.diff_T))),
    ("extreme_share_2", "1", _LOWER, _mean("rate", _is_extreme)),
    ("prob_mult_error", "1", _ONE, _mean("positive", lambda x: np.exp(_abs_diff(x)))),
    ("pearson_p", "1", _ONE, _point(_pearson, _NOT_A_MEAN)),
    ("ess_token", "1", _ONE, _point(lambda x: _effective_share(x.diff_T), _NOT_A_MEAN)),
    ("ess_sequence", "1", _ONE, _point(lambda x: _effective_share(x.diff_sum_S), _NOT_A_MEAN)),
    ("chi2_token", "1", _ZERO, _mean("signed", lambda x: np.expm1(2 * x.diff_T))),
    ("chi2_sequence", "1", _ZERO, _sequence_mean("signed", lambda x: np.expm1(2 * x.diff_sum_S))),
    ("ppl_train", "1", _LOWER, _sequence_mean("positive", lambda x: np.exp(x.nll_train_S))),
    ("ppl_infer", "1", _LOWER, _sequence_mean("positive", lambda x: np.exp(x.nll_infer_S))),
    ("log_ppl_gap", "nat", _ZERO, _sequence_mean("signed", lambda x: -x.diff_mean_S)),
    ("log_ppl_abs_gap", "nat", _LOWER, _sequence_mean("positive", lambda x: np.abs(x.diff_mean_S))),
)
