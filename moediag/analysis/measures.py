"""What is measured on every token: the rows of the metrics that are means over tokens, each with its formula.

Invariants:
    - only tokens scored by both arms enter; every formula is in float64;
    - estimator and direction stand in the name; on text not sampled from infer none of k1, k2, k3 is a KL;
    - k3 uses expm1: at diffs of 1e-6 the plain form is all rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moediag.analysis.metrics import (
    LOWER,
    ONE,
    SYMMETRIC,
    TRAIN_MINUS_INFER,
    VERL_CORRECTION,
    ZERO,
    Alias,
    Definition,
    Metric,
)
from moediag.analysis.tokens import Tokens, TokenSource
from moediag.statistics.intervals import Intervals, Kind, ratio_mean_interval

Float64 = NDArray[np.float64]

EXTREME_TAU: Final = 2.0
"""Headline threshold of the extreme share: max(ratio, 1/ratio) > 2 (R3; AReaL's "abs d > ln 2")."""

ICEPOP_BAND: Final = (0.5, 5.0)
"""Ring-1T's band (arXiv 2510.18855): tokens whose ratio leaves it get no update."""

_LEAST_COMPLEMENT: Final = 2.0**-25
"""1 - p is never taken below half a unit in the last place of float32 at 1: a stored logp of 0 means no more."""


@dataclass(frozen=True)
class TokenMeasure(Metric):
    """A metric that is a mean over tokens: its kind of interval and its formula.

    Args:
        kind: of interval.
        of: value of every token, less ``offset``.
        offset: added to mean and bounds; a mean of 1 + something small is studentised as the small thing.
        tail: the heavy positive part of a signed value. The upper bound is at least as far above the value as
            the upper bound of this part is above its own mean: a signed bootstrap cannot know a tail on one side.
        least: no value is below; an interval cut off there loses no coverage.
    """

    _: KW_ONLY
    kind: Kind
    of: Callable[[Tokens], Float64]
    offset: float = 0.0
    tail: Callable[[Tokens], Float64] | None = None
    least: float = -math.inf

    @property
    def formulas(self) -> tuple[Callable[[Tokens], Float64], ...]:
        """What has to be summed for it."""
        return (self.of,) if self.tail is None else (self.of, self.tail)

    def intervals(self, sums: Mapping[Callable[[Tokens], Float64], Float64], n_CM: Float64) -> Intervals:
        """Mean and interval of every column, from the sums of its formulas, ``n_CM`` tokens behind each."""
        found = ratio_mean_interval(sums[self.of], n_CM, self.kind)
        high_M = found.high_M
        if self.tail is not None:
            tail = ratio_mean_interval(sums[self.tail], n_CM, "positive")
            with np.errstate(invalid="ignore"):
                high_M = np.fmax(high_M, found.value_M + tail.high_M - tail.value_M)
            high_M = np.where(np.isfinite(found.high_M), high_M, found.high_M)
        value_M, low_M, high_M = (array + self.offset for array in (found.value_M, found.low_M, high_M))
        low_M = np.maximum(low_M, self.least)
        return replace(found, value_M=value_M, low_M=low_M, high_M=high_M)


def formulas(measures: Iterable[TokenMeasure]) -> list[Callable[[Tokens], Float64]]:
    """What has to be summed for them, each once."""
    return list(dict.fromkeys(one for measure in measures for one in measure.formulas))


def prompt_sums(x: TokenSource, measures: Iterable[TokenMeasure]) -> dict[Callable[[Tokens], Float64], Float64]:
    """Formula -> (C,) sums by prompt, of all in one pass."""
    of = formulas(measures)
    return dict(zip(of, x.sums(*of), strict=True))


def binary_kl(logp_p: ArrayLike, logp_q: ArrayLike) -> Float64:
    """KL between the coins "this token or any other": p log(p/q) + (1-p) log((1-p)/(1-q)) [nat].

    A lower bound of the KL between the whole distributions, from one token's probabilities alone. 1 - p is taken
    as at least 2^-25: engines round logp to 0 in float32, and infinity would then stand for a rounding.

    Args:
        logp_p: log-probabilities under p [nat], at most 0; logp_q: the same tokens under q.

    Returns:
        Values of at least 0; 0 is best. NaN passes through.

    Source: KPop; DPPO uses D_B(infer, train).

    Example:
        >>> float(binary_kl(np.log(0.5), np.log(0.5)))
        0.0
        >>> bool(np.isfinite(binary_kl(-0.1, 0.0)))
        True
    """
    p, q = (np.minimum(np.asarray(logp, dtype=np.float64), 0.0) for logp in (logp_p, logp_q))
    with np.errstate(under="ignore"):
        not_p, not_q = (np.maximum(-np.expm1(logp), _LEAST_COMPLEMENT) for logp in (p, q))
        likely = np.exp(p)
        gain = np.where(likely > 0, likely * np.where(likely > 0, p - q, 0.0), 0.0)
    # rounding may leave -1e-17 where p and q agree to the last bits
    return np.asarray(np.maximum(gain + not_p * (np.log(not_p) - np.log(not_q)), 0.0), dtype=np.float64)


def abs_diff(x: Tokens) -> Float64:
    """abs(logp_diff) [nat]."""
    return x.abs_diff_T


def prob_diff(x: Tokens) -> Float64:
    """abs(p_train - p_infer) [1]: the binary total variation."""
    return np.asarray(np.abs(np.exp(x.logp_train_T) - np.exp(x.logp_infer_T)))


def k3(x: Tokens) -> Float64:
    """ratio - 1 - logp_diff [nat]."""
    return np.asarray(np.expm1(x.diff_T) - x.diff_T)


def abs_diff_other(x: Tokens) -> Float64:
    """abs(logp_diff) of the other pair, of tokens :func:`~moediag.analysis.tokens.beside` it [nat]."""
    return np.abs(_diff_other(x))


def k3_other(x: Tokens) -> Float64:
    """ratio - 1 - logp_diff of the other pair [nat]."""
    diff_T = _diff_other(x)
    return np.asarray(np.expm1(diff_T) - diff_T)


def _diff_other(x: Tokens) -> Float64:
    train_T, infer_T = (x.column(f"logp_{side}_other").astype(np.float64) for side in ("train", "infer"))
    return np.asarray(train_T - infer_T)


def is_extreme(diff_T: Float64, tau: float = EXTREME_TAU) -> NDArray[np.bool_]:
    """max(ratio, 1 / ratio) > tau."""
    return np.asarray(np.abs(diff_T) > math.log(tau))


ABS_LOGP_DIFF: Final = Definition(
    "abs logp diff",
    "abs(logp_train − logp_infer) of the sampled token",
    "the mean tells the body, p99 and F(2) the tail; reports of collapse point at the tail",
)
_KL: Final = Definition(
    "k1, k2, k3",
    "mean of −logp_diff; of logp_diff² / 2; of ratio − 1 − logp_diff",
    "estimates of KL(infer ‖ train) from tokens sampled by infer: at temperature 1 without top-p, top-k or min-p, k1 "
    "and k3 are unbiased, k2 is biased; on forced or truncated sampling none is a KL",
)

TOKEN_MEASURES: Final = (
    TokenMeasure(
        "abs_logp_diff.mean", "nat", LOWER, "abs logp diff, mean",
        kind="positive", of=abs_diff, section="numbers", is_headline=True, floor="sum", definition=ABS_LOGP_DIFF,
        elsewhere=(
            Alias("slime", "train_rollout_logprob_abs_diff", "mean abs(d)", SYMMETRIC,
                  "slime, metrics of its policy loss; its CI", "0.1 is the limit in its CI"),
            Alias("vime", "mean abs logp diff", "mean abs(d)", SYMMETRIC, "as reported by vime",
                  is_metric_name=False),
            Alias("IcePop", "abs(log p_infer - log p_train)", "abs(d)", SYMMETRIC, "IcePop post, Figure 1",
                  "Figure 1; the post's '0.05' names no metric, most plausibly this mean", is_metric_name=False),
        ),
    ),
    TokenMeasure(
        "abs_prob_diff.mean", "1", LOWER, "abs prob diff, mean",
        kind="positive", of=prob_diff, section="numbers", floor="sum",
        definition=Definition("abs prob diff", "abs(p_train − p_infer)", "blind to unlikely tokens"),
        elsewhere=(
            Alias("verl", "rollout_probs_diff_mean", "mean abs(p_train - p_infer)", SYMMETRIC,
                  "verl, debug metrics of the rollout; its FAQ",
                  "of probabilities, not of log-probabilities; its FAQ takes a mean above 0.01 as an alarm"),
            Alias("TIS", "abs prob diff", "mean abs(p_train - p_infer)", SYMMETRIC, "Yao et al. 2025, TIS",
                  is_metric_name=False),
            Alias("DPPO", "binary TV", "abs(p_train - p_infer) of a token", SYMMETRIC,
                  "DPPO, arXiv 2602.04879; reports/corrections.md",
                  "DPPO thresholds the signed difference of each token; ours is the mean of its absolute value",
                  is_metric_name=False),
        ),
    ),
    TokenMeasure(
        "kl_infer_train_k1", "nat", ZERO, "KL(infer‖train), k1",
        kind="signed", of=lambda x: -x.diff_T, section="numbers", is_scale=False, definition=_KL,
        elsewhere=(
            Alias("verl", "kl", "mean(-d)", "KL(infer || train)", VERL_CORRECTION,
                  "the k1 estimator; abs(kl) > 0.1 is an alarm in use. Elsewhere 'kl' may be k3, or the KL to a "
                  "reference model"),
            Alias("Tinker", "kl_sample_train_v1", "mean(-d)", "KL(infer || train)",
                  "Tinker's documentation, RL hyperparameters",
                  "its documentation calls training stable below 0.01; kl_sample_train_v2 is k2"),
        ),
    ),
    TokenMeasure(
        "kl_infer_train_k2", "nat", LOWER, "KL(infer‖train), k2",
        kind="positive", of=lambda x: np.square(x.diff_T) / 2, section="numbers", floor="larger",
    ),
    TokenMeasure(
        "kl_infer_train_k3", "nat", LOWER, "KL(infer‖train), k3",
        kind="positive", of=k3, section="numbers", is_headline=True, floor="larger",
        elsewhere=(
            Alias("verl", "k3_kl", "mean(ratio - 1 - d)", "KL(infer || train)", VERL_CORRECTION),
            Alias("prime-rl", "mismatch_kl", "mean(ratio - 1 - d)", "KL(infer || train)",
                  "prime-rl, metrics of its trainer", "the k3 estimator: not verl's 'kl', which is k1"),
            Alias("R3", "KL", "mean(ratio - 1 - d)", "KL(infer || train)", "R3, arXiv 2510.11370",
                  "k3: 1.535e-3 on Qwen3-30B-A3B (SGLang against Megatron)", is_metric_name=False),
            Alias("Miles", "KL", "mean(ratio - 1 - d)", "KL(infer || train)", "as reported by Miles",
                  "dense 1e-5 to 1e-3, MoE 1e-3 to 1e-1", is_metric_name=False),
        ),
    ),
    TokenMeasure(
        "mean_ratio", "1", ONE, "mean ratio train / infer",
        # ratio = 1 + diff + k3
        kind="signed", of=lambda x: np.expm1(x.diff_T), offset=1.0, tail=k3, least=0.0,
        section="numbers", best=1.0, is_scale=False,
        definition=Definition(
            "mean ratio", "mean of pi_train / pi_infer",
            "1 in expectation under honest sampling: the cheapest check that both arms mean the same thing",
        ),
    ),
    TokenMeasure(
        "extreme_share_2", "1", LOWER, "F(2): tokens whose ratio or its inverse is above 2",
        kind="rate", of=lambda x: is_extreme(x.diff_T).astype(np.float64),
        section="numbers", is_share=True, is_headline=True, floor="larger",
        definition=Definition(
            "F(tau)", "share of tokens whose ratio or its inverse exceeds tau",
            "F(2) is what R3 plots; a tail, so few tokens carry it",
        ),
        elsewhere=(
            Alias("R3", "F(tau)", "P(max(ratio, 1/ratio) > tau)", SYMMETRIC, "R3, arXiv 2510.11370",
                  "a curve over tau (frame tail_curve); ours stands for tau = 2; F(2) > 0.1 at collapse",
                  is_metric_name=False),
            Alias("AReaL", "abs d > ln 2", "P(abs(d) > ln 2)", SYMMETRIC, "as used by AReaL",
                  "the same number as F(2)", is_metric_name=False),
            Alias("TRL", "share of ratios outside [0.9, 1.1]", "P(ratio < 0.9 or ratio > 1.1)", TRAIN_MINUS_INFER,
                  "TRL, issue 6789",
                  "issue 6789: 8.0 % between two chunkings of one trainer, 7.5 % between vLLM and trainer. No metric "
                  "of ours: read frame tail_curve near 0.1", is_metric_name=False),
        ),
    ),
    TokenMeasure(
        "prob_mult_error", "1", ONE, "prob mult error: mean exp(abs(logp_diff))",
        kind="positive", of=lambda x: np.expm1(np.abs(x.diff_T)), offset=1.0,
        section="further", floor="larger", best=1.0, is_scale=False,
        definition=Definition("prob mult error", "mean of exp(abs(logp_diff))", "NeMo-RL's token_mult_prob_error"),
        elsewhere=(
            Alias("NeMo-RL", "token_mult_prob_error", "mean exp(abs(d))", SYMMETRIC,
                  "NeMo-RL, docs/guides/grpo.md, metrics", "1 is best, not 0; above 1.05 is an alarm in use"),
        ),
    ),
    TokenMeasure(
        "binary_kl_infer_train", "nat", LOWER, "binary KL(infer‖train)",
        kind="positive", of=lambda x: binary_kl(x.logp_infer_T, x.logp_train_T), section="further",
        elsewhere=(
            Alias("KPop", "D_B", "p log(p/q) + (1-p) log((1-p)/(1-q))", "both directions",
                  "KPop post; reports/corrections.md",
                  "KPop thresholds both directions; binary_kl_train_infer is the other one", is_metric_name=False),
        ),
    ),
    TokenMeasure(
        "binary_kl_train_infer", "nat", LOWER, "binary KL(train‖infer)",
        kind="positive", of=lambda x: binary_kl(x.logp_train_T, x.logp_infer_T), section="further",
    ),
)  # fmt: skip
"""Means over tokens, in the order of the tables; every stratum gets the same ones. :mod:`~moediag.analysis.logprobs`
declares them, among the other metrics of log-probabilities."""

BIT_EXACT: Final = TokenMeasure(
    "bit_exact_share", "1", ONE, "tokens with the same log-probability, bit for bit",
    kind="rate", of=lambda x: (x.diff_T == 0).astype(np.float64), section="numbers", is_share=True, best=1.0,
)  # fmt: skip
"""Tokens with the same log-probability, bit for bit: what a floor is made of."""

QUANTILE_MEASURES: Final = tuple(
    (Metric(f"abs_logp_diff.{name}", "nat", LOWER, f"abs logp diff, {name}", section="numbers", floor="larger",
            is_headline=name == "p99"), q, abs_diff)
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
)  # fmt: skip
"""Quantiles over tokens that every stratum gets, too."""
