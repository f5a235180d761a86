"""Is it compounding? The recurrence against other shapes that grow: a parabola, and one jump between two steps.

A series that rises ever faster has no one cause: a schedule, a warm-up or a change of data bends it as well as
compounding does. Shapes with as many unknowns as the recurrence are fitted to the same steps with the same errors and
the same kinds of process noise; what fits as well cannot be told from it.

Invariants:
    - three unknowns each: start, slope, curvature; or level, jump, its place; as the recurrence's start, a and b;
    - the likelihood is that of :mod:`moediag.analysis.recurrence_filter`, up to the same constant.

Source: maxima of as many unknowns differ by half of what BIC differs, and a ratio of 20 is strong evidence: Kass and
Raftery, Journal of the American Statistical Association 90 (1995).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from moediag.analysis.recurrence_filter import Noises, Series, filter_series

Float64 = NDArray[np.float64]

STRONG: Final = math.log(20)
"""Difference of log-likelihoods from which one shape is told from another: 20 to 1."""
_N_NOISES: Final = 16
_SPAN_OF_NOISES: Final = 1e3
"""Standard deviations of the process noise tried, besides 0: even in the logarithm over this factor."""


@dataclass(frozen=True)
class Shape:
    """Another shape of the series.

    Args:
        name: in words.
        advantage: its log-likelihood above the recurrence's, each at its best; below 0 where it fits worse.
    """

    name: str
    advantage: float

    @property
    def words(self) -> str:
        """Name and numbers."""
        return f"{self.name} (log-likelihood {abs(self.advantage):.1f} {'higher' if self.advantage > 0 else 'lower'})"


def other_shapes(series: Series, growth_R: Float64) -> list[Shape]:
    """A parabola and one jump, best first.

    Args:
        series: at least four steps.
        growth_R: growth rates log(1 + a) per step at which the recurrence is tried.
    """
    noises = _noises(series)
    recurrence = float(filter_series(series, noises, growth_R).log_RQB.max())
    time_N = (series.step_N - series.step_N[0]) / series.span
    parabola_N3 = np.stack([np.ones_like(time_N), time_N, np.square(time_N)], axis=1)
    is_after_MN = np.arange(len(series)) > np.arange(len(series) - 1)[:, None]
    jumps_MN2 = np.stack([np.ones_like(is_after_MN), is_after_MN], axis=2).astype(np.float64)
    curved = log_likelihood(series, noises, parabola_N3[None]).max()
    jumped_M = log_likelihood(series, noises, jumps_MN2).max(axis=0)
    at = int(jumped_M.argmax())
    place = f"one jump between steps {series.step_N[at]:g} and {series.step_N[at + 1]:g}"
    shapes = [Shape("a parabola", float(curved) - recurrence), Shape(place, float(jumped_M[at]) - recurrence)]
    return sorted(shapes, key=lambda shape: -shape.advantage)


def log_likelihood(series: Series, noises: Noises, columns_MNK: Float64) -> Float64:
    """(Q, M) log-likelihood of means that are linear in K columns, at its maximum over their coefficients.

    Args:
        series: N steps.
        noises: Q kinds of process noise, which add up from step to step as at a = 0.
        columns_MNK: M such means.
    """
    gap_N = np.append(np.diff(series.step_N), 0.0)
    n_means, n_steps, n_columns = columns_MNK.shape
    beside = columns_MNK.transpose(1, 0, 2).reshape(n_steps, -1)
    rows = []
    for variance_N in noises.by_gap(series) * gap_N:
        walked_N = np.append(0.0, np.cumsum(variance_N[:-1]))
        root = linalg.cholesky(np.minimum.outer(walked_N, walked_N) + np.diag(np.square(series.se_N)), lower=True)
        white = linalg.solve_triangular(root, np.column_stack([series.delta_N, beside]), lower=True)
        basis_MNK = np.linalg.qr(white[:, 1:].reshape(n_steps, n_means, n_columns).transpose(1, 0, 2)).Q
        fitted_M = np.square(np.einsum("mnk,n->mk", basis_MNK, white[:, 0])).sum(axis=1)
        rows.append(-np.log(np.diag(root)).sum() - (white[:, 0] @ white[:, 0] - fitted_M) / 2)
    return np.stack(rows)


def _noises(series: Series) -> Noises:
    """No noise, and noises of both scalings up to the range of the data."""
    most = float(np.ptp(series.delta_N)) / math.sqrt(series.span)
    sds = np.geomspace(most / _SPAN_OF_NOISES, most, _N_NOISES)
    sd_Q = np.r_[0.0, sds, sds]
    return Noises(sd_Q, np.arange(len(sd_Q)) > _N_NOISES, np.full(len(sd_Q), 1 / len(sd_Q)))
