"""What is measured on every token, declared once: names, formulas, units, directions and the kind of interval.

Invariants:
    - only tokens scored by both arms enter; every formula is in float64;
    - estimator and direction stand in the name; on text not sampled from infer none of k1, k2, k3 is a KL;
    - k3 uses expm1: at diffs of 1e-6 the plain form is all rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moediag.analysis.tokens import scored_tokens
from moediag.statistics.intervals import Intervals, Kind, ratio_mean_interval

Float64 = NDArray[np.float64]

EXTREME_TAU: Final = 2.0
"""Headline threshold of the extreme share: max(ratio, 1/ratio) > 2 (R3; AReaL's "abs d > ln 2")."""

LOWER: Final = "lower is better"
ZERO: Final = "0 is best"
ONE: Final = "1 is best"

_LEAST_COMPLEMENT: Final = 2.0**-25
"""1 - p is never taken below half a unit in the last place of float32 at 1: a stored logp of 0 means no more."""


@dataclass(frozen=True)
class Scored:
    """Scored tokens as float64 arrays; made once, shared by every measure.

    Args:
        logp_train_T, logp_infer_T: [nat].
        prompt_row_T: 0 .. C-1, the prompt of every token among ``n_prompts``, ascending by prompt id.
    """

    logp_train_T: Float64
    logp_infer_T: Float64
    prompt_row_T: NDArray[np.intp]
    n_prompts: int

    def __len__(self) -> int:
        return len(self.logp_train_T)

    @cached_property
    def diff_T(self) -> Float64:  # noqa: N802 - the legend suffix
        """logp_train - logp_infer [nat]."""
        return self.logp_train_T - self.logp_infer_T

    def by_prompt(self, values_T: ArrayLike) -> Float64:
        """(C,) sums over the tokens of each prompt."""
        sums_C = np.bincount(self.prompt_row_T, weights=np.asarray(values_T, np.float64), minlength=self.n_prompts)
        return np.asarray(sums_C, dtype=np.float64)

    @cached_property
    def n_by_prompt(self) -> Float64:
        """(C,) tokens of each prompt."""
        return np.bincount(self.prompt_row_T, minlength=self.n_prompts).astype(np.float64)


@dataclass(frozen=True)
class TokenMeasure:
    """A mean over tokens: its name in frames and summary, unit, good end, kind of interval and formula.

    Args:
        of: value of every token, less ``offset``.
        offset: added to mean and bounds; a mean of 1 + something small is studentised as the small thing.
        tail: the heavy positive part of a signed value. The upper bound is at least as far above the value as
            the upper bound of this part is above its own mean: a signed bootstrap cannot know a tail on one side.
        least: no value is below; an interval cut off there loses no coverage.
    """

    name: str
    unit: str
    direction: str
    kind: Kind
    of: Callable[[Scored], Float64]
    offset: float = 0.0
    tail: Callable[[Scored], Float64] | None = None
    least: float = -math.inf

    def intervals(self, x: Scored, sums: Callable[[Float64], Float64], n_CM: Float64) -> Intervals:
        """Mean and interval of every column that ``sums`` makes of token values, ``n_CM`` tokens behind each."""
        found = ratio_mean_interval(sums(self.of(x)), n_CM, self.kind)
        high_M = found.high_M
        if self.tail is not None:
            tail = ratio_mean_interval(sums(self.tail(x)), n_CM, "positive")
            with np.errstate(invalid="ignore"):
                high_M = np.fmax(high_M, found.value_M + tail.high_M - tail.value_M)
            high_M = np.where(np.isfinite(found.high_M), high_M, found.high_M)
        value_M, low_M, high_M = (array + self.offset for array in (found.value_M, found.low_M, high_M))
        low_M = np.maximum(low_M, self.least)
        return replace(found, value_M=value_M, low_M=low_M, high_M=high_M)


def scored_arrays(tokens: pd.DataFrame) -> Scored:
    """The tokens of a token frame that both arms scored, as arrays."""
    rows = scored_tokens(tokens)
    prompts, row_T = np.unique(rows["prompt_id"].to_numpy(), return_inverse=True)
    train_T, infer_T = (rows[f"logp_{side}"].to_numpy().astype(np.float64) for side in ("train", "infer"))
    return Scored(train_T, infer_T, row_T, len(prompts))


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


def abs_diff(x: Scored) -> Float64:
    """abs(logp_diff) [nat]."""
    return np.asarray(np.abs(x.diff_T))


def prob_diff(x: Scored) -> Float64:
    """abs(p_train - p_infer) [1]: the binary total variation."""
    return np.asarray(np.abs(np.exp(x.logp_train_T) - np.exp(x.logp_infer_T)))


def k3(x: Scored) -> Float64:
    """ratio - 1 - logp_diff [nat]."""
    return np.asarray(np.expm1(x.diff_T) - x.diff_T)


def is_extreme(diff_T: Float64, tau: float = EXTREME_TAU) -> NDArray[np.bool_]:
    """max(ratio, 1 / ratio) > tau."""
    return np.asarray(np.abs(diff_T) > math.log(tau))


TOKEN_MEASURES: Final = (
    TokenMeasure("abs_logp_diff.mean", "nat", LOWER, "positive", abs_diff),
    TokenMeasure("abs_prob_diff.mean", "1", LOWER, "positive", prob_diff),
    TokenMeasure("kl_infer_train_k1", "nat", ZERO, "signed", lambda x: -x.diff_T),
    TokenMeasure("kl_infer_train_k2", "nat", LOWER, "positive", lambda x: np.square(x.diff_T) / 2),
    TokenMeasure("kl_infer_train_k3", "nat", LOWER, "positive", k3),
    # ratio = 1 + diff + k3
    TokenMeasure("mean_ratio", "1", ONE, "signed", lambda x: np.expm1(x.diff_T), offset=1.0, tail=k3, least=0.0),
    TokenMeasure("extreme_share_2", "1", LOWER, "rate", lambda x: is_extreme(x.diff_T).astype(np.float64)),
    TokenMeasure("prob_mult_error", "1", ONE, "positive", lambda x: np.expm1(np.abs(x.diff_T)), offset=1.0),
    TokenMeasure(
        "binary_kl_infer_train", "nat", LOWER, "positive", lambda x: binary_kl(x.logp_infer_T, x.logp_train_T)
    ),
    TokenMeasure(
        "binary_kl_train_infer", "nat", LOWER, "positive", lambda x: binary_kl(x.logp_train_T, x.logp_infer_T)
    ),
)
"""Means over tokens, in the order of the tables; every stratum gets the same ones."""

BIT_EXACT: Final = TokenMeasure("bit_exact_share", "1", ONE, "rate", lambda x: (x.diff_T == 0).astype(np.float64))
"""Tokens with the same log-probability, bit for bit: what a floor is made of."""

QUANTILE_MEASURES: Final[tuple[tuple[str, float, Callable[[Scored], Float64]], ...]] = (
    ("abs_logp_diff.p50", 0.5, abs_diff),
    ("abs_logp_diff.p90", 0.9, abs_diff),
    ("abs_logp_diff.p99", 0.99, abs_diff),
)
"""Quantiles over tokens that every stratum gets, too."""


def subset(x: Scored, keep_T: NDArray[Any]) -> Scored:
    """Some of the scored tokens; prompts without one stay, with no tokens."""
    return Scored(x.logp_train_T[keep_T], x.logp_infer_T[keep_T], x.prompt_row_T[keep_T], x.n_prompts)
