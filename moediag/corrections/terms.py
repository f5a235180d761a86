"""The token view as corrections look at it: what several of them need computed once, and held against bounds.

Invariants:
    - comparisons are made between log-ratios, never between their exponentials; log-ratios are clamped to +-20
      before ``exp``, so nothing overflows, and a kept ratio is never smaller than exp(-20): 0 always means no update;
    - what float32 log-probabilities give is held against a bound in float32 (:func:`on_bounds`): the float32 nearest to
      log 0.5 lies 1e-9 below it, and stands *on* the bound for everyone who computes in float32;
    - nothing depends on the order of the rows: sums by which sequences are kept are rounded once
      (:meth:`Terms.exact_sums`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moediag.analysis.measures import binary_kl
from moediag.analysis.tokens import Tokens
from moediag.errors import MoediagError

Float64 = NDArray[np.float64]

LOG_RATIO_CLAMP: Final = 20.0
"""Log-ratios are clamped to +-20 before exp (verl, TRL, OpenRLHF do so): exp(20) is 5e8."""


def clamped_exp(log_ratio: Float64) -> Float64:
    """exp of the log-ratio clamped to +-20."""
    return np.asarray(np.exp(np.clip(log_ratio, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)))


def are_float32(*values: Float64) -> NDArray[np.bool_]:
    """Where all of some values are float32 numbers: engines' own, whatever kind of file they came through.

    A log-probability that was computed in float64 is one by chance once in 2^29.
    """
    with np.errstate(over="ignore"):
        return np.asarray(np.logical_and.reduce([array == array.astype(np.float32) for array in values]))


def on_bounds(values: Float64, bounds: Sequence[float] | Float64, is_float32: NDArray[np.bool_]) -> Float64:
    """Values to hold against bounds: those from float32 that round to the same float32 as a bound are that bound.

    Args:
        values: of tokens or sequences.
        bounds: ascending.
        is_float32: which values were computed from float32 log-probabilities.

    Source: AReaL, OpenRLHF, prime-rl, slime, TRL and verl compare in float32.

    Example:
        >>> on_bounds(np.float64([np.float32(np.log(0.5))]), [np.log(0.5)], np.array([True])) == np.log(0.5)
        array([ True])
    """
    with np.errstate(over="ignore"):
        rounded, rounded_bounds = values.astype(np.float32), np.asarray(bounds).astype(np.float32)
    nth = np.minimum(np.searchsorted(rounded_bounds, rounded), len(rounded_bounds) - 1)
    is_on = is_float32 & (rounded_bounds[nth] == rounded)
    return np.where(is_on, np.asarray(bounds)[nth], values)


class Terms(Tokens):
    """Scored tokens with what the formulas of corrections are made of; S sequences have a scored token.

    Columns of frame ``tokens`` that corrections look at, each left out where it is not known: ``entropy_infer``,
    ``n_flipped_layers`` (-1 = not known) and beyond that frame ``advantage`` [1] and ``logp_train_new`` [nat],
    log-probabilities of the policy being trained.
    """

    @classmethod
    def of_arrays(
        cls,
        logp_train_T: ArrayLike,
        logp_infer_T: ArrayLike,
        seq_id_T: ArrayLike,
        advantage_T: ArrayLike | None = None,
    ) -> Terms:
        """The terms of arrays, rows in any order.

        Args:
            logp_train_T, logp_infer_T: log-probabilities of the same tokens [nat]; not finite = not scored.
            seq_id_T: sequence of every row (numbers or words).
            advantage_T: advantage of every row; its value where a token is not scored does not matter.

        Raises:
            MoediagError: arrays of different lengths, a log-probability of +inf, a missing sequence, or a scored token
                whose advantage is not a number.
        """
        arrays = {"logp_train": logp_train_T, "logp_infer": logp_infer_T, "advantage": advantage_T}
        columns = {name: np.asarray(array, np.float64) for name, array in arrays.items() if array is not None}
        shapes = [np.shape(seq_id_T), *(array.shape for array in columns.values())]
        if len(set(shapes)) != 1 or len(shapes[0]) != 1:
            raise MoediagError(f"corrections want arrays of one length, one value per token; found shapes {shapes}")
        row_T, _ = pd.factorize(np.asarray(seq_id_T))
        if (row_T < 0).any():
            raise MoediagError(f"corrections want the sequence of every token; {int((row_T < 0).sum())} rows have none")
        for name in ("logp_train", "logp_infer"):
            if (is_inf_T := columns[name] == np.inf).any():
                raise MoediagError(
                    f"{name} needs log-probabilities, found +inf in {int(is_inf_T.sum())} rows, first at row "
                    f"{int(np.argmax(is_inf_T))}: are these logits?"
                )
        terms = cls(pd.DataFrame({"seq_id": row_T, **columns}, copy=False))
        _ = terms.advantage_T  # what is no number is an error for corrections that do not look at it, too
        return terms

    @cached_property
    def advantage_T(self) -> Float64 | None:  # noqa: N802 - the legend suffix
        """Advantages [1]; None = not known.

        Raises:
            MoediagError: a scored token has none.
        """
        advantage_T = self.get("advantage")
        if advantage_T is not None and not np.isfinite(advantage_T).all():
            is_bad_N = self.is_scored_N & ~np.isfinite(self.frame["advantage"].to_numpy())
            raise MoediagError(
                f"{int(is_bad_N.sum())} scored tokens have an advantage that is not a number, first at row "
                f"{int(np.argmax(is_bad_N))}: leave their sequences out, or give no advantages"
            )
        return advantage_T

    @cached_property
    def is_float32_T(self) -> NDArray[np.bool_]:  # noqa: N802
        """Both log-probabilities are float32 numbers."""
        return are_float32(self.logp_train_T, self.logp_infer_T)

    @cached_property
    def is_float32_S(self) -> NDArray[np.bool_]:  # noqa: N802
        """All log-probabilities of the sequence are float32 numbers."""
        return np.asarray(np.bincount(self.row_T[self.is_float32_T], minlength=self.n_sequences) == self.n_S)

    @cached_property
    def ratio_T(self) -> Float64:  # noqa: N802
        """pi_train / pi_infer of every token, clamped."""
        return clamped_exp(self.diff_T)

    @cached_property
    def prob_diff_T(self) -> Float64:  # noqa: N802
        """p_train - p_infer of every token; float32 log-probabilities have float32 probabilities."""
        train_T, infer_T = np.exp(self.logp_train_T), np.exp(self.logp_infer_T)
        float32_T = train_T.astype(np.float32).astype(np.float64) - infer_T.astype(np.float32)
        return np.where(self.is_float32_T, float32_T, train_T - infer_T)

    @cached_property
    def binary_kl_infer_train_T(self) -> Float64:  # noqa: N802
        """D_B(infer, train) of every token [nat]."""
        return binary_kl(self.logp_infer_T, self.logp_train_T)

    @cached_property
    def binary_kl_train_infer_T(self) -> Float64:  # noqa: N802
        """D_B(train, infer) of every token [nat]."""
        return binary_kl(self.logp_train_T, self.logp_infer_T)

    @cached_property
    def k3_T(self) -> Float64:  # noqa: N802
        """ratio - 1 - log-ratio of every token [nat], of the clamped log-ratio."""
        diff_T = np.clip(self.diff_T, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
        return np.asarray(np.expm1(diff_T) - diff_T)

    @cached_property
    def log_product_S(self) -> Float64:  # noqa: N802
        """Log of the sequence's product ratio: the sum of its log-ratios [nat]."""
        return self.exact_sums(self.diff_T)

    @cached_property
    def log_geometric_mean_S(self) -> Float64:  # noqa: N802
        """Log of the geometric mean of the sequence's ratios [nat]."""
        return np.asarray(self.log_product_S / self.n_S)

    @cached_property
    def mean_k3_S(self) -> Float64:  # noqa: N802
        """Mean k3 of every sequence [nat]."""
        return np.asarray(self.exact_sums(self.k3_T) / self.n_S)

    def exact_sums(self, values_T: Float64) -> Float64:
        """(S,) sums over the tokens of each sequence, rounded once: the same bits however its rows are ordered and
        whatever stands beside it, so that a sequence on the bound of a filter is kept or dropped by its tokens.

        Args:
            values_T: finite values; a sum beyond float64 is infinite.
        """
        is_sorted = bool((self.row_T[1:] >= self.row_T[:-1]).all())
        values = (values_T if is_sorted else values_T[np.argsort(self.row_T, kind="stable")]).tolist()
        bounds = [0, *np.cumsum(self.n_S).astype(int).tolist()]
        return np.array([_sum(values[start:end]) for start, end in pairwise(bounds)], dtype=np.float64)

    def least_S(self, values_T: Float64) -> Float64:  # noqa: N802
        """Least value of every sequence."""
        least_S = np.full(self.n_sequences, np.inf)
        np.minimum.at(least_S, self.row_T, values_T)
        return least_S

    def of_sequence(self, values_S: NDArray[Any]) -> NDArray[Any]:
        """Every token's value of its sequence."""
        return np.asarray(values_S[self.row_T])


def _sum(values: list[float]) -> float:
    try:
        return math.fsum(values)
    except OverflowError:  # what is beyond float64 on the way may be inside at the end
        return math.fsum(value / 2**20 for value in values) * 2**20
