"""The logged tokens that every correction looks at, with what several of them need computed once.

Invariants:
    - a token is scored when both its log-probabilities are finite (:func:`~moediag.run.capture.is_scored`);
    - comparisons are made between log-ratios, never between their exponentials; log-ratios are clamped to +-20
      before ``exp``, so nothing overflows, and a kept ratio is never smaller than exp(-20): 0 always means no update;
    - what float32 log-probabilities give is held against a bound in float32 (:func:`on_bounds`): the float32 nearest to
      log 0.5 lies 1e-9 below it, and stands *on* the bound for everyone who computes in float32;
    - nothing depends on the order of the rows (see :mod:`moediag.corrections.exact_sums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moediag.analysis.measures import binary_kl
from moediag.corrections.exact_sums import sums_by_sequence
from moediag.errors import MoediagError
from moediag.run.capture import is_scored

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


@dataclass(frozen=True)
class Terms:
    """Scored tokens of whole sequences.

    Args:
        logp_train_T, logp_infer_T: log-probabilities of the scored tokens [nat], at theta_old.
        row_T: 0 .. S-1, the sequence of every scored token among ``n_sequences``.
        n_sequences: S; some sequences may have no scored token.
        advantage_T: advantage of every scored token; None = not known.
    """

    logp_train_T: Float64
    logp_infer_T: Float64
    row_T: NDArray[np.intp]
    n_sequences: int
    advantage_T: Float64 | None = None

    def __len__(self) -> int:
        return len(self.row_T)

    @cached_property
    def diff_T(self) -> Float64:  # noqa: N802 - the legend suffix
        """Log-ratio: logp_train - logp_infer [nat]."""
        return self.logp_train_T - self.logp_infer_T

    @cached_property
    def is_float32_T(self) -> NDArray[np.bool_]:  # noqa: N802
        """Both log-probabilities are float32 numbers."""
        return are_float32(self.logp_train_T, self.logp_infer_T)

    @cached_property
    def is_float32_S(self) -> NDArray[np.bool_]:  # noqa: N802
        """All log-probabilities of the sequence are float32 numbers."""
        n_float32_S = np.bincount(self.row_T[self.is_float32_T], minlength=self.n_sequences)
        return np.asarray(n_float32_S == self.n_S)

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
    def n_S(self) -> NDArray[np.int64]:  # noqa: N802
        """Scored tokens of every sequence."""
        return np.bincount(self.row_T, minlength=self.n_sequences).astype(np.int64)

    @cached_property
    def log_product_S(self) -> Float64:  # noqa: N802
        """Log of the sequence's product ratio: the sum of its log-ratios [nat]."""
        return sums_by_sequence(self.diff_T, self.row_T, self.n_S)

    @cached_property
    def log_geometric_mean_S(self) -> Float64:  # noqa: N802
        """Log of the geometric mean of the sequence's ratios [nat]."""
        return np.asarray(self.log_product_S / np.maximum(self.n_S, 1))

    @cached_property
    def mean_k3_S(self) -> Float64:  # noqa: N802
        """Mean k3 of every sequence [nat]."""
        return np.asarray(sums_by_sequence(self.k3_T, self.row_T, self.n_S) / np.maximum(self.n_S, 1))

    def least_S(self, values_T: Float64) -> Float64:  # noqa: N802
        """Least value of every sequence; +inf for a sequence without a scored token."""
        least_S = np.full(self.n_sequences, np.inf)
        if len(self) and (np.diff(self.row_T) >= 0).all():
            first_N = np.flatnonzero(np.diff(self.row_T, prepend=-1))
            least_S[self.row_T[first_N]] = np.minimum.reduceat(values_T, first_N)
        else:
            np.minimum.at(least_S, self.row_T, values_T)
        return least_S

    def of_sequence(self, values_S: NDArray[Any]) -> NDArray[Any]:
        """Every token's value of its sequence."""
        return np.asarray(values_S[self.row_T])


def scored_terms(
    logp_train_T: ArrayLike, logp_infer_T: ArrayLike, seq_id_T: ArrayLike, advantage_T: ArrayLike | None = None
) -> tuple[Terms, NDArray[np.bool_]]:
    """The scored tokens among the rows, and which rows these are.

    Args:
        logp_train_T, logp_infer_T: log-probabilities of the same tokens [nat]; not finite = not scored.
        seq_id_T: sequence of every row (numbers or words), rows in any order.
        advantage_T: advantage of every row; its value where a token is not scored does not matter.

    Raises:
        MoediagError: arrays of different lengths, a log-probability of +inf, a missing sequence, or a scored token
            whose advantage is not a number.
    """
    train_T, infer_T = (np.asarray(logp, dtype=np.float64) for logp in (logp_train_T, logp_infer_T))
    given_T = None if advantage_T is None else np.asarray(advantage_T, dtype=np.float64)
    ids_T = np.asarray(seq_id_T)
    shapes = [array.shape for array in (train_T, infer_T, ids_T, given_T) if array is not None]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1:
        raise MoediagError(f"corrections want arrays of one length, one value per token; found shapes {shapes}")
    row_T, sequences = pd.factorize(ids_T)
    if (row_T < 0).any():
        raise MoediagError(f"corrections want the sequence of every token; {int((row_T < 0).sum())} rows have none")
    is_scored_T = is_scored(train_T, infer_T)
    _refuse_values(train_T, infer_T, given_T, is_scored_T)
    if is_scored_T.all():
        return Terms(train_T, infer_T, row_T, len(sequences), given_T), is_scored_T
    some_T = None if given_T is None else given_T[is_scored_T]
    return (
        Terms(train_T[is_scored_T], infer_T[is_scored_T], row_T[is_scored_T], len(sequences), some_T),
        is_scored_T,
    )


def _refuse_values(train_T: Float64, infer_T: Float64, given_T: Float64 | None, is_scored_T: NDArray[np.bool_]) -> None:
    for side, logp_T in (("train", train_T), ("infer", infer_T)):
        if (logp_T == np.inf).any():
            raise MoediagError(
                f"logp_{side} wants log-probabilities, found +inf in {int((logp_T == np.inf).sum())} rows, first at "
                f"row {int(np.argmax(logp_T == np.inf))}: are these logits?"
            )
    if given_T is not None and not np.isfinite(given_T[is_scored_T]).all():
        is_bad_T = is_scored_T & ~np.isfinite(given_T)
        raise MoediagError(
            f"advantage_T wants a finite number for every scored token; {int(is_bad_T.sum())} rows have none, "
            f"first at row {int(np.argmax(is_bad_T))}"
        )
