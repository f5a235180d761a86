"""Log-probability mismatch over all tokens: the metric table, the tail curve, the spread of ratios, and
the entropy of tokens inside and outside a band of ratios.

Invariants:
    - only tokens scored by both arms count, and ``n_tokens`` says how many; a metric over none is NaN;
    - reductions run in float64 over the prompts' own sums, and tokens may be read part by part;
    - a statistic whose interval was measured not to cover gets none, and ``note`` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import ENTROPY_QUANTILES, LOGP_METRICS, RATIO_QUANTILES, TAIL_CURVE
from moediag.analysis.measures import (
    BIT_EXACT,
    EXTREME_TAU,
    ICEPOP_BAND,
    QUANTILE_MEASURES,
    TOKEN_MEASURES,
    TokenMeasure,
    abs_diff,
    prob_diff,
    prompt_sums,
)
from moediag.analysis.metrics import (
    LOWER,
    ONE,
    SYMMETRIC,
    TRAIN_MINUS_INFER,
    VERL_CORRECTION,
    VERL_DEBUG,
    ZERO,
    Alias,
    Definition,
    Metric,
    declare_metrics,
)
from moediag.analysis.strata import grid_sums
from moediag.analysis.tokens import Source, Tokens, TokenSource, source_of
from moediag.statistics.intervals import Interval, Kind, jackknife_interval, mean_interval, ratio_mean_interval
from moediag.statistics.quantiles import Values, quantile_intervals, quantiles_of_groups

Float64 = NDArray[np.float64]

TAIL_THRESHOLDS: Final = np.unique(np.r_[np.logspace(-4, 1, 51), math.log(EXTREME_TAU)])
"""Ten thresholds per decade of abs(logp_diff), 1e-4 to 10 nat, and ln 2 itself."""
RATIO_PROBABILITIES: Final = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)

_NO_MAX: Final = "no honest interval exists for a maximum"
_SPREAD_CLUSTERS: Final = 256
"""Prompts from which on the interval of a standard deviation or a correlation covers: both hang on single tokens."""
_UNCOVERED: Final = "no interval: none that was tried covers for this statistic"
_QUANTILES: Final = (*((of, q) for _, q, of in QUANTILE_MEASURES), (abs_diff, 0.999), (prob_diff, 0.99))
"""What quantiles are of, and which."""


class _Shared:
    """Tokens with what the metrics share, each read once: sums by prompt and quantiles."""

    def __init__(self, x: TokenSource) -> None:
        self.x = x

    @cached_property
    def sums(self) -> dict[Callable[[Tokens], Float64], Float64]:
        return prompt_sums(self.x, (*TOKEN_MEASURES, BIT_EXACT))

    @cached_property
    def quantiles(self) -> dict[tuple[Callable[[Tokens], Float64], float], Interval]:
        found: dict[tuple[Callable[[Tokens], Float64], float], Interval] = {}
        for of in dict.fromkeys(of for of, _ in _QUANTILES):
            probabilities = [q for other, q in _QUANTILES if other is of]
            intervals = quantile_intervals(self.x.values(of), 1, probabilities)
            found |= {(of, q): one for q, (one,) in zip(probabilities, intervals, strict=True)}
        return found


_Measure = Callable[[_Shared], Interval]


def logp_metrics(tokens: Source) -> pd.DataFrame:
    """Every headline metric of the mismatch, with n and an interval clustered by prompt beside it.

    Args:
        tokens: token frame of a pair.

    Returns:
        Frame ``logp_metrics``; unit and good end stand in each row, ``note`` says why a bound is absent.

    Source: IcePop Fig. 1 for ``abs_logp_diff``, R3 (arXiv 2510.11370) for ``extreme_share_2``, verl for prob diffs,
    ppl, ESS, chi2; who uses which under what name stands in :attr:`~moediag.analysis.metrics.Metric.elsewhere`.
    """
    x = source_of(tokens)
    shared = _Shared(x)
    with np.errstate(over="ignore", invalid="ignore"):  # exp of an absurd diff is inf, and inf is what the table shows
        records = [_record(metric, measure(shared)) for metric, measure in _METRICS]
    frame = pd.DataFrame.from_records(records)
    frame["n_tokens"] = len(x)
    frame["n_prompts"] = x.n_prompts
    if not len(x):
        frame["note"] = "no token was scored by both arms"
    return LOGP_METRICS.validate(frame)


def tail_curve(tokens: Source, thresholds: Float64 = TAIL_THRESHOLDS) -> pd.DataFrame:
    """How many tokens differ by more than a threshold: the tail separates runs where the mean does not.

    Args:
        tokens: token frame of a pair.
        thresholds: abs(logp_diff) thresholds [nat]; rows are in ascending order.

    Returns:
        Frame ``tail_curve``: exact counts strictly above, with intervals of the shares; lower is better; NaN shares
        when nothing is x.

    Source: R3 (arXiv 2510.11370), F(tau) with tau = exp(threshold).
    """
    x = source_of(tokens)
    thresholds = np.sort(thresholds)
    size = len(thresholds) + 1

    def above(part: Tokens) -> NDArray[Any]:
        # a token lies above the first `rank` thresholds: counting ranks by prompt gives every threshold at once
        rank_T = np.searchsorted(thresholds, part.abs_diff_T, side="left")
        count = np.bincount(part.prompt_row_T * size + rank_T, minlength=part.n_prompts * size)
        return count.reshape(part.n_prompts, size)[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]

    above_CM = x.collect(above)
    interval = ratio_mean_interval(above_CM, x.n_by_prompt[:, None], "rate")
    frame = pd.DataFrame({"threshold": thresholds, "n_above": above_CM.sum(axis=0)})
    frame["share_above"] = frame["n_above"] / len(x) if len(x) else np.nan
    frame["share_above_ci_low"], frame["share_above_ci_high"] = interval.low_M, interval.high_M
    frame["n_tokens"] = len(x)
    return TAIL_CURVE.validate(frame)


def ratio_quantiles(tokens: Source) -> pd.DataFrame:
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
    x = source_of(tokens)
    with np.errstate(invalid="ignore"):
        of_sequences = {"sequence_product": x.diff_S, "sequence_geometric": x.diff_S / x.n_S}
    one_S, n = np.zeros(x.n_sequences, np.intp), x.n_prompts
    records = []
    for level in ("token", *of_sequences):
        found: dict[float, tuple[float, Interval]] = {}
        for sign in (-1.0, 1.0):  # the lower tail is the upper tail of the negative: one rule for both

            def parts(level: str = level, sign: float = sign) -> Iterator[Values]:
                if level == "token":
                    return x.values(lambda part: sign * part.diff_T)()
                return iter([Values(sign * of_sequences[level], one_S, x.prompt_row_S, n)])

            some = [q for q in RATIO_PROBABILITIES if (q < 0.5) == (sign < 0)]
            intervals = quantile_intervals(parts, 1, [max(q, 1 - q) for q in some])
            found |= {q: (sign, interval) for q, (interval,) in zip(some, intervals, strict=True)}
        for q in RATIO_PROBABILITIES:
            sign, interval = found[q]
            bounds = sorted((sign * interval.low, sign * interval.high))
            records.append((level, q, sign * interval.value, *bounds, len(x) if level == "token" else x.n_sequences))
    names = [column.name for column in RATIO_QUANTILES.columns]
    return RATIO_QUANTILES.validate(pd.DataFrame.from_records(records, columns=names))


def _record(metric: Metric, interval: Interval) -> dict[str, Any]:
    return {
        "metric": metric.name,
        "value": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "largest_prompt_share": interval.largest_share,
        "unit": metric.unit,
        "direction": metric.direction,
        "note": interval.note,
    }


def entropy_quantiles(tokens: Source, alpha: float = ICEPOP_BAND[0], beta: float = ICEPOP_BAND[1]) -> pd.DataFrame:
    """Next-token entropy of masked and of kept tokens, on each side.

    Masked tokens with high entropy are noise at forks of the text; with low entropy they are places where the two
    engines disagree about something one of them is sure of.

    Args:
        tokens: token frame of a pair.
        alpha: lower end of the band of ratio that is kept.
        beta: upper end.

    Returns:
        Frame ``entropy_quantiles`` [nat]: groups all, kept and masked, for train and infer.

    Source: IcePop Fig. 11; the default band is Ring-1T's (arXiv 2510.18855).
    """
    x = source_of(tokens)
    low, high = np.log(alpha), np.log(beta)
    records = []
    for side in ("train", "infer"):

        def entropy(part: Tokens, side: str = side) -> Float64:
            return part.column(f"entropy_{side}").astype(np.float64)

        def group(part: Tokens, of: Callable[[Tokens], Float64] = entropy) -> NDArray[Any]:
            is_masked_T = ~((part.diff_T >= low) & (part.diff_T <= high))
            return np.where(np.isfinite(of(part)), is_masked_T.astype(np.intp), -1)

        def sums(part: Tokens, of: Callable[[Tokens], Float64] = entropy) -> Float64:
            group_T = group(part, of)
            grids = [grid_sums(part, group_T, 2, values) for values in (None, of(part))]
            return np.stack(grids, axis=1)

        n_CG, sum_CG = np.moveaxis(x.collect(sums), 1, 0)
        n_G, q_Q = n_CG.sum(axis=0).astype(np.int64), np.c_[[0.1, 0.5, 0.9]]
        of_all = quantiles_of_groups(
            x.values(entropy, lambda part: np.minimum(group(part), 0)), n_G.sum(keepdims=True), q_Q
        )
        of_each = quantiles_of_groups(x.values(entropy, group), n_G, np.repeat(q_Q, 2, axis=1))
        for name, n_C, sum_C, points in (
            ("all", n_CG.sum(axis=1), sum_CG.sum(axis=1), of_all[:, 0]),
            ("kept", n_CG[:, 0], sum_CG[:, 0], of_each[:, 0]),
            ("masked", n_CG[:, 1], sum_CG[:, 1], of_each[:, 1]),
        ):
            mean = ratio_mean_interval(sum_C, n_C, "positive").one()
            records.append((side, name, alpha, beta, int(n_C.sum()), mean.value, mean.low, mean.high, *points))
    names = [column.name for column in ENTROPY_QUANTILES.columns]
    return ENTROPY_QUANTILES.validate(pd.DataFrame.from_records(records, columns=names))


def _token_mean(measure: TokenMeasure) -> _Measure:
    return lambda shared: measure.intervals(shared.sums, shared.x.n_by_prompt).one()


def _sequence_mean(kind: Kind, of: Callable[[Tokens], Float64]) -> _Measure:
    return lambda shared: mean_interval(shared.x.collect(of), shared.x.prompt_row_S, kind)


def _quantile(q: float, of: Callable[[Tokens], Float64]) -> _Measure:
    return lambda shared: shared.quantiles[of, q]


def _point(of: Callable[[TokenSource], float], note: str) -> _Measure:
    def measure(shared: _Shared) -> Interval:
        value = of(shared.x) if len(shared.x) else np.nan
        return Interval(float(value), np.nan, np.nan, shared.x.n_prompts, note)

    return measure


def _largest(x: TokenSource, of: Callable[[Tokens], Float64]) -> float:
    return float(x.collect(lambda part: of(part).max(initial=-np.inf, keepdims=True)).max())


def std_interval(x: TokenSource) -> Interval:
    """Standard deviation of abs(p_train - p_infer), ddof = 1 as in verl, with its interval."""
    sums = x.sums(prob_diff, lambda part: np.square(prob_diff(part)))
    return jackknife_interval(np.stack([x.n_by_prompt, *sums], axis=1), _std, "log", _SPREAD_CLUSTERS)


def pearson_interval(x: TokenSource) -> Interval:
    """Correlation of p_train and p_infer with its interval; 1 is best."""

    def sums(part: Tokens) -> Float64:
        # centred at 1/2: products then keep their digits
        train_T, infer_T = np.exp(part.logp_train_T) - 0.5, np.exp(part.logp_infer_T) - 0.5
        columns = (np.ones(len(part)), train_T, infer_T, np.square(train_T), np.square(infer_T), train_T * infer_T)
        return np.stack([part.by_prompt(column) for column in columns], axis=1)

    return jackknife_interval(x.collect(sums), _pearson, "fisher", _SPREAD_CLUSTERS)


def _std(sums: Float64) -> Float64:
    """ddof=1 as in torch.std, which verl's rollout_probs_diff_std calls."""
    n, first, second = np.moveaxis(sums, -1, 0)
    return np.asarray(np.sqrt(np.maximum(second - first**2 / n, 0.0) / np.where(n > 1, n - 1, np.nan)))


def _pearson(sums: Float64) -> Float64:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = np.maximum(xx - x**2 / n, 0.0) * np.maximum(yy - y**2 / n, 0.0)
    return np.asarray((xy - x * y / n) / np.sqrt(np.where(spread > 0, spread, np.nan)))


def _effective_share(x: TokenSource, log_weight: Callable[[Tokens], Float64]) -> float:
    """(sum w)^2 / (n sum w^2), scaled by the largest weight first: it cancels, and exp cannot overflow."""
    largest = _largest(x, log_weight)

    def sums(part: Tokens) -> Float64:
        weight = np.exp(log_weight(part) - largest)
        return np.array([len(weight), weight.sum(), np.square(weight).sum()])

    n, first, second = x.total(sums)
    return float(first**2 / (n * second))


def _chi2(x: TokenSource, log_ratio: Callable[[Tokens], Float64]) -> float:
    """mean of ratio^2 - 1."""

    def sums(part: Tokens) -> Float64:
        values = log_ratio(part)
        return np.array([len(values), np.expm1(2 * values).sum()])

    n, total = x.total(sums)
    return float(total / n)


def _of_tokens(x: Tokens) -> Float64:
    return x.diff_T


def _of_sequences(x: Tokens) -> Float64:
    return x.diff_S


_ESS: Final = Definition(
    "effective sample size", "(sum w)² / (n sum w²), w = ratio", "what importance weights leave of the sample"
)
_CHI2: Final = Definition("chi2", "mean of ratio² − 1", "dominated by the largest ratios")
_GAP: Final = Definition("log perplexity gap", "log ppl_train − log ppl_infer of a response", "as verl prints it")


def _tokens(*measures: TokenMeasure) -> list[tuple[Metric, _Measure]]:
    return [(measure, _token_mean(measure)) for measure in measures]


def _further(name: str, unit: str, direction: str, label: str, **rest: Any) -> Metric:
    """A number that other frameworks print: shown on request, not first."""
    return Metric(name, unit, direction, label, section="further", **rest)


_METRICS: Final[tuple[tuple[Metric, _Measure], ...]] = (
    *_tokens(*TOKEN_MEASURES[:1]),
    *((metric, _quantile(q, of)) for metric, q, of in QUANTILE_MEASURES),
    (Metric("abs_logp_diff.p999", "nat", LOWER, "abs logp diff, p99.9", section="numbers"), _quantile(0.999, abs_diff)),
    (
        Metric("abs_logp_diff.max", "nat", LOWER, "abs logp diff, max", section="numbers", floor="larger",
               on_terminal=True, note=_NO_MAX),
        _point(lambda x: _largest(x, abs_diff), _NO_MAX),
    ),
    *_tokens(*TOKEN_MEASURES[1:2]),
    (Metric("abs_prob_diff.p99", "1", LOWER), _quantile(0.99, prob_diff)),
    (
        Metric("abs_prob_diff.max", "1", LOWER, "abs prob diff, max", section="numbers", note=_NO_MAX,
               elsewhere=(
                   Alias("verl", "rollout_probs_diff_max", "max abs(p_train - p_infer)", SYMMETRIC, VERL_DEBUG,
                         "a maximum grows with the number of tokens"),
               )),
        _point(lambda x: _largest(x, prob_diff), _NO_MAX),
    ),
    (
        Metric("abs_prob_diff.std", "1", LOWER,
               elsewhere=(
                   Alias("verl", "rollout_probs_diff_std", "std of abs(p_train - p_infer)", SYMMETRIC, VERL_DEBUG),
               )),
        lambda shared: std_interval(shared.x),
    ),
    *_tokens(*TOKEN_MEASURES[2:], BIT_EXACT),
    (
        _further("pearson_p", "1", ONE, "Pearson r of the two probabilities",
                 elsewhere=(
                     Alias("verl", "rollout_actor_probs_pearson_corr", "corr(p_train, p_infer)", SYMMETRIC,
                           VERL_DEBUG, "of probabilities, not of log-probabilities"),
                 )),
        lambda shared: pearson_interval(shared.x),
    ),
    (
        _further("ess_token", "1", ONE, "effective sample size, token weights", is_share=True, note=_UNCOVERED,
                 definition=_ESS,
                 elsewhere=(
                     Alias("verl", "effective sample size", "(sum w)^2 / (n sum w^2)", TRAIN_MINUS_INFER,
                           VERL_CORRECTION,
                           "below 0.3 is an alarm in use; of token weights here, ess_sequence is of sequence weights",
                           is_metric_name=False),
                 )),
        _point(lambda x: _effective_share(x, _of_tokens), _UNCOVERED),
    ),
    (
        _further("ess_sequence", "1", ONE, "effective sample size, sequence weights", is_share=True, note=_UNCOVERED,
                 counts="sequence"),
        _point(lambda x: _effective_share(x, _of_sequences), _UNCOVERED),
    ),
    (
        _further("chi2_token", "1", ZERO, "chi2, token ratios", note=_UNCOVERED, definition=_CHI2,
                 elsewhere=(
                     Alias("verl", "chi2 token", "mean(ratio^2) - 1", TRAIN_MINUS_INFER, VERL_CORRECTION,
                           is_metric_name=False),
                 )),
        _point(lambda x: _chi2(x, _of_tokens), _UNCOVERED),
    ),
    (
        _further("chi2_sequence", "1", ZERO, "chi2, sequence ratios", note=_UNCOVERED, counts="sequence",
                 elsewhere=(
                     Alias("verl", "chi2 sequence", "mean(exp(sum d)^2) - 1 over sequences", TRAIN_MINUS_INFER,
                           VERL_CORRECTION, "another number than chi2 token: the product over the response, squared",
                           is_metric_name=False),
                 )),
        _point(lambda x: _chi2(x, _of_sequences), _UNCOVERED),
    ),
    (
        _further("ppl_train", "1", LOWER, "perplexity under train", counts="sequence"),
        _sequence_mean("positive", lambda x: np.exp(-x.by_sequence(x.logp_train_T) / x.n_S)),
    ),
    (
        _further("ppl_infer", "1", LOWER, "perplexity under infer", counts="sequence"),
        _sequence_mean("positive", lambda x: np.exp(-x.by_sequence(x.logp_infer_T) / x.n_S)),
    ),
    (
        _further("log_ppl_gap", "nat", ZERO, "log perplexity gap per sequence, mean", counts="sequence",
                 definition=_GAP,
                 elsewhere=(
                     Alias("verl", "ppl, log ppl gap", "mean over sequences of -mean(d)", "train minus infer",
                           VERL_CORRECTION,
                           "per sequence first, then the mean; log_ppl_abs_gap takes the absolute gap of each "
                           "sequence", is_metric_name=False),
                 )),
        _sequence_mean("signed", lambda x: -x.diff_S / x.n_S),
    ),
    (
        _further("log_ppl_abs_gap", "nat", LOWER, "log perplexity gap per sequence, mean size", counts="sequence"),
        _sequence_mean("positive", lambda x: np.abs(x.diff_S / x.n_S)),
    ),
)  # fmt: skip
declare_metrics(*(metric for metric, _ in _METRICS))
